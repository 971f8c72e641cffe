"""The controller's state machine, event by event: effects and whole state."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.unit.controller_harness import (
    ALICE,
    BOB,
    GAUGES,
    Harness,
    answer,
    failed,
    hello,
    spec,
)
from vllm_resident.controller.effects import StopController, WatchProcess
from vllm_resident.controller.state import (
    ENGINE_TRANSITIONS,
    RANK_TRANSITIONS,
    SWITCH_TRANSITIONS,
    EnginePhase,
    IllegalTransition,
    RankPhase,
    SwitchStage,
    move_engine,
    move_rank,
    move_switch,
)
from vllm_resident.errors import ErrorInfo, ProtocolError
from vllm_resident.messages import (
    AbortRequest,
    AddRequest,
    BuildEngine,
    CallFailed,
    CancelGenerate,
    CloseEngine,
    Completion,
    DropCommunicators,
    DropEngine,
    EngineClosed,
    EnginePrepared,
    EngineSpec,
    ExitRank,
    Generate,
    GenerateOutput,
    Heartbeat,
    HeartbeatAck,
    HelloAgain,
    LoadEngine,
    PhaseStarted,
    PoolStopped,
    PrepareEngine,
    Progress,
    RequestFailed,
    RequestOutput,
    ShutdownPool,
    SuspendEngine,
    SwitchDone,
    Welcome,
)


def ranks_sent(harness: Harness, kind: type) -> list[int]:
    return [rank for rank, _ in harness.to_ranks(kind)]


# ------------------------------------------------------------ tables


@pytest.mark.parametrize("old", EnginePhase)
@pytest.mark.parametrize("new", EnginePhase)
def test_engine_moves_only_along_its_table(old, new):
    harness = Harness()
    engine = harness.load_ready(spec("a"))
    engine.phase = old
    before = harness.snapshot()
    if new in ENGINE_TRANSITIONS[old]:
        move_engine(harness.state, engine, new, harness.now)
        assert engine.phase is new
    else:
        with pytest.raises(IllegalTransition):
            move_engine(harness.state, engine, new, harness.now)
        assert harness.state == before


@pytest.mark.parametrize("old", RankPhase)
@pytest.mark.parametrize("new", RankPhase)
def test_rank_moves_only_along_its_table(old, new):
    harness = Harness()
    rank = harness.state.ranks[0]
    rank.phase = old
    before = harness.snapshot()
    if new in RANK_TRANSITIONS[old]:
        move_rank(harness.state, rank, new, harness.now)
        assert rank.phase is new
    else:
        with pytest.raises(IllegalTransition):
            move_rank(harness.state, rank, new, harness.now)
        assert harness.state == before


def test_switch_does_not_go_back():
    harness = Harness()
    harness.load(spec("a"))
    (switch,) = harness.state.switches
    move_switch(switch, SwitchStage.STAGING)
    with pytest.raises(IllegalTransition):
        move_switch(switch, SwitchStage.PREPARING)
    assert switch.stage is SwitchStage.STAGING
    assert set(SWITCH_TRANSITIONS) == set(SwitchStage)


# ------------------------------------------------------------ ranks


def test_ranks_hear_what_communicators_they_may_keep():
    harness = Harness(1, num_ready=0)
    harness.state.num_communicators = 7
    harness.state.communicator_memory_bytes = 100
    harness.rank(hello(0, 1))
    ((_, welcome),) = harness.to_ranks(Welcome)
    assert (welcome.max_communicators, welcome.max_communicator_bytes) == (7, 100)
    assert harness.status().max_communicators == 7


def test_what_is_kept_with_a_lost_rank_is_given_up_by_those_who_keep_any():
    keeps = structs.replace(GAUGES, num_kept_communicators=3, kept_communicator_bytes=9)
    harness = Harness(3, num_ready=0)
    for rank, gauges in enumerate([keeps, keeps, GAUGES]):
        harness.rank(hello(rank, 3, gauges=gauges))
    row = harness.status().ranks[0]
    assert (row.num_kept_communicators, row.kept_communicator_bytes) == (3, 9)
    harness.kill(1)
    drop = DropCommunicators(lost_rank=1)
    assert harness.to_ranks(DropCommunicators) == [(0, drop)]


def test_worlds_are_formed_in_the_order_in_which_ranks_are_told():
    harness = Harness(3)
    harness.state.awake_per_rank = 2
    # Of one leader, as engines that share a rank must be.
    for name, ranks in (("a", [1, 0]), ("b", [1, 2])):
        harness.load(spec(name, ranks))
    turns = []
    # Prepared in the other order: what counts is when they are told to form.
    for generation, ranks in ((2, [1, 2]), (1, [1, 0])):
        for rank in ranks:
            harness.rank(EnginePrepared(rank=rank, generation=generation, seconds=0))
        builds = harness.to_ranks(BuildEngine)
        turns.append({message.turn for _, message in builds})
        assert [rank for rank, _ in builds] == ranks
    assert turns == [{1}, {2}]


def test_hello_is_welcomed_and_the_process_watched():
    harness = Harness(2, num_ready=0)
    assert harness.status().phase == "starting"
    effects = harness.rank(hello(0, 2))
    assert (0, Welcome(session="s1", pool="test")) in harness.to_ranks()
    assert WatchProcess(0, 1000) in effects
    assert harness.status().phase == "starting"
    harness.rank(hello(1, 2))
    status = harness.status()
    assert status.phase == "ready"
    assert [(r.rank, r.phase, r.pid) for r in status.ranks] == [
        (0, "ready", 1000),
        (1, "ready", 1001),
    ]


def test_process_of_another_host_is_not_watched():
    harness = Harness(2, num_ready=0)
    effects = harness.rank(hello(0, 2, host_id="boot:2"))
    assert not any(isinstance(effect, WatchProcess) for effect in effects)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol_version": 99}, "protocol 99"),
        ({"world_size": 3}, "world size 3"),
        ({"rank": 7, "world_size": 2}, "rank 7 is not in a world of size 2"),
        ({"rank": -1}, "rank -1"),
        ({"world_size": 10**9}, "not in a world"),
    ],
)
def test_rank_that_does_not_belong_is_told_to_exit(changes, says):
    harness = Harness(2)
    before = harness.snapshot()
    message = hello(**({"rank": 1, "world_size": 2} | changes))
    harness.rank(message)
    ((rank, answer_),) = harness.to_ranks()
    assert rank == message.rank
    assert isinstance(answer_, ExitRank)
    assert answer_.pid == message.pid
    assert answer_.failed
    assert says in answer_.reason
    assert harness.state == before


@pytest.mark.parametrize(
    ("changes", "is_taken_in"),
    [
        ({"launcher_pid": 77}, False),
        ({"launcher_pid": 70}, True),
        ({"launcher_pid": 77, "host_id": "boot:2"}, True),
    ],
)
def test_rank_of_an_earlier_launch_is_sent_away_in_order(changes, is_taken_in):
    """It was starting when its pool was shut down, and another came up by that name."""
    harness = Harness(2, num_ready=0)
    harness.state.owner_pid, harness.state.now = 70, harness.now
    before = harness.snapshot()
    harness.rank(hello(1, 2, **changes))
    exits = harness.to_ranks(ExitRank)
    if is_taken_in:
        assert not exits
        return
    ((_, exit_rank),) = exits
    assert not exit_rank.failed
    assert "process 77" in exit_rank.reason
    assert harness.state == before


def test_heartbeats_are_acknowledged_and_update_gauges():
    harness = Harness(1)
    harness.tick(0)
    harness.tick(1)
    assert harness.status().ranks[0].heartbeat_age_s == 1
    harness.rank(Heartbeat(rank=0, incarnation=0, gauges=GAUGES))
    assert harness.to_ranks() == [(0, HeartbeatAck())]
    assert harness.status().ranks[0].heartbeat_age_s == 0


def test_unknown_rank_is_asked_to_say_hello():
    harness = Harness(2, num_ready=1)
    for rank, incarnation in ((1, 0), (5, 0), (0, 3)):
        harness.rank(Heartbeat(rank=rank, incarnation=incarnation, gauges=GAUGES))
        assert harness.to_ranks() == [(rank, HelloAgain())]


def test_what_a_rank_held_under_an_earlier_controller_is_dropped_first():
    harness = Harness(1, num_ready=0)
    harness.rank(hello(0, 1, generations=[4, 6]))
    drops = [message.generation for _, message in harness.to_ranks(DropEngine)]
    assert drops == [4, 6]
    assert harness.status().ranks[0].phase == "expected"
    harness.load(spec("a"))
    assert "rank 0 is not ready" in harness.error().message
    harness.rank(answer(0, DropEngine(generation=4, reason="", timeout_s=1)))
    assert harness.status().phase == "starting"
    harness.rank(answer(0, DropEngine(generation=6, reason="", timeout_s=1)))
    assert harness.status().phase == "ready"
    # Numbers the rank knows from then are never issued again.
    assert harness.load_ready(spec("a")).generation == 7


def test_rank_that_keeps_what_it_held_before_is_evicted():
    harness = Harness(1, num_ready=0)
    harness.rank(hello(0, 1, generations=[4]))
    harness.tick(0)
    for _ in range(14):
        harness.heartbeats()
        harness.tick(1)
        if harness.to_ranks(ExitRank):
            break
    assert harness.to_ranks(ExitRank)
    assert harness.status().ranks[0].phase == "lost"
    # The same process is not taken back, the next one is.
    harness.rank(Heartbeat(rank=0, incarnation=0, gauges=GAUGES))
    assert harness.to_ranks(ExitRank)
    harness.rank(hello(0, 1))
    assert harness.to_ranks(ExitRank)
    harness.rank(hello(0, 1, pid=2000, incarnation=1))
    assert harness.status().phase == "ready"


def test_second_hello_of_the_same_process_changes_nothing():
    harness = Harness(2)
    engine = harness.load_ready(spec("a", [0]))
    before = harness.snapshot()
    harness.rank(hello(0, 2, generations=[engine.generation]))
    assert not harness.to_ranks(DropEngine)
    after = harness.snapshot()
    after.ranks[0].hello = before.ranks[0].hello
    assert after == before


def test_hello_of_a_new_process_means_the_old_one_is_lost():
    harness = Harness(2)
    harness.load_ready(spec("a", [0, 1]))
    call = harness.generate("a")
    harness.rank(hello(0, 2, pid=2000, incarnation=1))
    (answered,) = harness.to_clients(CallFailed)
    assert answered.call == call
    assert answered.error.kind == "RankLost"
    assert "new process" in answered.error.message
    assert ranks_sent(harness, DropEngine) == [1]


@pytest.mark.parametrize(("host_id", "limit_s"), [("boot:1", 30), ("boot:2", 4)])
def test_silent_rank_is_lost(host_id, limit_s):
    harness = Harness(1, num_ready=0)
    harness.rank(hello(0, 1, host_id=host_id))
    harness.tick(0)
    for _ in range(limit_s):
        harness.tick(1)
    assert harness.status().ranks[0].phase == "ready"
    harness.tick(1)
    assert harness.status().ranks[0].phase == "lost"
    assert harness.status().phase == "degraded"


def test_ranks_are_not_blamed_for_the_controllers_own_pause():
    harness = Harness(1, num_ready=0)
    harness.rank(hello(0, 1, host_id="boot:2"))
    harness.tick(0)
    harness.tick(3600)
    assert harness.status().ranks[0].phase == "ready"


def test_end_of_a_former_process_is_no_news():
    harness = Harness(1)
    harness.kill(0)
    harness.rank(hello(0, 1, pid=2000, incarnation=1))
    before = harness.snapshot()
    assert harness.pool.rank_ended(0, 1000, harness.now) == []
    assert harness.state == before


def test_rank_that_cannot_be_reached_is_lost():
    harness = Harness(2)
    harness.load_ready(spec("a", [0]))
    harness.pool.rank_unreachable(0, harness.now)
    assert harness.status().ranks[0].phase == "lost"
    assert harness.row("a").phase == "lost"
    # Its process lives on and comes back: what it still holds goes first.
    harness.rank(Heartbeat(rank=0, incarnation=0, gauges=GAUGES))
    assert harness.to_ranks() == [(0, HelloAgain())]
    harness.rank(hello(0, 2, generations=[1]))
    assert [m.generation for _, m in harness.to_ranks(DropEngine)] == [1]
    harness.answer_all()
    assert harness.row("a").phase == "ready"
    assert harness.row("a").generation == 2


# ------------------------------------------------------------ load


def test_load_prepares_builds_and_reports():
    harness = Harness()
    call = harness.load(spec("a", 2, max_model_len=64))
    assert ranks_sent(harness, PrepareEngine) == [0, 1]
    prepare = harness.to_ranks(PrepareEngine)[0][1]
    assert prepare == PrepareEngine(
        generation=1,
        name="a",
        model="/models/a",
        engine_args={"max_model_len": 64, "tensor_parallel_size": 2},
        ranks=[0, 1],
    )
    assert harness.row("a").phase == "preparing"
    harness.now += 1
    harness.rank(EnginePrepared(rank=0, generation=1, seconds=1))
    assert not harness.to_ranks()
    harness.rank(EnginePrepared(rank=1, generation=1, seconds=1))
    assert ranks_sent(harness, BuildEngine) == [0, 1]
    assert harness.to_ranks(BuildEngine)[0][1].timeout_s == 59
    assert harness.row("a").phase == "building"
    harness.now += 1
    build = harness.to_ranks(BuildEngine)
    harness.rank(answer(*build[0]))
    assert not harness.to_clients()
    harness.rank(answer(*build[1]))
    (done,) = harness.to_clients()
    assert isinstance(done, SwitchDone)
    assert done.call == call
    report = done.report.engines[0]
    assert (report.name, report.action, report.generation) == ("a", "load", 1)
    assert report.ranks == [0, 1]
    assert sum(report.phases.values()) == pytest.approx(report.seconds) == 2
    assert report.memory_after_bytes == {0: 2, 1: 2}
    assert done.report.phases == report.phases
    assert harness.row("a").phase == "ready"
    assert not harness.state.switches


BAD_LOADS = [
    (EngineSpec("", "m"), "engine name"),
    (EngineSpec("a b", "m"), "engine name"),
    (EngineSpec("x" * 65, "m"), "engine name"),
    (EngineSpec("all", "m"), "reserved"),
    (EngineSpec("a", "  "), "no model"),
    (spec("a", max_model_length=3), "did you mean max_model_len"),
    (spec("a", model="x"), "cannot be set"),
    (spec("a", distributed_executor_backend="mp"), "cannot be set"),
    (spec("a", tensor_parallel_size=0), "whole number"),
    (spec("a", tensor_parallel_size=True), "whole number"),
    (spec("a", tensor_parallel_size="2"), "whole number"),
    (spec("a", [0, 1], tensor_parallel_size=4), "2 rank(s) asked for"),
    (spec("a", 0), "asks for 0 ranks"),
    (spec("a", []), "asks for 0 ranks"),
    (spec("a", [3, 4]), "no rank 4"),
    (spec("a", [-1]), "no rank -1"),
    (spec("a", [2, 2]), "listed twice"),
    (spec("a", [1]), "taken by engine 'busy'"),
    (spec("a", 4), "needs 4 rank(s), 2 of 4 are free"),
    (spec("busy"), "in use"),
]


@pytest.mark.parametrize(("wanted", "says"), BAD_LOADS)
def test_rejected_load_changes_nothing(wanted, says):
    harness = Harness()
    harness.load_ready(spec("busy", [1]))
    if wanted.ranks == 4:
        harness.kill(3)
    before = harness.snapshot()
    harness.load(wanted)
    assert harness.error().kind == "CommandRejected"
    assert says in harness.error().message
    assert len(harness.effects) == 1
    assert harness.state == before


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_timeout_must_be_a_positive_number(timeout_s):
    harness = Harness()
    before = harness.snapshot()
    harness.load(spec("a"), timeout_s=timeout_s)
    assert "timeout_s" in harness.error().message
    assert harness.state == before


def test_load_on_ranks_that_are_not_there_yet():
    harness = Harness(4, num_ready=2)
    harness.load(spec("a", [1, 2]))
    assert "rank 2 is not ready (expected)" in harness.error().message
    harness.load_ready(spec("a", [0, 1]))


def test_load_before_any_rank_greeted():
    harness = Harness(4, num_ready=0)
    harness.load(spec("a"))
    assert "no rank has said hello" in harness.error().message


def test_engine_that_cannot_be_configured_is_rejected():
    harness = Harness()
    harness.load(spec("a", 2))
    harness.rank(failed(1, 1, "CommandRejected"))
    assert ranks_sent(harness, DropEngine) == [0, 1]
    assert not harness.to_clients(CallFailed)
    harness.answer_all()
    assert harness.error().kind == "CommandRejected"
    assert harness.status().engines == []
    assert harness.load_ready(spec("a", 2)).generation == 2


def test_build_that_fails_on_one_rank_unwinds_on_all():
    harness = Harness()
    call = harness.load(spec("a", 2))
    for rank in (0, 1):
        harness.rank(EnginePrepared(rank=rank, generation=1, seconds=0))
    harness.rank(failed(1, 1, phase="weights"))
    assert ranks_sent(harness, DropEngine) == [0, 1]
    assert harness.row("a").phase == "unwinding"
    drops = harness.to_ranks(DropEngine)
    # The other rank's echo of the failure, and its late success, say nothing new.
    harness.rank(failed(0, 1))
    harness.rank(answer(0, BuildEngine(generation=1, timeout_s=1)))
    harness.rank(answer(*drops[0]))
    assert not harness.to_clients()
    harness.rank(answer(*drops[1]))
    (answered,) = harness.to_clients()
    assert answered.call == call
    assert answered.error == ErrorInfo(
        "RankFailure", "RankFailure on rank 1", 1, 1, "weights"
    )
    assert harness.status().engines == []
    assert harness.state.num_stale_messages == 0
    harness.load_ready(spec("b", [0, 1]))


def test_build_past_its_deadline():
    harness = Harness()
    harness.load(spec("a", 2), timeout_s=2)
    for rank in (0, 1):
        harness.rank(EnginePrepared(rank=rank, generation=1, seconds=0))
    harness.rank(PhaseStarted(rank=1, generation=1, phase="weights"))
    harness.rank(answer(0, BuildEngine(generation=1, timeout_s=1)))
    harness.tick(2)
    assert ranks_sent(harness, DropEngine) == [0, 1]
    harness.answer_all()
    error = harness.error()
    assert (error.kind, error.rank, error.phase) == ("RankTimeout", 1, "weights")
    assert "rank(s) [1]" in error.message


def test_rank_that_does_not_even_drop_is_told_to_exit():
    harness = Harness()
    harness.load(spec("a", 2), timeout_s=2)
    harness.tick(2)
    harness.answer_all(skip=(1,))
    assert not harness.to_clients(CallFailed)
    for _ in range(14):
        harness.heartbeats()
        harness.tick(1)
        if harness.to_ranks(ExitRank):
            break
    assert harness.to_ranks() == [(1, harness.to_ranks()[0][1])]
    assert harness.error().kind == "RankTimeout"
    assert harness.status().ranks[1].phase == "lost"
    assert harness.status().engines == []


def refused_beside_a_build(timeout_s: float) -> Harness:
    """Rank 0 builds one engine and is to give another up, which rank 1 has refused."""
    harness = Harness()
    harness.state.awake_per_rank = 2
    harness.load(spec("slow", [0]), timeout_s=timeout_s)
    harness.rank(EnginePrepared(rank=0, generation=1, seconds=0))
    harness.load(spec("bad", [0, 1]), timeout_s=timeout_s)
    harness.rank(failed(1, 2, "CommandRejected"))
    assert ranks_sent(harness, DropEngine) == [0, 1]
    harness.rank(answer(1, DropEngine(generation=2, reason="", timeout_s=1)))
    return harness


def ticks_until_told_to_exit(harness: Harness, limit_s: int) -> int:
    for seconds in range(limit_s):
        harness.heartbeats()
        harness.tick(1)
        if harness.to_ranks(ExitRank):
            return seconds + 1
    return limit_s


def test_rank_at_work_on_another_engine_may_take_its_time_to_drop_one():
    harness = refused_beside_a_build(timeout_s=60)
    assert ticks_until_told_to_exit(harness, 51) == 51
    harness.rank(answer(0, BuildEngine(generation=1, timeout_s=1)))
    # From here on it has as long as any other.
    assert ticks_until_told_to_exit(harness, 10) == 10
    harness.rank(answer(0, DropEngine(generation=2, reason="", timeout_s=1)))
    assert harness.error().kind == "CommandRejected"
    assert [row.name for row in harness.status().engines] == ["slow"]
    assert harness.row("slow").phase == "ready"


def test_rank_that_hangs_in_what_kept_it_from_a_drop_is_told_to_exit():
    harness = refused_beside_a_build(timeout_s=30)
    # The build's deadline, and what it takes to find out that it goes on.
    assert 30 + 10 < ticks_until_told_to_exit(harness, 100) < 30 + 20
    assert ranks_sent(harness, ExitRank) == [0]


def test_rank_that_has_two_engines_to_drop_and_does_not_is_told_to_exit():
    harness = refused_beside_a_build(timeout_s=60)
    harness.tick(1)
    harness.rank(failed(0, 1))
    assert ticks_until_told_to_exit(harness, 60) < 30


def test_progress_is_told_once_per_phase_and_each_second():
    harness = Harness()
    call = harness.load(spec("a", 2))
    assert [p.phase for p in harness.to_clients(Progress)] == ["prepare"]
    harness.rank(PhaseStarted(rank=0, generation=1, phase="weights"))
    (progress,) = harness.to_clients(Progress)
    assert (progress.call, progress.engine, progress.rank) == (call, "a", None)
    harness.rank(PhaseStarted(rank=1, generation=1, phase="weights"))
    assert harness.effects == []
    harness.tick(0.5)
    assert not harness.to_clients()
    harness.tick(0.5)
    assert harness.to_clients() == [
        Progress(call=call, engine="a", phase="weights", elapsed_s=1.0)
    ]
    assert harness.row("a").progress == "weights"


def test_load_goes_on_when_its_client_is_gone():
    harness = Harness()
    harness.load(spec("a"))
    harness.effects, prepare = harness.pool.client_gone(ALICE), harness.effects
    assert harness.effects == []
    harness.effects = prepare
    harness.answer_all()
    assert harness.row("a").phase == "ready"
    assert not harness.to_clients(SwitchDone)


def test_loads_on_disjoint_ranks_run_together():
    harness = Harness()
    harness.load(spec("a", [0, 1]))
    first = list(harness.effects)
    harness.load(spec("b", [2, 3]))
    second = list(harness.effects)
    harness.effects = second
    harness.answer_all()
    assert harness.row("b").phase == "ready"
    assert harness.row("a").phase == "preparing"
    harness.effects = first
    harness.answer_all()
    assert harness.row("a").phase == "ready"


@pytest.mark.parametrize("command", ["load", "unload", "apply", "generate"])
def test_command_on_an_engine_that_is_changing(command):
    harness = Harness()
    harness.load(spec("a"))
    before = harness.snapshot()
    wanted = {"load": spec("a"), "apply": spec("b")}.get(command, "a")
    getattr(harness, command)(wanted)
    assert harness.error().kind == "CommandRejected"
    assert "a" in harness.error().message
    assert harness.state == before


# ------------------------------------------------------------ unload


def test_unload_closes_and_reports():
    harness = Harness()
    harness.load_ready(spec("a", 2))
    call = harness.unload("a")
    assert ranks_sent(harness, CloseEngine) == [0, 1]
    assert harness.row("a").phase == "closing"
    harness.now += 1
    harness.answer_all()
    (done,) = harness.to_clients(SwitchDone)
    assert done.call == call
    assert done.report.action == "unload"
    (report,) = done.report.engines
    assert report.phases == pytest.approx({"close": 0.1, "coordinate": 0.9})
    assert set(done.report.phases) == {"a.close", "a.coordinate"}
    assert report.memory_before_bytes == {0: 2, 1: 2}
    assert harness.status().engines == []


def test_unload_of_what_is_not_there():
    harness = Harness()
    harness.load_ready(spec("b"))
    before = harness.snapshot()
    harness.unload("a")
    assert harness.error().kind == "CommandRejected"
    assert "['b']" in harness.error().message
    assert harness.state == before


def test_requests_the_leader_left_open_end_with_the_unload():
    harness = Harness()
    harness.load_ready(spec("a"))
    ended, left = harness.generate("a", stream=True), harness.generate("a")
    harness.unload("a")
    closing = list(harness.effects)
    harness.rank(
        RequestOutput(
            rank=0,
            generation=1,
            request=1,
            completions=[Completion(0, 0, "", [], "abort")],
            done=True,
        )
    )
    (output,) = harness.to_clients()
    assert (output.call, output.completions[0].finish_reason) == (ended, "abort")
    harness.effects = closing
    harness.answer_all()
    (answered,) = harness.to_clients(CallFailed)
    assert (answered.call, answered.error.kind) == (left, "RankFailure")
    assert not harness.state.requests


def test_rank_that_could_not_give_everything_back():
    harness = Harness()
    harness.load_ready(spec("a", 2))
    harness.unload("a")
    harness.rank(failed(0, 1, "ReleaseIncomplete"))
    harness.answer_all()
    assert harness.error().kind == "ReleaseIncomplete"
    assert harness.status().engines == []


def test_rank_that_does_not_close_is_told_to_exit():
    harness = Harness()
    harness.load_ready(spec("a", 2))
    harness.unload("a", timeout_s=2)
    harness.answer_all(skip=(1,))
    harness.tick(4.9)
    assert not harness.to_ranks(ExitRank)
    harness.tick(0.2)
    assert ranks_sent(harness, ExitRank) == [1]
    assert harness.error().kind == "RankTimeout"
    assert harness.error().rank == 1


# ------------------------------------------------------------ apply


def test_apply_prepares_before_it_unloads_and_unloads_before_it_builds():
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    harness.load_ready(spec("keep", [3]))
    call = harness.apply(spec("b", [0, 1]), spec("keep"))
    assert [type(m) for _, m in harness.to_ranks()] == [PrepareEngine] * 2
    assert harness.row("a").phase == "ready"
    for rank in (0, 1):
        harness.rank(EnginePrepared(rank=rank, generation=3, seconds=0))
    # What goes is set aside: asleep, until it is known that what comes serves.
    assert [(r, type(m)) for r, m in harness.to_ranks()] == [(0, SuspendEngine)]
    harness.rank(answer(0, SuspendEngine(generation=1, level=1, timeout_s=1)))
    assert ranks_sent(harness, BuildEngine) == [0, 1]
    harness.rank(answer(0, BuildEngine(generation=3, timeout_s=1)))
    harness.rank(answer(1, BuildEngine(generation=3, timeout_s=1)))
    assert [(r, type(m)) for r, m in harness.to_ranks()] == [(0, CloseEngine)]
    harness.answer_all()
    (done,) = harness.to_clients(SwitchDone)
    assert done.call == call
    assert done.report.action == "apply"
    assert done.report.kept == ["keep"]
    assert sorted((e.name, e.action) for e in done.report.engines) == [
        ("a", "sleep"),
        ("a", "unload"),
        ("b", "load"),
    ]
    assert done.report.path == ["sleep", "load", "unload"]
    assert {e.name: e.ranks for e in harness.status().engines} == {
        "keep": [3],
        "b": [0, 1],
    }


def test_apply_that_changes_nothing_is_done_at_once():
    harness = Harness()
    harness.load_ready(spec("a", [1, 2]))
    before = harness.snapshot()
    harness.apply(spec("a", tensor_parallel_size=2))
    (done,) = harness.to_clients()
    assert done.report.kept == ["a"]
    assert done.report.engines == []
    before.history = harness.state.history  # it is remembered, though
    assert harness.state == before


def test_apply_replaces_an_engine_of_the_same_name():
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    harness.apply(spec("a", [0], max_model_len=9))
    # Until the new one takes its place the name is the old one's, and it serves.
    assert harness.row("a").generation == 1
    harness.answer_all()
    assert harness.row("a").generation == 2
    assert harness.row("a").phase == "ready"
    assert [e.name for e in harness.status().engines] == ["a"]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ([spec("b"), spec("b")], "names b twice"),
        ([spec("b", [1]), spec("c", [1, 2])], "rank 1 is asked for by"),
        ([spec("a", [0]), spec("b", [0])], "rank 0 is asked for by 'a'"),
        ([spec("b", 3), spec("c", 2)], "needs 2"),
        ([spec("b", nonsense=1)], "no engine argument"),
        ([spec("b", chat_templat="x")], "did you mean chat_template?"),
        ([spec("b", api_key="x")], "it is the gateway's"),
        (
            [spec("b", lora_modules=[{"name": "x"}]), spec("x", [2])],
            "the name 'x' is in use by engine 'x'",
        ),
        (
            [
                spec("b", lora_modules=[{"name": "x"}]),
                spec("c", [2], lora_modules=[{"name": "x"}]),
            ],
            "the name 'x' is in use by engine 'b'",
        ),
        ([spec("b", lora_modules=[{"name": "b"}])], "the name 'b' is in use"),
    ],
)
def test_rejected_layout_changes_nothing(wanted, says):
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    before = harness.snapshot()
    harness.apply(*wanted)
    assert says in harness.error().message
    assert harness.state == before


def test_options_of_the_server_are_told_from_engine_arguments():
    """For the ranks to check and the gateway to use; what the pool says of all models
    is every model's that does not say otherwise."""
    harness = Harness()
    harness.state.frontend_args = {"chat_template": "all", "tool_call_parser": "x"}
    harness.load(spec("a", [0], max_model_len=9, tool_call_parser="hermes"))
    ((_, prepare),) = harness.to_ranks(PrepareEngine)
    assert prepare.engine_args == {"max_model_len": 9, "tensor_parallel_size": 1}
    wanted = {"chat_template": "all", "tool_call_parser": "hermes"}
    assert prepare.frontend_args == wanted
    harness.answer_all()
    assert harness.row("a").engine_args.items() >= wanted.items()
    # The same again is the same; another template is another engine.
    harness.apply(spec("a", [0], max_model_len=9, tool_call_parser="hermes"))
    assert harness.row("a").generation == 1
    harness.apply(spec("a", [0], max_model_len=9, chat_template="mine"))
    harness.answer_all()
    assert harness.row("a").generation == 2


