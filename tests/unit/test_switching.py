"""Sleep, wake and switches: either they happen, or all is as it was."""

from __future__ import annotations

import itertools

import pytest

from tests.unit.controller_harness import (
    ALICE,
    WEIGHTS,
    Harness,
    answer,
    failed,
    hello,
    spec,
)
from vllm_resident.controller.effects import RecordTransition, SendToRank
from vllm_resident.controller.state import EnginePhase
from vllm_resident.messages import (
    AbortRequest,
    AddRequest,
    BuildEngine,
    CallFailed,
    CloseEngine,
    Completion,
    DropEngine,
    EngineSpec,
    GenerateOutput,
    PrepareEngine,
    RequestOutput,
    ResumeEngine,
    SuspendEngine,
    SwitchDone,
)

STOP = Completion(0, 0, "x", [1], "stop")


def asleep(harness: Harness, wanted: EngineSpec, level: int = 1) -> None:
    harness.load_ready(wanted)
    harness.sleep(wanted.name, level)
    harness.answer_all()


def phases(harness: Harness) -> dict[str, str]:
    return {e.name: e.phase for e in harness.status().engines}


def finish_requests(harness: Harness) -> None:
    for request in list(harness.state.requests.values()):
        leader = harness.state.engines[request.generation].leader
        harness.rank(
            RequestOutput(
                rank=leader, generation=request.generation, request=request.number,
                completions=[STOP], done=True,
            )
        )  # fmt: skip


# ------------------------------------------------------------ sleep and wake


def test_sleep_and_wake():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.sleep("a")
    assert harness.to_ranks(SuspendEngine) == [
        (rank, SuspendEngine(generation=1, level=1, timeout_s=60.0)) for rank in (0, 1)
    ]
    harness.answer_all()
    (done,) = harness.to_clients(SwitchDone)
    (report,) = done.report.engines
    assert (report.action, report.sleep_level) == ("sleep", 1)
    assert report.rank_phases == {0: {"stop": 0.01}, 1: {"stop": 0.01}}
    row = harness.row("a")
    assert (row.phase, row.sleep_level) == ("asleep", 1)
    assert row.memory[0].host_bytes == WEIGHTS
    harness.wake_up("a")
    harness.answer_all()
    assert harness.to_clients(SwitchDone)[0].report.path == ["wake_up"]
    row = harness.row("a")
    assert (row.phase, row.sleep_level, row.generation) == ("ready", 0, 1)


def test_a_sleeper_leaves_its_ranks_to_others():
    harness = Harness(2)
    asleep(harness, spec("a", [0, 1]))
    harness.load_ready(spec("b", [0]))
    harness.load_ready(spec("c", [1]))
    harness.wake_up("a")
    harness.answer_all()
    assert phases(harness) == {"a": "ready", "b": "asleep", "c": "asleep"}
    # And back: what is in the way goes to sleep.
    harness.wake_up("b")
    harness.answer_all()
    assert phases(harness) == {"a": "asleep", "b": "ready", "c": "asleep"}


def test_level_1_goes_deeper_and_not_back():
    harness = Harness()
    asleep(harness, spec("a"))
    harness.sleep("a", 2)
    harness.answer_all()
    assert harness.row("a").sleep_level == 2
    assert harness.row("a").memory[0].host_bytes == 0
    before = harness.snapshot()
    harness.sleep("a", 1)
    assert "wake it up" in harness.error().message
    assert harness.state == before


