"""Calls for models that are not awake, by the events of the pool."""

from __future__ import annotations

import math

import pytest

from tests.unit.controller_harness import ALICE, BOB, Harness, failed, hello, spec
from vllm_resident.controller import demand, outlook, usage
from vllm_resident.controller.effects import Effect, RecordTransition
from vllm_resident.controller.policy import Limits, Phase
from vllm_resident.messages import (
    BuildEngine,
    CallFailed,
    EngineAwake,
    EngineRefused,
    EngineSpec,
    ModelCalls,
    PrepareEngine,
    Progress,
    ReportCalls,
    ResumeEngine,
    ShutdownPool,
    SuspendEngine,
)


def pool(num_ranks: int = 1, *asleep: str, **limits: float | None) -> Harness:
    """A pool whose models are asleep on rank 0, and with so many ranks."""
    there = Harness(num_ranks)
    there.state.demand.default_limits = Limits(**{"max_wait_s": 120.0, **limits})  # type: ignore[arg-type]
    for name in asleep:
        there.load(EngineSpec(name, f"/models/{name}", [0], asleep=True))
        there.answer_all()
    return there


def declare(there: Harness, *specs: EngineSpec) -> None:
    there.state.models.update({each.name: each for each in specs})


def awake(there: Harness) -> set[str]:
    return {e.name for e in there.status().engines if e.phase == "ready"}


def told(there: Harness) -> set[int]:
    return {message.call for message in there.to_clients(EngineAwake)}


def refusal(there: Harness) -> EngineRefused:
    (refused,) = there.to_clients(EngineRefused)
    assert isinstance(refused, EngineRefused)
    return refused


def causes(there: Harness) -> list[tuple[str, str]]:
    return [
        (effect.report.action, effect.cause)
        for effect in there.effects
        if isinstance(effect, RecordTransition)
    ]


# ------------------------------------------------------------ bringing up


def test_a_sleeper_is_woken_for_its_first_caller() -> None:
    there = pool(1, "a")
    call = there.await_engine("a")
    assert there.to_ranks(ResumeEngine)
    assert there.status().waiting == {"a": 1}
    there.answer_all()
    assert told(there) == {call}
    assert causes(there) == [("wake_up", "on demand: 1 waiting, for up to 0.00 s")]
    assert there.status().waiting == {}


def test_all_who_wait_are_told_once() -> None:
    there = pool(1, "a")
    calls = {there.await_engine("a")}
    resumes = list(there.effects)
    calls |= {there.await_engine("a", BOB) for _ in range(3)}
    assert not there.to_ranks()
    there.effects = resumes
    there.answer_all()
    assert told(there) == calls
    assert not there.look(5.0) or not told(there)


def test_who_comes_for_one_that_is_awake_is_told_at_once() -> None:
    there = pool(1)
    engine = there.load_ready(spec("a"))
    call = there.await_engine("a")
    (answer,) = there.to_clients()
    assert answer == EngineAwake(call=call, generation=engine.generation)


def test_a_declared_model_is_loaded_on_a_free_rank() -> None:
    there = pool(2)
    there.load_ready(spec("b", [0]))
    declare(there, EngineSpec("a", "/models/a"))
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}
    assert there.engine("a").ranks == [1]
    assert awake(there) == {"a", "b"}


def test_a_switch_on_one_rank_is_in_nobodys_way_on_another() -> None:
    """What goes and what comes there are both on its rank for a while."""
    there = pool(2, "a")
    there.load_ready(spec("b", [0]))
    there.load_ready(spec("c", [1]))
    declare(there, EngineSpec("d", "/models/d", [1]))
    there.await_engine("a")
    assert there.to_ranks(SuspendEngine)  # b, which is not down yet
    switching = list(there.effects)
    call = there.await_engine("d")
    there.effects = [*switching, *there.effects]
    seen = [*there.answer_all(), *there.look(5.0)]
    there.effects = seen
    assert not there.to_clients(EngineRefused)
    assert call in told(there)
    assert awake(there) == {"a", "d"}