def test_a_name_that_an_adapter_has_is_taken():
    harness = Harness()
    harness.state.models = {"m": spec("m", lora_modules=[{"name": "of-m"}])}
    harness.load_ready(spec("a", [0], lora_modules=[{"name": "of-a", "path": "/x"}]))
    assert harness.status().adapters == {"of-a": "a", "of-m": "m"}
    harness.load(spec("of-a", [1]))
    assert "in use by engine 'of-a'" in harness.error().message


def test_layout_with_an_engine_that_cannot_be_configured_changes_nothing():
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    harness.apply(spec("b", [0, 1]), spec("c", [2]))
    harness.rank(failed(1, 2, "CommandRejected"))
    assert [r for r, _ in harness.to_ranks(DropEngine)] == [0, 1, 2]
    harness.answer_all()
    assert harness.error().kind == "CommandRejected"
    assert {e.name: e.phase for e in harness.status().engines} == {"a": "ready"}
    assert harness.generate("a")
    assert harness.to_ranks(AddRequest)


def test_layout_whose_build_fails_is_undone():
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    harness.apply(spec("b", [0]), spec("c", [1]))
    for rank, generation in ((0, 2), (1, 3)):
        harness.rank(EnginePrepared(rank=rank, generation=generation, seconds=0))
    harness.rank(answer(0, SuspendEngine(generation=1, level=1, timeout_s=1)))
    harness.rank(answer(1, BuildEngine(generation=3, timeout_s=1)))
    held = harness.generate("a")
    harness.rank(failed(0, 2, "CommandRejected"))
    harness.answer_all()
    error = harness.error()
    assert error.kind == "RankFailure"  # something was changed: no rejection
    assert "everything is as it was" in error.message
    assert {e.name: e.phase for e in harness.status().engines} == {"a": "ready"}
    assert harness.engine("a").generation == 1
    ((rank, added),) = harness.to_ranks(AddRequest)
    assert (rank, added.generation) == (0, 1)
    assert harness.state.requests[added.request].call == held