@pytest.mark.parametrize("level", [1, 2])
def test_sleeping_twice_and_waking_twice_change_nothing(level):
    harness = Harness()
    asleep(harness, spec("a"), level)
    harness.sleep("a", level)
    (done,) = harness.to_clients()
    assert done.report.kept == ["a"]
    harness.wake_up("a")
    harness.answer_all()
    harness.wake_up("a")
    (done,) = harness.to_clients()
    assert done.report.kept == ["a"]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda h: h.sleep("nope"), "no engine 'nope'"),
        (lambda h: h.sleep("a", 3), "level 3"),
        (lambda h: h.sleep("a", 1, drain_s=-1), "drain_s"),
        (lambda h: h.wake_up("nope"), "no engine"),
        (lambda h: h.switch("b", spec("c")), "is asleep"),
        (lambda h: h.switch("a", EngineSpec("a")), "old and new are the same"),
        (lambda h: h.switch("a", EngineSpec("new")), "declares none of that name"),
        (lambda h: h.switch("a", EngineSpec("awake")), "is awake already"),
        (lambda h: h.switch("a", spec("new", [3])), "rank 3 is taken"),
        (lambda h: h.generate("b"), "wake it up"),
        (lambda h: h.load(spec("new", [3])), "is taken by engine 'awake'"),
    ],
)
def test_rejected_commands_change_nothing(act, says):
    harness = Harness()
    asleep(harness, spec("b", [0]))
    harness.load_ready(spec("a", [0]))
    harness.load_ready(spec("awake", [3]))
    before = harness.snapshot()
    before.now = harness.now
    act(harness)
    assert says in harness.error().message
    assert harness.error().kind == "CommandRejected"
    assert harness.state == before


def test_pinned_engine_does_not_make_way():
    harness = Harness(1)
    asleep(harness, spec("a"))
    pinned = EngineSpec("p", "/models/p", None, {}, pinned=True)
    harness.load_ready(pinned)
    harness.wake_up("a")
    assert "'p' (pinned)" in harness.error().message
    assert phases(harness) == {"a": "asleep", "p": "ready"}


def test_engine_loaded_asleep_needs_no_room():
    harness = Harness(1)
    harness.load_ready(spec("a"))
    harness.load(EngineSpec("b", "/models/b", [0], {}, asleep=True))
    harness.answer_all()
    assert harness.to_clients(SwitchDone)
    assert phases(harness) == {"a": "ready", "b": "asleep"}


def test_engines_of_several_ranks_that_share_one_need_the_same_leader():
    harness = Harness(3)
    harness.state.awake_per_rank = 2
    harness.load_ready(spec("a", [0, 1]))
    harness.load_ready(spec("one", [2]))
    harness.load(spec("c", [1, 2]))
    assert "not their first rank" in harness.error().message
    harness.load_ready(spec("d", [0, 2]))
    harness.load(spec("e", [0]))
    assert "rank 0 is taken by engine 'a' (ready), 'd' (ready)" in (
        harness.error().message
    )


# ------------------------------------------------------------ requests


def test_requests_in_flight_may_finish_and_new_ones_are_held():
    harness = Harness()
    harness.load_ready(spec("a"))
    harness.generate("a")
    harness.sleep("a", drain_s=10)
    assert harness.row("a").phase == "draining"
    assert not harness.to_ranks(SuspendEngine)
    held = harness.generate("a")
    assert not harness.to_ranks(AddRequest)
    finish_requests_of(harness, held=False)
    assert harness.to_ranks(SuspendEngine)
    harness.answer_all()
    # The engine sleeps: what was held for it is refused, plainly.
    refused = harness.to_clients(CallFailed)
    assert [each.call for each in refused] == [held]
    assert "asleep" in refused[0].error.message
    assert not harness.state.requests


def finish_requests_of(harness: Harness, *, held: bool) -> None:
    for request in list(harness.state.requests.values()):
        if (request.held is not None) is held:
            engine = harness.state.engines[request.generation]
            harness.rank(
                RequestOutput(
                    rank=engine.leader, generation=engine.generation,
                    request=request.number, completions=[STOP], done=True,
                )
            )  # fmt: skip


def test_what_does_not_finish_in_time_is_aborted_by_the_leader():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = harness.generate("a")
    harness.sleep("a", drain_s=5)
    harness.tick(4)
    harness.heartbeats()
    assert not harness.to_ranks(SuspendEngine)
    harness.tick(1.5)
    ((_, suspend),) = harness.to_ranks(SuspendEngine)
    assert suspend.finish_s == 0.0
    # The leader's last words of it, before it says that it sleeps.
    aborted = Completion(0, 0, "x", [1], "abort")
    harness.rank(
        RequestOutput(rank=0, generation=1, request=1, completions=[aborted], done=True)
    )
    (output,) = harness.to_clients(GenerateOutput)
    assert (output.call, output.completions[0].finish_reason) == (call, "abort")