def test_a_declared_model_takes_the_place_of_an_idle_one() -> None:
    there = pool(1)
    there.load_ready(spec("b"))
    declare(there, EngineSpec("a", "/models/a", 1))
    call = there.await_engine("a")
    seen = [*there.answer_all(), *there.look(5.0)]
    there.effects = seen
    assert told(there) == {call}
    assert awake(there) == {"a"}
    assert there.engine("b").sleep_level == 1


def test_a_sleeper_whose_rank_is_busy_is_loaded_elsewhere() -> None:
    """Where its own rank is taken for long and loading is quick."""
    there = pool(2, "a")
    there.state.engines[1].spec = EngineSpec("a", "/models/a", 1)  # not bound
    there.state.demand.move_s["load"] = 0.1
    there.load_ready(spec("b", [0]))
    there.frontend_requests("b", 3)
    there.state.demand.min_residency_s = 60.0
    call = there.await_engine("a")
    seen = [*there.answer_all(), *there.look(2.0)]
    there.effects = seen
    assert told(there) == {call}
    assert there.engine("a").ranks == [1]
    assert awake(there) == {"a", "b"}
    assert [e.name for e in there.state.engines.values()].count("a") == 1


def test_an_unknown_model_says_what_there_is() -> None:
    there = pool(1, "b")
    declare(there, EngineSpec("c", "/models/c"))
    there.await_engine("a")
    refused = refusal(there)
    assert refused.is_unknown
    assert "['b', 'c']" in refused.reason
    assert there.state.demand.usages.keys() <= {"b", "c"}


def test_it_sleeps_again_when_an_operator_says_so_and_comes_when_called() -> None:
    there = pool(1)
    there.load_ready(spec("a"))
    there.sleep("a", level=2)
    there.answer_all()
    there.look(30.0)
    assert awake(there) == set()
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}


# ------------------------------------------------------------ whose turn it is


def test_busy_engines_keep_their_residency() -> None:
    """Two models called all the time on one rank: turns last."""
    there = pool(1, "a", "b")
    there.state.demand.min_residency_s = 2.0
    num_switches, longest_s = 0, 0.0
    for _ in range(160):
        seen: list[Effect] = []
        for name in ("a", "b"):
            there.await_engine(name)
            seen += there.answer_all()
        seen += there.look(0.25)
        for caller in list(there.state.demand.callers.values()):
            if caller.told_at is not None:
                longest_s = max(longest_s, caller.told_at - caller.arrived)
                there.end_await(caller.call)
                seen += there.answer_all()
        for engine in there.status().engines:
            there.frontend_requests(engine.name, int(engine.phase == "ready"))
            seen += there.answer_all()
        num_switches += sum(isinstance(effect, RecordTransition) for effect in seen)
    # In 40 seconds; first come, first served would be 320 switches.
    assert 10 <= num_switches <= 40
    assert longest_s < 5.0


def test_a_caller_counts_as_a_request_until_it_has_ended() -> None:
    """Between the answer and its arrival at the leader nobody may take the place."""
    there = pool(1, "a", "b")
    there.state.demand.min_residency_s = 3.0
    call = there.await_engine("a")
    there.answer_all()
    there.await_engine("b")
    there.look(2.0)
    assert awake(there) == {"a"}
    there.end_await(call)
    there.answer_all()
    there.look(1.0)
    assert awake(there) == {"b"}


def test_a_caller_that_never_ends_does_not_count_for_ever() -> None:
    there = pool(1, "a")
    there.await_engine("a")
    there.answer_all()
    there.look(outlook.TURN_S + 1)
    assert there.state.demand.callers == {}


def test_a_pinned_engine_stays() -> None:
    there = pool(1)
    there.load_ready(EngineSpec("p", "/models/p", [0], pinned=True))
    declare(there, EngineSpec("a", "/models/a"))
    there.await_engine("a")
    assert "pinned" in refusal(there).reason
    assert awake(there) == {"p"}