def test_engines_of_a_running_apply_are_not_touched_by_others():
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    harness.apply(spec("b", [0, 1]))
    before = harness.snapshot()
    for attempt in (
        lambda: harness.unload("a"),
        harness.apply,
        lambda: harness.load(spec("c", [1])),
        lambda: harness.load(spec("b", [2])),
    ):
        attempt()
        assert harness.error().kind == "CommandRejected"
        assert harness.state == before


# ------------------------------------------------------------ generate


def test_batch_is_gathered_and_sorted():
    harness = Harness()
    harness.load_ready(spec("a", [2, 3]))
    call = harness.generate("a")
    ((rank, add),) = harness.to_ranks()
    assert rank == 2
    assert isinstance(add, AddRequest)
    assert harness.row("a").num_requests == 1

    def output(index: int, done: bool) -> None:
        completion = Completion(index, 0, str(index), [index], "stop")
        harness.rank(
            RequestOutput(
                rank=2,
                generation=1,
                request=add.request,
                completions=[completion],
                done=done,
            )
        )

    output(1, done=False)
    assert harness.effects == []
    output(0, done=True)
    (answered,) = harness.to_clients()
    assert isinstance(answered, GenerateOutput)
    assert (answered.call, answered.done) == (call, True)
    assert [c.prompt_index for c in answered.completions] == [0, 1]
    assert not harness.state.requests