def test_what_came_when_it_was_thought_idle_may_finish_too():
    """A frontend's request is on its way to the leader, which knows nothing of the
    controller's decision: it has the rest of the draining time."""
    harness = Harness()
    harness.load_ready(spec("a"))
    harness.frontend_requests("a", 1)
    harness.sleep("a", drain_s=5)
    harness.tick(2.0)
    harness.frontend_requests("a", 0)
    ((_, suspend),) = harness.to_ranks(SuspendEngine)
    assert suspend.finish_s == 3.0


def test_what_is_held_is_served_after_waking():
    harness = Harness()
    asleep(harness, spec("a"))
    harness.wake_up("a")
    held = harness.generate("a")
    assert not harness.to_ranks(AddRequest)
    harness.rank(answer(0, ResumeEngine(generation=1, timeout_s=1)))
    ((rank, added),) = harness.to_ranks(AddRequest)
    assert (rank, harness.state.requests[added.request].call) == (0, held)


def test_cancelled_while_held():
    harness = Harness()
    asleep(harness, spec("a"))
    harness.wake_up("a")
    call = harness.generate("a")
    effects = harness.pool.client_gone(b"\x00alice")
    assert not [e for e in effects if isinstance(e, SendToRank)]
    assert call
    assert not harness.state.requests
    harness.rank(answer(0, ResumeEngine(generation=1, timeout_s=1)))
    assert not harness.to_ranks(AddRequest)
    assert not harness.to_ranks(AbortRequest)


# ------------------------------------------------------------ switch


def test_switch_between_sleepers():
    harness = Harness(1)
    asleep(harness, spec("b"))
    harness.load_ready(spec("a"))
    harness.switch("a", EngineSpec("b"))
    seen = [type(e.message) for e in harness.answer_all() if isinstance(e, SendToRank)]
    assert seen == [SuspendEngine, ResumeEngine]
    (done,) = harness.to_clients(SwitchDone)
    assert done.report.path == ["sleep", "wake_up"]
    assert phases(harness) == {"b": "ready", "a": "asleep"}
    (record,) = [e for e in harness.effects if isinstance(e, RecordTransition)]
    assert record.cause == f"switch, client {ALICE.hex()}"
    assert record.report == done.report


def test_staged_switch_serves_until_the_new_one_is_there():
    harness = Harness(1)
    harness.load_ready(spec("a"))
    harness.switch("a", spec("b"), strategy="stage")
    harness.rank(answer(0, harness.to_ranks(PrepareEngine)[0][1]))
    assert harness.to_ranks(BuildEngine)
    assert harness.row("a").phase == "ready"
    harness.rank(answer(0, harness.to_ranks(BuildEngine)[0][1]))
    ((_, to_sleep),) = harness.to_ranks(SuspendEngine)
    assert to_sleep.generation == 2
    assert harness.row("a").phase == "ready"
    harness.rank(answer(0, to_sleep))
    ((_, to_sleep),) = harness.to_ranks(SuspendEngine)
    assert to_sleep.generation == 1
    harness.answer_all()
    (done,) = harness.to_clients(SwitchDone)
    assert done.report.path == ["stage", "sleep", "wake_up"]
    assert phases(harness) == {"a": "asleep", "b": "ready"}


def test_switch_that_unloads_first():
    harness = Harness(1)
    harness.load_ready(spec("a"))
    harness.switch("a", spec("b"), strategy="unload")
    seen = [type(e.message) for e in harness.answer_all() if isinstance(e, SendToRank)]
    assert seen == [PrepareEngine, CloseEngine, BuildEngine]
    assert phases(harness) == {"b": "ready"}