def test_drain_lets_requests_finish_first() -> None:
    there = pool(1, "a", "b")
    there.state.demand.min_residency_s = 0.5
    first = there.await_engine("a")
    there.answer_all()
    there.frontend_requests("a", 1)
    there.end_await(first)
    there.await_engine("b")
    there.look(10.0)
    assert there.row("a").phase == "draining"  # type: ignore[union-attr]
    assert not there.to_ranks(SuspendEngine)
    there.frontend_requests("a", 0)
    there.answer_all()
    assert awake(there) == {"b"}


def test_late_requests_at_the_leader_of_a_sleeper_wake_it() -> None:
    """They were on their way when it fell asleep: nobody announces them."""
    there = pool(1)
    there.load_ready(spec("a"))
    there.frontend_requests("a", 1)
    there.sleep("a")
    suspends = list(there.effects)
    there.frontend_requests("a", 0)  # what ran was aborted
    there.effects = suspends
    there.answer_all()
    there.look(5.0)
    assert awake(there) == set()
    there.frontend_requests("a", 2)
    there.answer_all()
    assert awake(there) == {"a"}
    assert causes(there) == [("wake_up", "on demand: 2 waiting, for up to 0.00 s")]


def held_by_a_sleeper(num_requests: int, **limits: float | None) -> Harness:
    """They met "a" awake and reached it when it slept; pinned "b" has its place."""
    there = pool(1, **limits)
    there.load_ready(spec("a"))
    there.sleep("a")
    there.answer_all()
    there.load_ready(EngineSpec("b", "/models/b", [0], pinned=True))
    there.frontend_requests("a", num_requests)
    return there


def test_one_that_a_leader_holds_is_refused_where_nothing_makes_room() -> None:
    there = held_by_a_sleeper(1)
    there.look(5.0)
    assert there.row("a").phase == "asleep"  # type: ignore[union-attr]
    there.await_engine("a", is_held=True)
    assert "no room" in refusal(there).reason
    assert there.state.demand.callers == {}


def test_one_that_a_leader_holds_is_in_the_queue_once() -> None:
    there = held_by_a_sleeper(2, max_queue=2, max_wait_s=500.0)
    there.state.engines[2].spec = spec("b")  # not pinned any more, and busy
    there.frontend_requests("b", 9)
    there.state.demand.min_residency_s = 60.0
    calls = [there.await_engine("a", waited_s=1.0, is_held=True) for _ in range(2)]
    assert not there.to_clients(EngineRefused)
    assert there.state.demand.usage("a").last_call == -math.inf
    view = outlook.draw(there.state, there.now)
    assert [len(m.queue) for m in view.models if m.name == "a"] == [2]
    there.await_engine("a")
    assert "max_queue" in refusal(there).reason
    there.state.demand.default_limits = Limits(max_wait_s=5.0)
    there.now += 4.5
    there.effects = there.pool.look_again(there.now)
    assert [m.call for m in there.to_clients(EngineRefused)] == calls


# ------------------------------------------------------------ what is refused


def test_max_queue() -> None:
    there = pool(1, "a", max_queue=2)
    for _ in range(2):
        there.await_engine("a")
        assert not there.to_clients(EngineRefused)
    there.await_engine("a")
    refused = refusal(there)
    assert "max_queue" in refused.reason
    assert refused.retry_after_s > 0
    assert not refused.is_unknown
    assert there.status().waiting == {"a": 2}


def test_max_wait_s_ends_the_waiting() -> None:
    there = pool(1, "a", max_wait_s=5.0)
    call = there.await_engine("a")  # the rank does not answer
    there.now += 4.9
    assert not there.pool.tick(there.now)[1:]
    there.now = 100.0 + 5.01
    there.effects = there.pool.look_again(there.now)
    refused = refusal(there)
    assert (refused.call, "max_wait_s" in refused.reason) == (call, True)
    assert there.state.demand.callers == {}


