"""A real pool whose device groups go over the SIMULATED backend (`tests/simulation`),
each of which costs a third of a second to make; gloo and vLLM are the real ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.at_rest import ranks_at_rest
from examples.checkpoints import REPO_ROOT
from tests.e2e.pools import (
    ENGINE_ARGS,
    PROMPTS,
    SAMPLING,
    eventually,
    running_pool,
)
from tests.simulation.backend import VARIABLE
from vllm_resident import Client, SwitchReport, launch
from vllm_resident.messages import RankStatus

pytestmark = pytest.mark.timeout(600)

CREATION_S = 0.33
# Of forming a world anew, at most, for forming one that was there before.
RATIO = 0.25
MAX_KEPT = 60
TP2 = {**ENGINE_ARGS, "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def simulated_pool(
    pool_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    patch = pytest.MonkeyPatch()
    command = launch.torchrun_command

    def simulated(*arguments: object) -> list[str]:
        words = command(*arguments)  # type: ignore[arg-type]
        assert "vllm_resident.rank" in words
        return [
            "tests.simulation.rank" if word == "vllm_resident.rank" else word
            for word in words
        ]

    config = tmp_path_factory.mktemp("simulated") / "pool.toml"
    config.write_text(f"[pool]\ncommunicators = {MAX_KEPT}\nawake_per_rank = 2\n")
    patch.setattr(launch, "torchrun_command", simulated)
    patch.setenv(VARIABLE, json.dumps({"creation_s": CREATION_S}))
    patch.setenv("PYTHONPATH", str(REPO_ROOT))
    with running_pool("simulated", pool_folder, config=config) as pool:
        patch.undo()
        yield pool


def kept(ranks: list[RankStatus]) -> list[int]:
    return [rank.num_kept_communicators for rank in ranks]


def form_s(report: SwitchReport) -> float:
    return report.phases["form_world"] + report.phases["load_model"]


def tokens(pool: Client, name: str) -> list[list[int]]:
    return [each.token_ids for each in pool.generate(name, PROMPTS, SAMPLING)]


def test_a_layout_that_was_there_is_loaded_without_making_its_groups(
    simulated_pool: Client,
    checkpoints: dict[str, str],
    reference: Callable[[str], list[list[int]]],
) -> None:
    pool = simulated_pool
    before = ranks_at_rest(pool)
    assert kept(before) == [0, 0]
    first = pool.load("a", checkpoints["llama"], ranks=[0, 1], **TP2)
    assert tokens(pool, "a") == reference("llama")
    assert all(rank.num_process_groups > 0 for rank in pool.status().ranks)
    pool.unload("a")
    unloaded = ranks_at_rest(pool)
    # In no world any more, but there; within the budget.
    assert [rank.num_process_groups for rank in unloaded] == [0, 0]
    assert all(0 < number <= MAX_KEPT for number in kept(unloaded))
    # The best of three: a rank may be late to a meeting for other reasons.
    later = []
    for name in "bcd":
        later.append(pool.load(name, checkpoints["llama"], ranks=[0, 1], **TP2))
        assert tokens(pool, name) == reference("llama")
        pool.unload(name)
    assert min(map(form_s, later)) < form_s(first) - 5 * CREATION_S
    again_s = min(report.phases["form_world"] for report in later)
    assert again_s < RATIO * first.phases["form_world"]

    def check() -> None:
        again = ranks_at_rest(pool)
        assert kept(again) == kept(unloaded)
        for now, then in zip(again, unloaded, strict=True):
            assert now.num_file_descriptors <= then.num_file_descriptors
            assert now.num_threads <= then.num_threads
            assert now.num_shm_segments == then.num_shm_segments == 0

    eventually(check)


def test_a_layout_is_staged_beside_one_that_serves_on_the_same_ranks(
    simulated_pool: Client,
    checkpoints: dict[str, str],
    reference: Callable[[str], list[list[int]]],
) -> None:
    """Both of two ranks: no rank waits in one for a rank that waits in the other."""
    pool = simulated_pool
    pool.load("old", checkpoints["llama"], ranks=[0, 1], **TP2)
    long = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True}
    stop = threading.Event()
    ended: list[str | None] = []

    def keep_asking() -> None:
        while not stop.is_set():
            (completion,) = pool.generate("old", ["hello"], long)
            ended.append(completion.finish_reason)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        pool.load("new", checkpoints["qwen3"], ranks=[0, 1], asleep=True, **TP2)
    finally:
        stop.set()
        asking.join(60)
    assert not asking.is_alive()
    assert set(ended) == {"length"}
    assert tokens(pool, "old") == reference("llama")
    pool.apply([])