COMMANDS = {
    "load": lambda h: h.load(spec("new", [2])),
    "sleep": lambda h: h.sleep("a"),
    "sleep_2": lambda h: h.sleep("a", 2),
    "deepen": lambda h: h.sleep("s", 2),
    "wake_up": lambda h: h.wake_up("s"),
    "switch": lambda h: h.switch("a", EngineSpec("s")),
    "switch_load": lambda h: h.switch("a", spec("new", [0, 1])),
    "unload_first": lambda h: h.switch("a", spec("new", [0, 1]), strategy="unload"),
    "stage": lambda h: h.switch("a", spec("new", [0, 1]), strategy="stage"),
    "apply": lambda h: h.apply(spec("new", [0, 1]), spec("k", [3])),
    "apply_many": lambda h: h.apply(
        spec("n0", [0]), spec("n1", [1]), spec("k", [3])
    ),
}  # fmt: skip


def _prepared_pool() -> Harness:
    """ "a" serves on 0 and 1, "s" sleeps there, "k" serves on 3."""
    harness = Harness(4)
    asleep(harness, spec("s", [0, 1]))
    harness.load_ready(spec("a", [0, 1]))
    harness.load_ready(spec("k", [3]))
    return harness


def _asked_of_ranks(name: str) -> int:
    """How many commands the ranks get where all goes well."""
    harness = _prepared_pool()
    COMMANDS[name](harness)
    effects = harness.answer_all()
    assert harness.to_clients(SwitchDone), harness.to_clients()
    return sum(isinstance(e, SendToRank) for e in effects)


@pytest.mark.parametrize("name", COMMANDS)
def test_failure_at_each_command_of_a_switch_changes_nothing(name):
    """Whichever command fails on whichever rank, the engines are as they were."""
    before = phases(_prepared_pool())
    for nth in range(_asked_of_ranks(name)):
        harness = _prepared_pool()
        COMMANDS[name](harness)
        _answer_but(harness, nth)
        answers = harness.to_clients((SwitchDone, CallFailed))
        assert [type(each) for each in answers] == [CallFailed], (nth, answers)
        # A release that is not proven comes after the commit: told, not undone.
        if answers[0].error.kind != "ReleaseIncomplete":
            assert phases(harness) == before, (nth, answers)
        assert not harness.state.switches
        assert not any(e.waiting for e in harness.state.engines.values())


def _answer_but(harness: Harness, nth: int) -> None:
    """As `answer_all`, with a failure for the nth command to a rank."""
    counter = itertools.count()
    pending, seen = list(harness.effects), []
    while pending:
        effect = pending.pop(0)
        seen.append(effect)
        if not isinstance(effect, SendToRank):
            continue
        reply = answer(effect.rank, effect.message)
        if reply is None:
            continue
        if next(counter) == nth:
            is_close = isinstance(effect.message, CloseEngine)
            kind = "ReleaseIncomplete" if is_close else "RankFailure"
            reply = failed(effect.rank, effect.message.generation, kind)
        pending.extend(harness.rank(reply))
    harness.effects = seen


@pytest.mark.parametrize("name", ["switch", "switch_load", "stage", "wake_up", "apply"])
def test_rank_lost_at_each_command_comes_back_to_the_layout(name):
    before = phases(_prepared_pool())
    for nth in range(_asked_of_ranks(name)):
        harness = _prepared_pool()
        COMMANDS[name](harness)
        _kill_at(harness, nth)
        (end,) = harness.to_clients((SwitchDone, CallFailed))
        harness.rank(hello(1, 4, pid=3000, incarnation=1))
        harness.answer_all()
        assert not harness.state.switches
        if isinstance(end, CallFailed):
            assert phases(harness) == before, (nth, end.error)
        else:
            assert "go_back" not in end.report.path, nth