def test_stream_is_passed_on_as_it_comes():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = harness.generate("a", stream=True)
    for done in (False, False, True):
        pieces = [Completion(0, 0, "x", [1])]
        harness.rank(
            RequestOutput(
                rank=0, generation=1, request=1, completions=pieces, done=done
            )
        )
        assert harness.to_clients() == [
            GenerateOutput(call=call, completions=pieces, done=done)
        ]


def test_generate_on_what_does_not_serve():
    harness = Harness()
    harness.generate("a")
    assert "none is loaded" in harness.error().message
    harness.load_ready(spec("b"))
    before = harness.snapshot()
    harness.generate("a")
    assert "['b']" in harness.error().message
    harness.client(
        Generate(
            call=9,
            engine="b",
            prompts=[],
            sampling_params={},
            stream=False,
            timeout_s=1,
        )
    )
    assert "no prompts" in harness.error().message
    assert harness.state == before


def test_request_failed_is_passed_on():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = harness.generate("a")
    error = ErrorInfo("CommandRejected", "prompt too long")
    harness.rank(RequestFailed(rank=0, generation=1, request=1, error=error))
    assert harness.to_clients() == [CallFailed(call=call, error=error)]


def test_cancel_aborts_and_the_leaders_last_output_ends_the_call():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = harness.generate("a", stream=True)
    harness.client(CancelGenerate(call=call), BOB)
    assert harness.effects == []
    harness.client(CancelGenerate(call=call))
    assert harness.to_ranks() == [(0, AbortRequest(generation=1, request=1))]
    assert harness.state.requests