def test_what_was_waited_before_counts() -> None:
    there = pool(1, "a", max_wait_s=5.0)
    there.await_engine("a")
    second = there.await_engine("a", waited_s=4.0)
    there.now += 1.5
    there.effects = there.pool.tick(there.now)
    assert refusal(there).call == second


def test_a_model_that_would_take_too_long_is_refused_at_once() -> None:
    there = pool(1, max_wait_s=1.0)
    declare(there, EngineSpec("a", "/models/a"))
    there.await_engine("a")
    assert "would wait about" in refusal(there).reason


def test_a_starting_pool_says_so() -> None:
    there = Harness(2, num_ready=1)
    declare(there, EngineSpec("a", "/models/a"))
    there.await_engine("a")
    assert "1 of 2 ranks" in refusal(there).reason
    there.rank(hello(1, 2))
    there.await_engine("a")
    assert there.to_ranks(PrepareEngine)


@pytest.mark.parametrize("waited_s", [-1.0, math.nan, math.inf])
def test_nonsense_is_not_believed(waited_s: float) -> None:
    there = pool(1, "a")
    there.await_engine("a", waited_s=waited_s)
    (caller,) = there.state.demand.callers.values()
    assert caller.arrived == there.now
    calls = {"a": ModelCalls(-1, 1, math.nan), "nobody": ModelCalls(5, 5, 5.0)}
    there.client(ReportCalls(call=99, models=calls))
    assert there.state.demand.usage("a").service_s == 0.0
    assert "nobody" not in there.state.demand.usages


# ------------------------------------------------------------ failures


def test_a_bring_up_that_fails_is_told_and_not_tried_at_once_again() -> None:
    there = pool(1)
    declare(there, EngineSpec("a", "/models/a"))
    waits: list[float] = []
    for _ in range(4):
        there.await_engine("a")
        engine = there.engine("a")
        there.rank(failed(0, engine.generation))
        there.answer_all()
        assert "RankFailure on rank 0" in refusal(there).reason
        waits.append(refusal(there).retry_after_s)
        there.await_engine("a")
        assert not there.to_ranks()
        assert "could not be brought up" in refusal(there).reason
        there.look(waits[-1])
        assert "a" not in [e.name for e in there.state.engines.values()]
    assert waits == [1.0, 2.0, 4.0, 8.0]
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}


def test_a_wake_up_that_fails_is_told() -> None:
    there = pool(1, "a")
    there.await_engine("a")
    there.rank(failed(0, there.engine("a").generation))
    there.answer_all()
    assert "RankFailure" in refusal(there).reason
    # The way back has loaded it anew, asleep; later it can be called.
    there.look(2.0)
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}


def test_a_model_that_failed_says_so_at_once() -> None:
    """One that nobody declared: it must be loaded again."""
    there = pool(1)
    engine = there.load_ready(spec("a"))
    there.rank(failed(0, engine.generation, "RankDiverged", phase="step"))
    there.answer_all()
    there.look(100.0)
    there.await_engine("a")
    assert "must be loaded again" in refusal(there).reason
    assert not refusal(there).is_unknown


def test_a_declared_model_that_failed_is_loaded_again_after_a_while() -> None:
    there = pool(1)
    declare(there, EngineSpec("a", "/models/a"))
    there.await_engine("a")
    there.answer_all()
    engine = there.engine("a")
    there.rank(failed(0, engine.generation, "RankDiverged", phase="step"))
    there.answer_all()
    there.await_engine("a")
    assert "RankDiverged" in refusal(there).reason
    there.look(1.1)
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}


def test_a_lost_model_is_waited_for() -> None:
    there = pool(1)
    there.load_ready(spec("a"))
    there.kill(0)
    call = there.await_engine("a")
    assert not there.to_clients(EngineRefused)
    there.rank(hello(0, 1, pid=2000, incarnation=1))
    there.answer_all()
    assert told(there) == {call}