def _kill_at(harness: Harness, nth: int) -> None:
    counter = itertools.count()
    pending, seen, dead = list(harness.effects), [], False
    while pending:
        effect = pending.pop(0)
        seen.append(effect)
        if not isinstance(effect, SendToRank) or (dead and effect.rank == 1):
            continue
        reply = answer(effect.rank, effect.message)
        if reply is None:
            continue
        if next(counter) == nth:
            dead = True
            pending.extend(harness.kill(1))
            if effect.rank == 1:
                continue
        pending.extend(harness.rank(reply))
    harness.effects = seen


def _lose_while_another_builds(harness: Harness) -> None:
    harness.apply(spec("a", [0]), spec("b", [1]))
    for rank, message in harness.to_ranks(PrepareEngine):
        harness.rank(answer(rank, message))
    harness.rank(answer(0, BuildEngine(generation=1, timeout_s=1)))
    harness.kill(0)


def _lose_while_it_falls_asleep(harness: Harness) -> None:
    harness.load(EngineSpec("a", "/models/a", [0], {}, asleep=True))
    for kind in (PrepareEngine, BuildEngine):
        harness.rank(answer(0, harness.to_ranks(kind)[0][1]))
    harness.kill(0)


def _lose_what_is_staged(harness: Harness) -> None:
    harness.load_ready(spec("old", [1]))
    harness.generate("old")
    harness.switch("old", spec("a", [0]), strategy="stage", drain_s=10)
    for kind in (PrepareEngine, BuildEngine, SuspendEngine):
        harness.rank(answer(0, harness.to_ranks(kind)[0][1]))
    assert harness.row("old").phase == "draining"
    harness.kill(0)


@pytest.mark.parametrize(
    "lose",
    [_lose_while_another_builds, _lose_while_it_falls_asleep, _lose_what_is_staged],
)
def test_switch_undone_for_a_lost_rank_says_so(lose):
    """What it brought is gone again with its error; the switch is not done for that."""
    harness = Harness(2)
    lose(harness)
    effects = harness.answer_all()
    (end,) = harness.to_clients((SwitchDone, CallFailed))
    assert isinstance(end, CallFailed)
    assert (end.error.kind, end.error.rank) == ("RankLost", 0)
    (record,) = [e for e in effects if isinstance(e, RecordTransition)]
    assert "rank 0" in record.report.error
    assert not harness.state.switches


def _break_while_going(harness: Harness, *, is_loss: bool) -> None:
    """While `a` is to be unloaded rank 0 reports its broken collective; then rank 1
    turns out dead, or drops."""
    harness.load_ready(spec("a", [0, 1]))
    harness.generate("a")
    harness.unload("a", drain_s=30)
    harness.rank(failed(0, 1, phase="step"))
    drops = dict(harness.to_ranks(DropEngine))
    harness.rank(answer(0, drops[0]))
    if is_loss:
        harness.kill(1)
    else:
        harness.rank(answer(1, drops[1]))
    harness.answer_all()


def test_unload_goes_on_when_a_death_is_heard_of_through_a_peer_first():
    harness = Harness(2)
    _break_while_going(harness, is_loss=True)
    answers = harness.to_clients((SwitchDone, CallFailed))
    assert [type(each) for each in answers] == [CallFailed, SwitchDone]
    harness.rank(hello(1, 2, pid=3000, incarnation=1))
    harness.answer_all()
    assert not harness.status().engines


def test_unload_of_what_breaks_by_itself_turns_back():
    harness = Harness(2)
    _break_while_going(harness, is_loss=False)
    assert harness.to_clients(CallFailed)[-1].error.kind == "RankFailure"
    assert phases(harness) == {"a": "ready"}


def test_level_its_ranks_refuse_changes_nothing():
    """Weights that were made up cannot be read again: no level 2, and no loss."""
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.sleep("a", 2)
    harness.generate("a")
    harness.rank(failed(0, 1, "CommandRejected"))
    assert not harness.to_clients(CallFailed)
    harness.rank(failed(1, 1, "CommandRejected"))
    (refused,) = harness.to_clients(CallFailed)
    assert "CommandRejected on rank 1" in refused.error.message
    assert phases(harness) == {"a": "ready"}
    assert harness.engine("a").generation == 1
    assert harness.to_ranks(AddRequest)