def test_client_that_is_gone_has_its_requests_aborted():
    harness = Harness()
    harness.load_ready(spec("a"))
    harness.generate("a", stream=True)
    harness.effects = harness.pool.client_gone(ALICE)
    assert harness.to_ranks() == [(0, AbortRequest(generation=1, request=1))]
    before = harness.snapshot()
    harness.rank(
        RequestOutput(rank=0, generation=1, request=1, completions=[], done=True)
    )
    assert harness.effects == []
    assert harness.state == before


def test_request_past_its_deadline():
    harness = Harness()
    harness.load_ready(spec("a"))
    harness.generate("a", timeout_s=2)
    harness.tick(1)
    assert [p.phase for p in harness.to_clients(Progress)] == ["generate"]
    harness.tick(1)
    assert harness.to_ranks(AbortRequest)
    assert harness.error().kind == "RankTimeout"


def test_call_number_in_use():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = harness.generate("a")
    before = harness.snapshot()
    harness.client(LoadEngine(call=call, spec=spec("b"), timeout_s=1))
    assert "in use" in harness.error().message
    assert harness.state == before
    # Another client numbers its own calls.
    harness.client(LoadEngine(call=call, spec=spec("b"), timeout_s=1), BOB)
    assert harness.to_ranks(PrepareEngine)


