"""One pool serves the e2e tests: that is what residency is for.

Tests that kill ranks or need declared faults of another kind start pools of their own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import mixed, soak
from examples.checkpoints import REPO_ROOT, cache_folder, make
from tests.e2e.pools import (
    ARCHITECTURES,
    ENGINE_ARGS,
    PROMPTS,
    SAMPLING,
    running_pool,
)
from tests.e2e.references import (
    Expected,
    plain_adapter,
    plain_embeddings,
    write_adapter,
)
from vllm_resident import Client

# Of every tiny model.
EOS = 1
LOAD_PHASES = (
    "prepare",
    "form_world",
    "tokenizer",
    "load_model",
    "kv_cache",
    "warm_up",
    "schedule",
    "lockstep",
)
SLEEP_PHASES = ("stop", "free_kv_cache", "free_weights")
WAKE_PHASES = ("read_weights", "restore_kv_cache", "resume")


def failing_engine(rank: int, phase: str) -> str:
    """The name of the engine for which a fault is declared on that rank, in that phase
    of what is done to it."""
    return f"fails-on-{rank}-in-{phase.replace('_', '-')}"


# Engines of these names fail where they say; every other name is left alone.
FAULTS = [
    {"rank": rank, "phase": phase, "engine": failing_engine(rank, phase)}
    for rank in (0, 1)
    for phase in (*LOAD_PHASES, *SLEEP_PHASES, *WAKE_PHASES)
] + [{"rank": 1, "phase": "load_model", "engine": "hangs", "action": "hang"}]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, str]:
    """Folder of each tiny model, made in a process of its own if missing."""
    subprocess.run(
        [sys.executable, "-m", "examples.checkpoints", *ARCHITECTURES],
        cwd=REPO_ROOT,
        check=True,
        timeout=300,
    )
    return {name: str(cache_folder() / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the one model with real weights."""
    subprocess.run(
        [sys.executable, "-m", "examples.checkpoints", "smollm2"],
        cwd=REPO_ROOT,
        check=True,
        timeout=300,
    )
    return str(cache_folder() / "smollm2")


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the one model that makes embeddings."""
    return str(make("minilm"))  # copied: no torch is needed


@pytest.fixture(scope="session")
def embedded(minilm: str) -> dict[str, list[float]]:
    return plain_embeddings(minilm)


@pytest.fixture(scope="session")
def tuned(
    checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Expected:
    """A tiny Llama, and an adapter of it."""
    model = checkpoints["llama"]
    adapter = write_adapter(Path(model), tmp_path_factory.mktemp("adapter"))
    return plain_adapter(model, adapter, ENGINE_ARGS, SAMPLING)


@pytest.fixture(scope="session")
def plain() -> soak.Answers:
    """What plain vLLM, a fresh process a model, answers for all models at once: most of
    the time is its import, which they share."""
    return soak.ask_plain()


@pytest.fixture(scope="session")
def reference(plain: soak.Answers) -> Callable[[str], list[list[int]]]:
    """Its tokens of PROMPTS by a model's name, as SAMPLING has them."""
    places = [mixed.PROMPTS.index(prompt) for prompt in PROMPTS]

    def tokens(name: str) -> list[list[int]]:
        return [ended(plain[name][place]) for place in places]

    return tokens


def ended(tokens: list[int]) -> list[int]:
    """A greedy answer that ignored the ends of the text, as one that does not."""
    tokens = tokens[: SAMPLING["max_tokens"]]
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.fixture(scope="session")
def pool_folder() -> Iterator[Path]:
    """A short path: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="vr-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_pool(pool_folder: Path) -> Iterator[Client]:
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_RESIDENT_FAULTS", json.dumps(FAULTS))
    with running_pool("e2e", pool_folder) as client:
        patch.undo()
        yield client


@pytest.fixture
def pool(shared_pool: Client) -> Client:
    """The shared pool with nothing loaded."""
    shared_pool.apply([])
    return shared_pool