@pytest.mark.parametrize("first", [0, 1])
def test_level_that_one_rank_refuses_and_another_does_not_breaks_the_engine(first):
    """One would sleep and the other not: it is built anew, as after any failure."""
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.sleep("a", 1)
    replies = [
        failed(0, 1, "CommandRejected"),
        answer(1, SuspendEngine(generation=1, level=1, timeout_s=1.0)),
    ]
    harness.rank(replies[first])
    assert not harness.to_ranks()
    harness.rank(replies[1 - first])
    assert [rank for rank, _ in harness.to_ranks(DropEngine)] == [0, 1]
    harness.answer_all()
    (call,) = harness.to_clients(CallFailed)
    assert call.error.kind == "RankFailure"
    assert "CommandRejected on rank 0" in call.error.message
    assert phases(harness) == {"a": "ready"}
    assert harness.engine("a").generation == 2


def test_what_cannot_be_brought_back_is_named():
    harness = Harness(1)
    harness.load_ready(spec("a"))
    harness.switch("a", spec("b"), strategy="unload")
    harness.rank(answer(0, harness.to_ranks(PrepareEngine)[0][1]))
    harness.rank(answer(0, harness.to_ranks(CloseEngine)[0][1]))
    harness.rank(failed(0, 2))
    pending = harness.answer_all(skip=(0,))
    del pending
    # Rank 0 drops what it built, then refuses to prepare "a" anew.
    engine = harness.state.engines[2]
    harness.rank(answer(0, CloseEngine(generation=engine.generation, timeout_s=1)))
    ((_, prepare),) = harness.to_ranks(PrepareEngine)
    harness.rank(failed(0, prepare.generation))
    harness.answer_all()
    error = harness.error()
    assert "could not be brought back: a:" in error.message
    assert harness.row("a").phase == EnginePhase.FAILED.value


# ------------------------------------------------------------ layouts


def test_layout_with_sleepers():
    harness = Harness(2)
    harness.load_ready(spec("a", [0, 1]))
    sleeper = EngineSpec("a", "/models/a", [0, 1], {}, asleep=True)
    harness.apply(sleeper, spec("b", [0]), spec("c", [1]))
    harness.answer_all()
    assert phases(harness) == {"a": "asleep", "b": "ready", "c": "ready"}
    harness.apply(spec("a", [0, 1]))
    harness.answer_all()
    (done,) = harness.to_clients(SwitchDone)
    assert done.report.path == ["sleep", "wake_up", "unload"]
    assert phases(harness) == {"a": "ready"}
    assert harness.engine("a").generation == 1


@pytest.mark.parametrize("was_pinned", [True, False])
@pytest.mark.parametrize("is_done", [True, False])
def test_layout_pins_when_it_is_there(was_pinned, is_done):
    """Until then what was pinned stays so, and what is to be is not moved any more."""
    harness = Harness(2)
    harness.load_ready(EngineSpec("a", "/models/a", [0], {}, pinned=was_pinned))
    kept = EngineSpec("a", "/models/a", [0], {}, pinned=not was_pinned)
    harness.apply(kept, spec("b", [1]))
    assert harness.row("a").pinned
    if is_done:
        harness.answer_all()
        assert harness.to_clients(SwitchDone)
    else:
        harness.rank(failed(1, 2, "CommandRejected"))
        harness.answer_all()
        assert harness.error().kind == "CommandRejected"
    assert harness.row("a").pinned is (was_pinned is not is_done)


def test_lost_sleeper_comes_back_asleep():
    harness = Harness(2)
    asleep(harness, spec("a", [0, 1]))
    harness.load_ready(spec("b", [0]))
    harness.kill(1)
    harness.answer_all()
    assert phases(harness) == {"a": "lost", "b": "ready"}
    harness.rank(hello(1, 2, pid=3000, incarnation=1))
    harness.answer_all()
    assert phases(harness) == {"a": "asleep", "b": "ready"}