def test_stale_messages_are_dropped_and_counted():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.generate("a")
    before = harness.snapshot()
    output = {"completions": [], "done": True, "request": 1}
    for message in (
        EnginePrepared(rank=0, generation=7, seconds=0),
        EnginePrepared(rank=0, generation=1, seconds=0),
        answer(0, BuildEngine(generation=1, timeout_s=1)),
        answer(0, CloseEngine(generation=1, timeout_s=1)),
        answer(3, CloseEngine(generation=1, timeout_s=1)),
        RequestOutput(rank=1, generation=1, **output),
        RequestOutput(rank=0, generation=9, **output),
        failed(3, 1),
        PhaseStarted(rank=3, generation=1, phase="x"),
    ):
        assert harness.rank(message) == []
    assert harness.state.num_stale_messages == 9
    before.num_stale_messages = 9
    assert harness.state == before


def test_request_too_large_for_the_wire_fails():
    harness = Harness()
    harness.load_ready(spec("a"))
    harness.generate("a")
    ((rank, message),) = harness.to_ranks()
    harness.effects = harness.pool.message_refused(
        rank, message, ProtocolError("too large"), harness.now
    )
    assert harness.error().kind == "ProtocolError"
    assert not harness.state.requests


# ------------------------------------------------------------ failed steps, losses


