"""Engines put to sleep and woken on real ranks: the same tokens, the memory back.

Two ranks without a controller (`tests.process.rank_commander`) serve all tests here.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from examples.checkpoints import REPO_ROOT
from tests.e2e.pools import ENGINE_ARGS, PROMPTS, SAMPLING, eventually
from tests.e2e.spmd_sleeper import KV_CACHE_BYTES
from tests.members import standing_still
from tests.process.rank_commander import Ranks
from vllm_resident.messages import (
    CloseEngine,
    EngineClosed,
    EngineFailed,
    EngineSuspended,
    RankGauges,
    RequestFailed,
    RequestsAccepted,
    SuspendEngine,
)

Reference = Callable[[str], list[list[int]]]

SUSPEND_PHASES = ["stop", "free_kv_cache", "free_weights"]
RESUME_PHASES = ["read_weights", "restore_kv_cache", "resume"]
LAYOUTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "tp1": ([1], {}),
    "tp2": ([0, 1], {"tensor_parallel_size": 2}),
    "pp2": ([0, 1], {"pipeline_parallel_size": 2}),
}
FAULTS = [
    {"rank": rank, "phase": phase, "engine": f"rank-{rank}-fails-in-{phase}"}
    for phase in SUSPEND_PHASES + RESUME_PHASES
    for rank in (0, 1)
]
LONG = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shared_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        # What is compiled is compiled here, not found.
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm")))
        ranks = Ranks(2, FAULTS)
    yield ranks
    ranks.end()


@pytest.fixture
def ranks(shared_ranks: Ranks) -> Iterator[Ranks]:
    """The ranks with nothing built; what a test leaves is dropped."""
    yield shared_ranks
    for generation in list(shared_ranks.members):
        shared_ranks.drop(generation)


def build(
    ranks: Ranks, checkpoints: dict[str, str], model: str, layout: str, name: str = ""
) -> int:
    members, sizes = LAYOUTS[layout]
    return ranks.build(
        name or f"{model}-{layout}", checkpoints[model], members, **ENGINE_ARGS, **sizes
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_the_same_tokens_after_sleep(
    model: str,
    layout: str,
    ranks: Ranks,
    checkpoints: dict[str, str],
    reference: Reference,
) -> None:
    engine = build(ranks, checkpoints, model, layout)
    expected = reference(model)
    assert ranks.tokens(engine, PROMPTS, SAMPLING) == expected
    for level in (1, 2, 1):
        for suspended in ranks.suspend(engine, level):
            assert suspended.level == level
            assert list(suspended.phases) == SUSPEND_PHASES
            assert suspended.memory.device_bytes == 0
            assert (suspended.memory.host_bytes > 0) == (level == 1)
        for resumed in ranks.resume(engine):
            assert list(resumed.phases) == RESUME_PHASES
            assert resumed.memory.device_bytes >= ENGINE_ARGS["kv_cache_memory_bytes"]
        assert ranks.tokens(engine, PROMPTS, SAMPLING) == expected


def test_asleep_at_level_1_it_may_go_on_to_2_and_not_back(
    ranks: Ranks, checkpoints: dict[str, str], reference: Reference
) -> None:
    engine = build(ranks, checkpoints, "llama", "tp2")
    ranks.suspend(engine, 1)
    assert [each.level for each in ranks.suspend(engine, 1)] == [1, 1]
    assert [each.level for each in ranks.suspend(engine, 2)] == [2, 2]
    ranks.ask_suspend(engine, 1)
    for failure in ranks.expect(EngineFailed, [0, 1], generation=engine):
        assert failure.error.kind == "CommandRejected"
        assert "its weights are gone" in failure.error.message
    ranks.resume(engine)
    assert ranks.tokens(engine, PROMPTS, SAMPLING) == reference("llama")
    ranks.resume(engine)


def test_requests_in_flight_are_aborted(
    ranks: Ranks, checkpoints: dict[str, str], reference: Reference
) -> None:
    for layout in ("tp2", "pp2"):
        engine = build(ranks, checkpoints, "llama", layout)
        # So that no request ends before the command is there: none does without it.
        with standing_still(rank_of(ranks.processes[1].pid).pid):
            requests = [ranks.add(engine, PROMPTS[:2], LONG) for _ in range(3)]
            ranks.expect(RequestsAccepted, [0], request=requests[0])
            ranks.ask_suspend(engine, 1)
        ranks.expect(EngineSuspended, [0, 1], generation=engine)
        for request in requests:
            reasons = [each.finish_reason for each in ranks.outputs(engine, request)]
            assert reasons == ["abort", "abort"]
        ranks.resume(engine)
        assert ranks.tokens(engine, PROMPTS, SAMPLING) == reference("llama")
        ranks.drop(engine)


def test_a_request_for_a_sleeper_is_refused(
    ranks: Ranks, checkpoints: dict[str, str]
) -> None:
    engine = build(ranks, checkpoints, "llama", "tp2")
    ranks.suspend(engine, 1)
    request = ranks.add(engine, PROMPTS, SAMPLING)
    (failure,) = ranks.expect(RequestFailed, [0], request=request)
    assert failure.error.kind == "CommandRejected"
    assert "is asleep" in failure.error.message


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeper_can_be_closed(
    level: int, ranks: Ranks, checkpoints: dict[str, str]
) -> None:
    engine = build(ranks, checkpoints, "llama", "tp2")
    ranks.suspend(engine, level)
    ranks.tell(CloseEngine(generation=engine, timeout_s=20), [0, 1])
    ranks.expect(EngineClosed, [0, 1], generation=engine)
    del ranks.members[engine]


def test_compiled_engines_sleep_wake_and_go(
    ranks: Ranks, checkpoints: dict[str, str], reference: Reference
) -> None:
    """With torch.compile: one of the same class serves on when another goes, of which
    nothing stays (else a rank says `ReleaseIncomplete`); and a graph that the first
    left in the cache speaks to the ranks of the engine that takes it."""

    def compiled(layout: str) -> int:
        members, sizes = LAYOUTS[layout]
        arguments = {**ENGINE_ARGS, "enforce_eager": False, **sizes}
        return ranks.build(layout, checkpoints["llama"], members, **arguments)

    def close(engine: int) -> None:
        members = ranks.members.pop(engine)
        ranks.tell(CloseEngine(generation=engine, timeout_s=20), members)
        ranks.expect(EngineClosed, members, generation=engine)

    first, narrow = compiled("tp2"), compiled("tp1")
    for level in (1, 2):
        for engine in (first, narrow):
            assert ranks.tokens(engine, PROMPTS, SAMPLING) == reference("llama")
            ranks.suspend(engine, level)
            ranks.resume(engine)
    second, third = compiled("tp2"), compiled("tp2")
    close(first)
    for engine in (second, narrow, third, second):
        assert ranks.tokens(engine, PROMPTS, SAMPLING) == reference("llama")
    close(third)
    assert ranks.tokens(second, PROMPTS, SAMPLING) == reference("llama")


def test_many_engines_of_overlapping_layouts_take_turns(
    ranks: Ranks, checkpoints: dict[str, str], reference: Reference
) -> None:
    """All resident at once, each its own world; asleep, awake, and one let go."""
    layouts = {
        "qwen2": ([0, 1], {"tensor_parallel_size": 2}),
        "llama": ([0], {}),
        "opt": ([1], {"enable_prefix_caching": False}),
        "qwen3": ([0, 1], {"pipeline_parallel_size": 2}),
    }
    engines: dict[str, int] = {}

    def check(model: str) -> None:
        assert ranks.tokens(engines[model], PROMPTS, SAMPLING) == reference(model)

    for model, (members, sizes) in layouts.items():
        engines[model] = ranks.build(
            model, checkpoints[model], members, **ENGINE_ARGS, **sizes
        )
        check(model)
        ranks.suspend(engines[model], 1)
    for level in (1, 2):
        for model in layouts:
            ranks.resume(engines[model])
            check(model)
            ranks.suspend(engines[model], level)
    for engine in engines.values():
        ranks.resume(engine)
    for model in layouts:
        check(model)
    # All awake at once, at work at once.
    asked = {
        model: ranks.add(engine, PROMPTS, SAMPLING) for model, engine in engines.items()
    }
    for model, request in asked.items():
        outputs = ranks.outputs(engines[model], request)
        assert [each.token_ids for each in outputs] == reference(model)
    for gone in ("llama", "qwen2"):
        ranks.drop(engines.pop(gone))
        for model in engines:
            check(model)


def test_failures_are_told_and_unwound(
    ranks: Ranks, checkpoints: dict[str, str]
) -> None:
    """In each phase, on each rank; afterwards nothing is left of any of them."""
    ranks.drop(build(ranks, checkpoints, "llama", "tp2"))
    before = ranks.settled_gauges()
    for phase, rank in itertools.product(SUSPEND_PHASES + RESUME_PHASES, (0, 1)):
        name = f"rank-{rank}-fails-in-{phase}"
        engine = build(ranks, checkpoints, "llama", "tp2", name)
        ranks.ask_suspend(engine, 2, timeout_s=30)
        if phase in RESUME_PHASES:
            ranks.expect(EngineSuspended, [0, 1], generation=engine)
            ranks.ask_resume(engine)
        (failure,) = ranks.expect(EngineFailed, [rank], generation=engine)
        assert failure.error.phase == phase
        assert f"declared fault in phase {phase}" in failure.error.message
        ranks.drop(engine)
    assert_given_back(before, ranks)


def test_a_follower_does_not_wait_for_its_leader_for_ever(
    ranks: Ranks, checkpoints: dict[str, str]
) -> None:
    engine = build(ranks, checkpoints, "llama", "tp2")
    ranks.tell(SuspendEngine(generation=engine, level=1, timeout_s=0.5), [1])
    (failure,) = ranks.expect(EngineFailed, [1], generation=engine, timeout_s=30)
    assert failure.error.kind == "RankTimeout"
    assert failure.error.phase == "stop"


def assert_given_back(before: dict[int, RankGauges], ranks: Ranks) -> None:
    def check() -> None:
        after = ranks.settled_gauges()
        for rank, was in before.items():
            now = after[rank]
            for name in (
                "num_file_descriptors",
                "num_threads",
                "num_shm_segments",
                "num_sockets",
                "num_process_groups",
                "num_engines",
            ):
                assert getattr(now, name) <= getattr(was, name), (rank, name)
            assert now.memory_used_bytes <= 1.10 * was.memory_used_bytes

    eventually(check)


@pytest.mark.parametrize("level", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fifty_rounds_leave_nothing_behind(
    level: int, ranks: Ranks, checkpoints: dict[str, str], reference: Reference
) -> None:
    engine = build(ranks, checkpoints, "llama", "tp2")
    for round_ in range(50):
        ranks.suspend(engine, level)
        ranks.resume(engine)
        if round_ % 10 == 0:
            assert ranks.tokens(engine, PROMPTS, SAMPLING) == reference("llama")
        if round_ == 10:
            before = ranks.settled_gauges()
    assert_given_back(before, ranks)


def test_an_idle_rank_rests_while_engines_sleep(
    ranks: Ranks, checkpoints: dict[str, str]
) -> None:
    engine = build(ranks, checkpoints, "llama", "tp2")
    ranks.suspend(engine, 1)
    time.sleep(0.5)
    since = [processor_seconds(process.pid) for process in ranks.processes]
    time.sleep(2)
    for process, before in zip(ranks.processes, since, strict=True):
        assert processor_seconds(process.pid) - before < 0.5


def processor_seconds(pid: int) -> float:
    """Of a supervisor and its rank."""
    times = [each.cpu_times() for each in (psutil.Process(pid), rank_of(pid))]
    return float(sum(each.user + each.system for each in times))


def rank_of(pid: int) -> psutil.Process:
    """Of a supervisor."""
    (rank,) = psutil.Process(pid).children()
    return rank


@pytest.mark.slow
def test_library_mode_has_several_engines_and_puts_them_to_sleep(
    checkpoints: dict[str, str], reference: Reference
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1"),
            *("--nproc-per-node", "2", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.e2e.spmd_sleeper"),
            *(checkpoints["qwen3"], checkpoints["opt"]),
        ],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    marker = "RESULT "
    lines = [each for each in done.stdout.splitlines() if each.startswith(marker)]
    assert len(lines) == 2, done.stderr[-3000:]
    for result in (json.loads(line.removeprefix(marker)) for line in lines):
        for each in result["tokens"]:
            assert each == [reference("qwen3"), reference("opt")]
        # Twenty where a script keeps nothing of them, 214 where it kept one core.
        assert result["garbage"] < 50
        for fell in result["fell"]:
            assert fell > 0.9 * KV_CACHE_BYTES