def test_a_lost_rank_in_the_middle_of_it() -> None:
    there = pool(1, "a")
    call = there.await_engine("a")
    there.kill(0)
    assert refusal(there).call == call
    there.rank(hello(0, 1, pid=2000, incarnation=1))
    there.answer_all()
    there.look(2.0)
    again = there.await_engine("a")
    there.answer_all()
    assert told(there) == {again}


def test_a_model_that_is_unloaded_under_its_callers_is_unknown() -> None:
    there = pool(1, "a", "b")
    there.unload("a")
    closes = list(there.effects)
    call = there.await_engine("a")
    assert there.status().waiting == {"a": 1}
    there.effects = closes
    there.answer_all()
    assert refusal(there).call == call
    assert refusal(there).is_unknown


# ------------------------------------------------------------ who goes


def test_a_caller_that_leaves_is_not_waited_for() -> None:
    there = pool(1, "a", "b")
    first = there.await_engine("a")
    there.answer_all()
    call = there.await_engine("b")
    there.end_await(call)
    there.end_await(first)
    there.look(10.0)
    assert awake(there) == {"a"}
    assert there.status().waiting == {}


def test_a_client_that_is_gone_is_forgotten() -> None:
    there = pool(1, "a", "b")
    there.await_engine("a")
    there.answer_all()
    there.await_engine("b", BOB)
    there.pool.client_gone(BOB)
    there.look(10.0)
    assert awake(there) == {"a"}


def test_who_waits_hears_that_the_pool_is_alive() -> None:
    there = pool(1, "a")
    call = there.await_engine("a")
    there.now += demand.PROGRESS_INTERVAL_S
    there.effects = there.pool.tick(there.now)
    (progress,) = there.to_clients(Progress)
    assert progress.call == call


def test_a_call_number_is_used_once() -> None:
    there = pool(1, "a")
    call = there.await_engine("a")
    there.calls -= 1
    there.await_engine("a")
    assert f"call number {call} is in use" in there.error().message


def test_a_stopping_pool_tells_who_waits() -> None:
    there = pool(1, "a")
    there.await_engine("a")
    there.client(ShutdownPool(call=77, timeout_s=5.0), BOB)
    assert len(there.to_clients(CallFailed)) == 1
    there.await_engine("a")
    assert "stopping" in there.error().message


def test_a_stopping_pool_has_nothing_to_decide() -> None:
    """Else the service would look for it without a pause until the stop ends."""
    there = pool(2, "a", idle_ttl_s=5.0)
    there.load_ready(spec("b", [1]))
    there.look(1.0)
    assert there.now <= there.pool.look_again_at < math.inf
    there.client(ShutdownPool(call=77, timeout_s=60.0), BOB)
    there.tick(10.0)
    assert there.pool.look_again_at == math.inf


# ------------------------------------------------------------ idle engines


def test_idle_ttl_s_puts_to_sleep_who_is_not_called() -> None:
    there = pool(1, idle_ttl_s=5.0)
    there.load_ready(spec("a"))
    there.frontend_requests("a", 1)
    there.look(20.0)
    assert awake(there) == {"a"}
    there.frontend_requests("a", 0)
    there.look(4.5)
    assert awake(there) == {"a"}
    there.look(1.0)
    assert awake(there) == set()
    assert causes(there)[-1] == ("sleep", "on demand: idle for 5 s")
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}


def test_a_pinned_engine_and_one_without_a_limit_stay_up() -> None:
    there = pool(2)
    there.state.demand.limits["p"] = Limits(idle_ttl_s=1.0)
    there.load_ready(EngineSpec("p", "/models/p", [0], pinned=True))
    there.load_ready(spec("a", [1]))
    there.look(60.0)
    assert awake(there) == {"a", "p"}