def test_step_that_fails_ends_the_engine_and_is_remembered():
    harness = Harness()
    harness.load_ready(spec("a", 2))
    harness.generate("a")
    harness.rank(failed(1, 1, "RankDiverged", phase="step"))
    assert harness.error().kind == "RankDiverged"
    assert ranks_sent(harness, DropEngine) == [0, 1]
    harness.answer_all()
    row = harness.row("a")
    assert (row.phase, row.error) == ("failed", "RankDiverged on rank 1")
    harness.generate("a")
    assert "RankDiverged" in harness.error().message
    # Its ranks are free, and the failure is forgotten with the next load.
    harness.load_ready(spec("a", [0, 1]))
    assert harness.row("a").phase == "ready"
    assert not harness.state.failed


def test_unload_forgets_a_failure():
    harness = Harness()
    harness.load_ready(spec("a"))
    harness.rank(failed(0, 1, phase="step"))
    harness.answer_all()
    harness.unload("a")
    (done,) = harness.to_clients()
    assert done.report.engines == []
    assert harness.status().engines == []


def test_rank_lost_fails_requests_and_spares_other_engines():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.load_ready(spec("b", [2]))
    lost, served = harness.generate("a"), harness.generate("b")
    harness.kill(1)
    (answered,) = harness.to_clients()
    assert answered.call == lost
    assert (answered.error.kind, answered.error.rank) == ("RankLost", 1)
    for part in ("rank 1", "1001", "'a'", "its process ended"):
        assert part in answered.error.message
    assert [(r, type(m)) for r, m in harness.to_ranks()] == [(0, DropEngine)]
    assert harness.row("a").phase == "lost"
    assert harness.row("b").phase == "ready"
    assert [r.call for r in harness.state.requests.values()] == [served]
    harness.generate("a")
    assert harness.error().kind == "RankLost"


def test_lost_engine_is_restored_when_its_ranks_are_back():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.kill(1)
    harness.answer_all()
    harness.tick(1)
    assert harness.effects == []
    harness.rank(hello(1, 4, pid=2001, incarnation=1))
    assert ranks_sent(harness, PrepareEngine) == [0, 1]
    harness.unload("a")
    assert "being restored" in harness.error().message
    harness.effects = []
    for rank in (0, 1):
        harness.rank(EnginePrepared(rank=rank, generation=2, seconds=0))
    harness.answer_all()
    row = harness.row("a")
    assert (row.phase, row.generation, row.ranks) == ("ready", 2, [0, 1])


def test_survivors_must_have_dropped_before_the_restore():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.kill(1)
    drop = harness.to_ranks(DropEngine)
    harness.rank(hello(1, 4, pid=2001, incarnation=1))
    assert not harness.to_ranks(PrepareEngine)
    harness.rank(answer(*drop[0]))
    assert ranks_sent(harness, PrepareEngine) == [0, 1]


def test_restore_that_fails_is_not_tried_again():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.kill(1)
    harness.answer_all()
    harness.rank(hello(1, 4, pid=2001, incarnation=1))
    harness.rank(failed(1, 2))
    harness.answer_all()
    assert harness.row("a").phase == "failed"
    assert harness.row("a").error == "RankFailure on rank 1"
    harness.tick(1)
    assert harness.effects == []
    harness.load_ready(spec("b", [0, 1]))


def test_restores_that_lose_a_rank_each_time_come_to_an_end():
    harness = Harness(1)
    harness.load_ready(spec("a"))
    for incarnation in range(1, 6):
        harness.kill(0)
        harness.rank(hello(0, 1, pid=2000 + incarnation, incarnation=incarnation))
        if not harness.to_ranks(PrepareEngine):
            break
    assert harness.row("a").phase == "failed"
    assert harness.state.next_generation == 5  # loaded once, restored three times


def _restore_to_sleep(incarnation: int, harness: Harness) -> None:
    """Until the engine, which slept, is built anew and falls asleep again."""
    harness.kill(1)
    harness.answer_all()
    harness.rank(hello(1, 4, pid=2000 + incarnation, incarnation=incarnation))
    for kind in (PrepareEngine, BuildEngine):
        for rank, message in harness.to_ranks(kind):
            harness.rank(answer(rank, message))
    assert ranks_sent(harness, SuspendEngine) == [0, 1]


def _lost_sleeper() -> Harness:
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.sleep("a")
    harness.answer_all()
    _restore_to_sleep(1, harness)
    return harness


def test_restored_sleeper_that_cannot_fall_asleep_is_a_failure():
    harness = _lost_sleeper()
    generation = harness.engine("a").generation
    harness.rank(failed(0, generation, "RankDiverged"))
    harness.answer_all()
    row = harness.row("a")
    assert (row.phase, row.error) == ("failed", "RankDiverged on rank 0")


def test_restored_sleeper_that_does_not_fall_asleep_in_time_is_a_failure():
    harness = _lost_sleeper()
    while harness.row("a").phase == "suspending":
        harness.heartbeats()
        harness.tick(1)
    harness.answer_all()
    row = harness.row("a")
    assert row.phase == "failed"
    assert "did not finish 'sleep'" in row.error


def test_restored_sleeper_that_loses_a_rank_again_is_restored_so_many_times():
    harness = _lost_sleeper()
    for incarnation in (2, 3):
        _restore_to_sleep(incarnation, harness)
    harness.kill(1)
    harness.answer_all()
    assert harness.row("a").phase == "failed"
    harness.load_ready(spec("a", [0]))
    harness.sleep("a")
    harness.answer_all()
    assert harness.row("a").phase == "asleep"


def test_what_was_restored_may_be_lost_as_often_again():
    harness = _lost_sleeper()
    for incarnation in range(2, 8):
        harness.answer_all()
        assert harness.row("a").phase == "asleep"
        _restore_to_sleep(incarnation, harness)


