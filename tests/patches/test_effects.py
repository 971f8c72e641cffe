"""What each patch is for, seen on real vLLM on CPU with the overlay active.

A few processes serve all tests (`scenarios.py` is what they run): importing vLLM is
most of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from examples.checkpoints import REPO_ROOT, cache_folder
from tests.conftest import NO_SHARED_MEMORY

pytestmark = pytest.mark.timeout(400)
_MODELS = ["llama", "qwen3"]
_CACHES = {"plain": "defaults"}


class Scenarios:
    """Runs each scenario once and keeps its report."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.segments = f"vr-effects-{os.getpid()}"

    @cache  # noqa: B019 - one instance lives as long as the tests
    def plain(self) -> dict[str, Any]:
        self.defaults()  # leaves the registry's cache behind
        return self._run("plain", _MODELS[:1])

    @cache  # noqa: B019
    def defaults(self) -> dict[str, Any]:
        return self._run("defaults", _MODELS[:1])

    @cache  # noqa: B019
    def resident(self) -> dict[str, Any]:
        return self._run("resident", [*_MODELS, _MODELS[0]])

    @cache  # noqa: B019
    def states(self) -> dict[str, Any]:
        return self._run("states", [])

    @cache  # noqa: B019
    def compiled(self) -> dict[str, Any]:
        return self._run("compiled", _MODELS[:1])

    @cache  # noqa: B019
    def pipeline(self) -> list[dict[str, Any]]:
        """Each of the two ranks' report."""
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        self._call([*launcher, "--nproc-per-node", "2"], "pipeline", _MODELS[:1])
        paths = [self._folder / f"pipeline.{rank}" for rank in range(2)]
        return [json.loads(path.read_text()) for path in paths]

    def _run(self, name: str, models: list[str]) -> dict[str, Any]:
        self._call([], name, models)
        seen: dict[str, Any] = json.loads((self._folder / f"{name}.json").read_text())
        return seen

    def _call(self, launcher: list[str], name: str, models: list[str]) -> None:
        folders = [str(cache_folder() / model) for model in models]
        scenario = ["-m", "tests.patches.scenarios", name]
        log = self._folder / f"{name}.log"
        with log.open("w") as output:
            done = subprocess.run(
                [
                    sys.executable,
                    *launcher,
                    *scenario,
                    str(self._folder / f"{name}.json"),
                    *folders,
                ],
                cwd=REPO_ROOT,
                env={
                    **os.environ,
                    "VLLM_CPU_OMP_THREADS_BIND": _cores(),
                    # The registry has seen no architecture yet.
                    "VLLM_CACHE_ROOT": str(self._folder / _CACHES.get(name, name)),
                    "XDG_CACHE_HOME": str(self._folder / "cache"),
                    "VLLM_LOGGING_LEVEL": "WARNING",
                    "SEGMENTS": self.segments,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=300,
                check=False,
            )
        assert done.returncode == 0, log.read_text()[-4000:]


def _cores() -> str:
    """A core for each of two ranks: vLLM would bind both to the same."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    subprocess.run(
        [sys.executable, "-m", "examples.checkpoints", *_MODELS],
        cwd=REPO_ROOT,
        check=True,
        timeout=300,
    )
    return Scenarios(tmp_path_factory.mktemp("effects"))


def test_without_flags_nothing_is_different(scenarios: Scenarios) -> None:
    plain, patched = scenarios.plain(), scenarios.defaults()
    assert patched["flags"] == [False, False]
    assert patched["tokens"] == plain["tokens"]
    # The heap is frozen, thawed and collected as ever.
    assert patched["counts"]["freeze"] == 1
    assert patched["counts"]["unfreeze"] >= 1
    assert patched["counts"]["collect"] >= 5


def test_sources_of_patched_modules(scenarios: Scenarios) -> None:
    sources = scenarios.defaults()["sources"]
    assert sources["file"].startswith(str(scenarios._folder / "cache"))
    assert sources["class"]
    assert sources["function"]
    assert sources["neighbour"]
    assert sources["spec"] == "vllm.distributed.parallel_state"


def test_two_engines_one_process(scenarios: Scenarios) -> None:
    """Shut down (twice), let go of, collected once: gone, and the next one is as good
    as new. The heap stays as the owner left it."""
    engines = scenarios.resident()["engines"]
    assert engines[0]["tokens"] == scenarios.plain()["tokens"]
    assert engines[2]["tokens"] == engines[0]["tokens"]
    assert engines[1]["tokens"] != engines[0]["tokens"]
    assert scenarios.resident()["default_group_alive"]
    for engine in engines:
        assert engine["model_dead"]
        assert engine["executor_dead"]
        assert not engine["core_holds_executor"]
        assert engine["tp_group_after"] == "None"
        assert "freeze" not in engine["counts"]
        assert "unfreeze" not in engine["counts"]
        assert "collect" not in engine["counts"]
        assert engine["frozen"] > 0


def test_kernel_overrides_run_once(scenarios: Scenarios) -> None:
    assert scenarios.resident()["walks"] == 1


def test_inspection_starts_no_process(scenarios: Scenarios) -> None:
    children = scenarios.resident()["children"]
    assert [each for each in children if "registry" in each] == []
    # And where the flag is not set there is one, so this would have seen it.
    children = scenarios.defaults()["children"]
    assert len([each for each in children if "registry" in each]) == 1


def test_tokenizers_are_copied_once(scenarios: Scenarios) -> None:
    """The third engine has the first one's model."""
    copies = [
        engine["look_ups"].get("tokenizer copies", 0)
        for engine in scenarios.resident()["engines"]
    ]
    assert copies[0] > 0
    assert copies[1] > 0
    assert copies[2] == 0


def test_turns_between_tensors(scenarios: Scenarios) -> None:
    # A dozen and more tensors in each of three small models.
    assert scenarios.resident()["turns"] > 36


def test_look_ups_happen_once(scenarios: Scenarios) -> None:
    seen = scenarios.resident()
    assert len([each for each in seen["children"] if "lscpu" in each]) == 1
    group = "entry points vllm.logits_processors"
    assert [engine["look_ups"].get(group, 0) for engine in seen["engines"]] == [1, 0, 0]


def test_compiled_once_per_machine(scenarios: Scenarios) -> None:
    first, second = scenarios.compiled()["starts"]
    assert (first["compiles"], first["loads"]) == (1, 0)
    assert (second["compiles"], second["loads"]) == (1, 1)
    assert first["tokens"] == scenarios.plain()["tokens"]
    assert second["tokens"] == first["tokens"]


def test_a_compiled_model_goes_with_its_engine(scenarios: Scenarios) -> None:
    seen = scenarios.compiled()
    # The first was compiled, the second found what that had left.
    assert [start["left"] for start in seen["starts"]] == [[], []]
    assert seen["num_built"] > 10
    assert seen["left"] == []  # of an engine that was built half-way


def test_kv_cache_takes_memory_when_used(scenarios: Scenarios) -> None:
    for engine in scenarios.resident()["engines"]:
        at_start, after_use = engine["kv_resident"]
        assert at_start < 0.05
        assert at_start < after_use < 0.5


def test_parallel_states_are_separate(scenarios: Scenarios) -> None:
    seen = scenarios.states()
    assert seen["names"] == ["world:0", "tp:0", "tp:0"]
    assert seen["different"]
    assert seen["custom_all_reduce"] == [False, True]
    assert seen["own"] == ["None", True, ["world:0"]]
    assert seen["closed"]
    assert seen["first_works"]
    assert seen["own_after"] == ["None", True]
    assert seen["default_group_alive"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_pipeline_stages_on_cpu(scenarios: Scenarios) -> None:
    for report in scenarios.pipeline():
        for size in ("pipeline_parallel_size", "tensor_parallel_size"):
            assert report[size]["tokens"] == scenarios.plain()["tokens"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_shared_memory_leaves_no_names(scenarios: Scenarios) -> None:
    names = {"pipeline_parallel_size": "pp:0", "tensor_parallel_size": "tp:0"}
    for report in scenarios.pipeline():
        for size, group in names.items():
            if not report[size]["shares_memory"]:
                pytest.skip(NO_SHARED_MEMORY)
            owner = f"{scenarios.segments}-{size}"
            assert report[size]["segments"] == f"{owner}-{group}-[0-1]-cpushm"
            assert report[size]["names"] == []
            assert report[size]["mapped"] == 2