def test_one_that_cannot_fall_asleep_is_not_asked_all_the_time() -> None:
    there = pool(1, idle_ttl_s=1.0)
    engine = there.load_ready(spec("a"))
    asked = 0
    for _ in range(100):
        there.heartbeats()
        there.effects += there.pool.tick(there.now)
        there.now += 0.25
        for rank, _ in there.to_ranks(SuspendEngine):
            asked += 1
            there.rank(failed(rank, engine.generation, "CommandRejected"))
    assert 1 <= asked <= 5


# ------------------------------------------------------------ beside commands


def test_a_command_meets_a_bring_up_as_it_meets_any_switch() -> None:
    there = pool(1, "a")
    call = there.await_engine("a")
    resumes = list(there.effects)
    there.sleep("a")
    assert "is waking up" in there.error().message
    there.effects = resumes
    there.answer_all()
    assert told(there) == {call}


def test_a_bring_up_waits_for_a_command() -> None:
    there = pool(1, "a", "b")
    there.wake_up("b")
    resumes = list(there.effects)
    call = there.await_engine("a")
    assert not there.to_ranks()
    there.effects = resumes
    seen = [*there.answer_all(), *there.look(5.0)]
    there.effects = seen
    assert told(there) == {call}


def test_an_engine_loaded_asleep_is_in_nobodys_way() -> None:
    there = pool(1, "a")
    there.load(EngineSpec("b", "/models/b", [0], asleep=True))
    builds = list(there.effects)
    call = there.await_engine("a")
    there.answer_all()
    assert told(there) == {call}
    there.effects = builds
    there.answer_all()
    assert awake(there) == {"a"}


# ------------------------------------------------------------ what is learned


def test_moves_teach_what_they_cost() -> None:
    there = pool(1)
    there.load(spec("a"))
    there.now += 2.0  # the ranks take their time
    there.answer_all()
    there.load(EngineSpec("b", "/models/b", [0], asleep=True))
    there.answer_all()
    known = usage.costs(there.state.demand, "a")
    assert known.load_s == pytest.approx(2.0)
    # One that has not been loaded: as the others.
    assert 1.0 < usage.costs(there.state.demand, "c").load_s < 2.0
    assert known.wake_up_s[1] == usage.GUESSED_S["wake_up 1"]


def test_reports_teach_how_often_a_model_is_called() -> None:
    there = pool(1)
    there.load_ready(spec("a"))
    for _ in range(20):
        there.now += 1.0
        calls = {"a": ModelCalls(num_begun=10, num_ended=10, service_s=5.0)}
        there.client(ReportCalls(call=0, models=calls))
        assert there.effects == []
    known = there.state.demand.usage("a")
    assert known.gap_s == pytest.approx(0.1)
    assert known.service_s == pytest.approx(0.5)
    (model,) = outlook.draw(there.state, there.now).models
    assert (model.phase, model.gap_s) == (Phase.AWAKE, known.gap_s)


def test_what_was_learned_of_models_that_are_gone_is_forgotten() -> None:
    there = pool(1)
    for number in range(5):
        there.load_ready(spec(f"m{number}"))
        there.unload(f"m{number}")
        there.answer_all()
    assert there.state.demand.usages == {}


def test_failures_far_apart_do_not_add_up() -> None:
    known = usage.Usage()
    for at in (0.0, 1.0, 2.0):
        usage.note_failure(known, "no", at)
    assert known.retry_at == 2.0 + 4.0
    usage.note_failure(known, "no", 2.0 + usage.RESET_S + 1)
    assert known.retry_at == 3.0 + usage.RESET_S + usage.BACK_OFF_S


def test_nobody_is_asked_while_nobody_waits() -> None:
    there = pool(1, "a")
    there.look(10.0)
    assert there.pool.look_again_at == math.inf
    assert not there.to_ranks(BuildEngine)
    assert there.state.demand.callers == {}
    assert ALICE not in there.state.demand.usages