def test_engine_that_was_still_loading_is_not_restored():
    harness = Harness()
    harness.load(spec("a", 2))
    harness.kill(1)
    assert ranks_sent(harness, DropEngine) == [0]
    harness.answer_all()
    assert harness.error().kind == "RankLost"
    harness.rank(hello(1, 4, pid=2001, incarnation=1))
    assert not harness.to_ranks(PrepareEngine)
    assert harness.status().engines == []


def test_unload_of_a_lost_engine_forgets_it():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.kill(1)
    drop = harness.to_ranks(DropEngine)
    harness.unload("a")
    assert harness.row("a").phase == "unwinding"
    harness.rank(answer(*drop[0]))
    assert harness.to_clients(SwitchDone)
    harness.rank(hello(1, 4, pid=2001, incarnation=1))
    assert not harness.to_ranks(PrepareEngine)
    assert harness.status().engines == []


def test_rank_lost_while_closing_does_not_fail_the_unload():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.unload("a")
    harness.kill(1)
    assert ranks_sent(harness, DropEngine) == [0]
    harness.answer_all()
    assert harness.to_clients(SwitchDone)
    assert harness.status().engines == []


@pytest.mark.parametrize("is_loss", [True, False])
def test_broken_connection_is_blamed_on_the_rank_that_died(is_loss):
    """A dying rank's peers may report before the kernel does."""
    harness = Harness()
    harness.load_ready(spec("a", [0, 1]))
    harness.generate("a")
    harness.rank(failed(0, 1, phase="step"))
    assert not harness.to_clients()
    harness.effects = [e for e in harness.effects if getattr(e, "rank", None) == 0]
    harness.answer_all()
    if is_loss:
        harness.kill(1)
        assert (harness.error().kind, harness.error().rank) == ("RankLost", 1)
        assert harness.row("a").phase == "lost"
        harness.rank(hello(1, 4, pid=2001, incarnation=1))
        harness.answer_all()
        assert harness.row("a").phase == "ready"
    else:
        harness.tick(1.1)
        assert (harness.error().kind, harness.error().rank) == ("RankFailure", 0)
        harness.rank(answer(1, DropEngine(generation=1, reason="", timeout_s=1)))
        assert harness.row("a").phase == "failed"


def test_load_whose_peer_dies_says_so():
    harness = Harness()
    harness.load(spec("a", 2))
    for rank in (0, 1):
        harness.rank(EnginePrepared(rank=rank, generation=1, seconds=0))
    harness.rank(failed(0, 1))
    drops = dict(harness.to_ranks(DropEngine))
    harness.kill(1)
    harness.rank(answer(0, drops[0]))
    assert (harness.error().kind, harness.error().rank) == ("RankLost", 1)


def test_all_ranks_restarted_by_their_launcher():
    """What torchrun does when one worker dies: it restarts every one."""
    harness = Harness(2)
    harness.load_ready(spec("a", [0]))
    harness.load_ready(spec("b", [1]))
    harness.kill(1)
    harness.kill(0)
    assert {e.phase for e in harness.status().engines} == {"lost"}
    for rank in (0, 1):
        harness.rank(hello(rank, 2, pid=2000 + rank, incarnation=1))
        harness.answer_all()
    assert {e.name: (e.phase, e.ranks) for e in harness.status().engines} == {
        "a": ("ready", [0]),
        "b": ("ready", [1]),
    }
    assert harness.status().phase == "ready"


# ------------------------------------------------------------ shutdown, refused frames


def test_shutdown_waits_for_the_ranks():
    harness = Harness(2)
    harness.load_ready(spec("a"))
    generate = harness.generate("a")
    load = harness.load(spec("b"))
    harness.client(ShutdownPool(call=50, timeout_s=5), BOB)
    assert {(m.call, m.error.kind) for m in harness.to_clients()} == {
        (generate, "CommandRejected"),
        (load, "CommandRejected"),
    }
    assert ranks_sent(harness, ExitRank) == [0, 1]
    assert harness.status().phase == "stopping"
    harness.load(spec("c"))
    assert "stopping" in harness.error().message
    harness.rank(hello(0, 2, pid=5, incarnation=1))
    # Ended in order: its launcher is not to start it anew.
    ((_, exit_rank),) = harness.to_ranks(ExitRank)
    assert not exit_rank.failed
    harness.kill(0)
    assert not any(isinstance(e, StopController) for e in harness.effects)
    harness.kill(1)
    assert harness.to_clients() == [PoolStopped(call=50)]
    assert harness.effects[-1] == StopController(0)


def test_a_long_shutdown_shows_that_the_controller_lives():
    harness = Harness(2)
    harness.client(ShutdownPool(call=50, timeout_s=30))
    harness.tick(2)
    assert [type(m) for m in harness.to_clients()] == [Progress]
    harness.tick(0.2)
    assert harness.to_clients() == []


def test_shutdown_does_not_wait_for_ever():
    harness = Harness(2)
    harness.client(ShutdownPool(call=50, timeout_s=5))
    harness.kill(0)
    harness.tick(5)
    assert harness.error().kind == "RankTimeout"
    assert "rank 1" in harness.error().message or "1 (pid" in harness.error().message
    assert harness.effects[-1] == StopController(0)


def test_stop_without_ranks_is_done_at_once():
    harness = Harness(2, num_ready=0)
    assert harness.pool.stop(5, harness.now)[-1] == StopController(0)


def test_refused_frame_is_counted_and_answered():
    harness = Harness()
    error = ProtocolError("not a message")
    harness.effects = harness.pool.frame_refused(ALICE, 3, error)
    assert harness.to_clients() == [CallFailed(call=3, error=error.to_info())]
    # A rank could not read the answer: its decoder takes messages to ranks only.
    harness.effects = harness.pool.frame_refused(b"rank-1", -1, error)
    assert harness.to_clients() == []
    assert harness.status().num_protocol_errors == 2


def test_closed_by_a_rank_that_restarted_counts_for_its_earlier_life_only():
    harness = Harness(2)
    harness.load_ready(spec("a", [0, 1]))
    harness.pool.rank_unreachable(1, harness.now)
    harness.rank(hello(1, 2, generations=[1]))
    closed = EngineClosed(
        rank=1, generation=1, phases={}, memory_before_bytes=0, memory_after_bytes=0
    )
    harness.rank(closed)
    assert harness.row("a").phase == "lost"  # rank 0 has not answered yet
    assert harness.state.engines[1].waiting == {0}
