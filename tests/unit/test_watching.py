"""What is seen of the pool from outside: what is counted, who is told of switches."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.controller_harness import ALICE, BOB, GAUGES, Harness, hello, spec
from vllm_resident.controller import tally
from vllm_resident.controller.effects import SendToClient
from vllm_resident.controller.state import MAX_PAST
from vllm_resident.controller.tally import Tally
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    CallFailed,
    EndWatch,
    EngineFailed,
    EngineReport,
    GetTotals,
    Heartbeat,
    PhaseStarted,
    PoolTotals,
    Progress,
    RankTotal,
    StepCount,
    StepTotal,
    SwitchEnded,
    SwitchMoved,
    SwitchReport,
    TotalsReported,
    WatchPool,
)

WATCH = 900


def watching(harness: Harness, client: bytes = BOB) -> list[Any]:
    """Begin to watch; returns what comes at once."""
    harness.client(WatchPool(call=WATCH), client)
    return told(harness)


def told(harness: Harness, client: bytes = BOB) -> list[Any]:
    """What the watcher was sent with the last events."""
    return [
        effect.message
        for effect in harness.effects
        if isinstance(effect, SendToClient) and effect.client == client
    ]


def totals(harness: Harness) -> PoolTotals:
    harness.client(GetTotals(call=harness.call()))
    (answer,) = harness.to_clients(TotalsReported)
    assert isinstance(answer, TotalsReported)
    return answer.totals


# ------------------------------------------------------------ who watches


def test_a_watcher_is_told_of_a_switch_from_its_begin_to_its_end() -> None:
    harness = Harness()
    assert watching(harness) == []
    harness.load(spec("a", [0]))
    (begun,) = told(harness)
    assert isinstance(begun, SwitchMoved)
    assert (begun.call, begun.switch.action) == (WATCH, "load")
    assert begun.switch.stage == "preparing"
    (move,) = begun.switch.moves
    assert (move.name, move.before, move.after, move.waiting) == ("a", None, 0, [0])
    harness.now += 1.5
    harness.answer_all()
    first, moved, ended = told(harness)
    assert first is begun
    assert isinstance(moved, SwitchMoved)
    assert (moved.switch.stage, moved.switch.elapsed_s) == ("bringing_up", 1.5)
    assert isinstance(ended, SwitchEnded)
    assert (ended.number, ended.sequence, ended.age_s) == (begun.switch.number, 1, 1.5)
    assert ended.engines == ["a"]
    assert ended.report.action == "load"
    assert ended.cause.startswith("load")
    assert harness.status().switches == []


def test_phases_are_told_rank_by_rank() -> None:
    harness = Harness()
    watching(harness)
    harness.load(spec("a", [0, 1], tensor_parallel_size=2))
    for rank, phase, later_s in ((0, "prepare", 0.5), (1, "prepare", 0.25)):
        harness.now += later_s
        harness.rank(PhaseStarted(rank=rank, generation=1, phase=phase))
    (moved,) = told(harness)
    phases = moved.switch.moves[0].rank_phases
    assert {r: [(p.phase, p.began_s) for p in of] for r, of in phases.items()} == {
        0: [("prepare", 0.5)],
        1: [("prepare", 0.75)],
    }
    assert harness.status().switches[0].moves[0].rank_phases == phases


def test_that_nothing_changed_is_not_told() -> None:
    harness = Harness()
    watching(harness)
    harness.load(spec("a", [0]))
    harness.heartbeats()
    assert told(harness) == []


def test_phases_of_an_earlier_switch_are_not_told_again() -> None:
    harness = Harness()
    harness.load(spec("a", [0]))
    commanded = harness.effects
    harness.rank(PhaseStarted(rank=0, generation=1, phase="prepare"))
    harness.effects = commanded
    harness.answer_all()
    harness.now += 10
    harness.sleep("a")
    (switch,) = harness.status().switches
    assert switch.moves[0].rank_phases == {0: []}
    harness.now += 1
    harness.rank(PhaseStarted(rank=0, generation=1, phase="free_weights"))
    (switch,) = harness.status().switches
    (begun,) = switch.moves[0].rank_phases[0]
    assert (begun.phase, begun.began_s) == ("free_weights", 1.0)


def test_who_comes_later_is_told_of_the_last_switches() -> None:
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    for _ in range(MAX_PAST):
        harness.sleep("a")
        harness.answer_all()
        harness.wake_up("a")
        harness.answer_all()
    seen = watching(harness)
    assert [each.sequence for each in seen] == list(range(102, 2 * MAX_PAST + 2))
    assert {each.report.action for each in seen} == {"sleep", "wake_up"}
    assert watching(harness, ALICE) == []  # ALICE's are ALICE's
    assert len(told(harness, ALICE)) == MAX_PAST


def test_switches_of_the_pools_own_are_told_too() -> None:
    harness = Harness(world_size=1)
    harness.load_ready(spec("a", [0]))
    watching(harness)
    harness.pool.rank_ended(0, 1000, harness.now)
    harness.rank(hello(0, 1, pid=2000, incarnation=1))
    (moved,) = told(harness)
    assert (moved.switch.action, moved.switch.cause) == ("restore", "a rank came back")


def test_a_switch_that_fails_says_so() -> None:
    harness = Harness()
    watching(harness)
    harness.load(spec("a", [0]))
    error = ErrorInfo("CommandRejected", "no such thing")
    harness.rank(EngineFailed(rank=0, generation=1, error=error))
    harness.answer_all()
    *_, ended = told(harness)
    assert isinstance(ended, SwitchEnded)
    assert ended.report.error == "no such thing"


def test_a_watch_ends_as_asked_or_with_its_client_or_with_the_pool() -> None:
    harness = Harness()
    watching(harness)
    harness.client(EndWatch(call=WATCH), BOB)
    harness.load(spec("a", [0]))
    assert told(harness) == []
    watching(harness)
    harness.effects = harness.pool.client_gone(BOB)
    assert harness.state.watchers == []
    watching(harness)
    harness.effects = harness.pool.stop(1.0, harness.now)
    (failed,) = told(harness)
    assert isinstance(failed, CallFailed)
    assert failed.call == WATCH
    assert harness.state.watchers == []


def test_a_watcher_hears_that_the_pool_is_alive() -> None:
    harness = Harness()
    watching(harness)
    harness.tick(1.1)
    (progress,) = told(harness)
    assert isinstance(progress, Progress)
    harness.tick(0.25)
    assert told(harness) == []


def test_a_call_number_that_watches_is_in_use() -> None:
    harness = Harness()
    watching(harness)
    harness.client(WatchPool(call=WATCH), BOB)
    (failed,) = told(harness)
    assert failed.error.kind == "CommandRejected"


def test_what_was_learned_says_how_long_a_move_will_take() -> None:
    harness = Harness()
    harness.load(spec("a", [0]))
    commanded = harness.effects
    assert harness.status().switches[0].expected_s == 0.0  # never made
    harness.now += 4.0
    harness.effects = commanded
    harness.answer_all()
    harness.sleep("a")
    commanded = harness.effects
    harness.now += 0.5
    harness.effects = commanded
    harness.answer_all()
    harness.wake_up("a")
    assert harness.status().switches[0].expected_s == 0.0
    harness.answer_all()
    harness.sleep("a")
    assert harness.status().switches[0].expected_s == pytest.approx(0.5)


# ------------------------------------------------------------ what is counted


def report(
    seconds: float = 0.3, error: str = "", *, path: str = "load"
) -> SwitchReport:
    engine = EngineReport(
        "a", "load", 1, [0, 1], seconds, {"build": seconds, "coordinate": 0.0}, {}, {},
        rank_phases={0: {"build": seconds}, 1: {"build": seconds / 2}},
    )  # fmt: skip
    return SwitchReport(
        "load", seconds, {}, [engine], path=path.split(">"), unavailable_s=0.1,
        error=error,
    )  # fmt: skip


def test_switches_are_counted_by_action_path_and_result() -> None:
    counted = Tally()
    tally.note_switch(counted, report(0.3))
    tally.note_switch(counted, report(3.0))
    tally.note_switch(counted, report(0.1, "no", path="load>go_back"))
    tally.note_switch(counted, report(0.1, "no"))
    seen = tally.totals(counted)
    rows = {(s.action, s.path, s.result): s for s in seen.switches}
    assert set(rows) == {
        ("load", "load", "done"),
        ("load", "load>go_back", "went_back"),
        ("load", "load", "refused"),
    }
    done = rows["load", "load", "done"]
    assert (done.num_switches, done.seconds) == (2, pytest.approx(3.3))
    assert done.unavailable_s == pytest.approx(0.2)
    counts = dict(zip(seen.bounds_s, done.buckets, strict=True))
    assert (counts[0.25], counts[0.5], counts[2.0], counts[5.0]) == (0, 1, 1, 2)


def test_phases_are_counted_by_path_and_by_model_and_rank() -> None:
    counted = Tally()
    tally.note_switch(counted, report(0.5))
    tally.note_switch(counted, report(0.5))
    seen = tally.totals(counted)
    (build,) = [p for p in seen.phases if p.phase == "build"]
    assert (build.move, build.path, build.num_times) == ("load", "load", 2)
    assert build.seconds == pytest.approx(1.0)
    by_model = {(p.model, p.move, p.phase): p.num_times for p in seen.model_phases}
    assert by_model == {("a", "load", "build"): 2, ("a", "load", "coordinate"): 2}
    by_rank = {(m.model, m.rank): m.seconds for m in seen.moves}
    assert by_rank == {("a", 0): pytest.approx(1.0), ("a", 1): pytest.approx(0.5)}


def test_steps_add_up_over_what_a_rank_says_and_over_its_lives() -> None:
    counted = Tally()
    for count in (StepCount(3, 0.3), StepCount(3, 0.3), StepCount(5, 0.7)):
        tally.note_steps(counted, 0, {"a": count})
    tally.note_process(counted, 0, is_first=False)
    tally.note_steps(counted, 0, {"a": StepCount(9, 1.0)})
    tally.note_steps(counted, 0, {"a": StepCount(2, 0.2)})  # begun anew
    (total,) = tally.totals(counted).steps
    assert total == StepTotal("a", 0, 16, pytest.approx(1.9))


def test_names_without_end_do_not_add_up() -> None:
    counted = Tally()
    for number in range(2 * tally.MAX_MODELS):
        tally.note_steps(counted, 0, {f"m{number}": StepCount(1, 0.1)})
        tally.note_divergence(counted, f"m{number}", 0)
    seen = tally.totals(counted).steps
    assert len(seen) == tally.MAX_MODELS + 1
    assert sum(total.num_steps for total in seen) == 2 * tally.MAX_MODELS
    (rest,) = [total for total in seen if total.model == tally.OTHER]
    assert rest.num_divergences == tally.MAX_MODELS


def test_the_controller_counts_what_happens_to_it() -> None:
    harness = Harness(world_size=2)
    harness.load_ready(spec("a", [0, 1], tensor_parallel_size=2))
    steps = {"a": StepCount(7, 0.5)}
    gauges = type(GAUGES)(10, 100, 20, 5, 1, steps=steps)
    harness.rank(Heartbeat(rank=1, incarnation=0, gauges=gauges))
    error = ErrorInfo("RankDiverged", "differs")
    harness.rank(EngineFailed(rank=1, generation=1, error=error))
    harness.answer_all()
    harness.pool.rank_ended(0, 1000, harness.now)
    harness.rank(hello(0, 2, pid=2000, incarnation=1))
    seen = totals(harness)
    assert seen.steps == [StepTotal("a", 1, 7, 0.5, 1)]
    # Ranks that only came once are not listed as restarted.
    assert RankTotal(0, 1, 1) in seen.ranks
    assert all(not r.num_losses for r in seen.ranks if r.rank != 0)
    assert [(s.action, s.num_switches) for s in seen.switches] == [("load", 1)]
