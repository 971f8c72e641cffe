"""Attachments of frontends, as the controller keeps them: no sockets, no clock."""

from __future__ import annotations

import pytest

from tests.unit.controller_harness import ALICE, BOB, Harness, failed, spec
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    AttachFrontend,
    CallFailed,
    ConnectFrontend,
    DetachFrontend,
    DisconnectFrontend,
    FrontendAttached,
    FrontendConnected,
    FrontendDetached,
    FrontendRequests,
    Progress,
    SuspendEngine,
)

INTO, OUT = "ipc:///tmp/in.sock", "ipc:///tmp/out.sock"


def attach(harness: Harness, engine: str = "a", client: bytes = ALICE) -> int:
    call = harness.call()
    command = AttachFrontend(
        call=call, engine=engine, input_address=INTO, output_address=OUT, timeout_s=30.0
    )
    harness.client(command, client)
    return call


def attached(harness: Harness, engine: str = "a", client: bytes = ALICE) -> int:
    """Attach, and have the leader answer."""
    call = attach(harness, engine, client)
    ((rank, connect),) = harness.to_ranks()
    assert isinstance(connect, ConnectFrontend)
    harness.rank(
        FrontendConnected(
            rank=rank, generation=connect.generation, frontend=connect.frontend
        )
    )
    return call


def count(harness: Harness, num_requests: int, engine: str = "a") -> None:
    there = harness.engine(engine)
    harness.rank(
        FrontendRequests(
            rank=there.leader, generation=there.generation, num_requests=num_requests
        )
    )


def phases(harness: Harness) -> list[str]:
    return [p.phase for p in harness.to_clients(Progress)]


def test_the_leader_connects_and_the_client_hears_of_what():
    harness = Harness()
    harness.load_ready(spec("a", [2, 3], tensor_parallel_size=2))
    call = attach(harness)
    ((rank, connect),) = harness.to_ranks()
    assert rank == 2
    assert connect == ConnectFrontend(
        generation=1, frontend=1, input_address=INTO, output_address=OUT
    )
    harness.rank(FrontendConnected(rank=2, generation=1, frontend=1))
    (answer,) = harness.to_clients()
    assert answer == FrontendAttached(
        call=call, generation=1, spec=harness.engine("a").spec, phase="ready"
    )


def test_what_cannot_be_attached_is_refused_and_changes_nothing():
    harness = Harness()
    harness.load(spec("building"))
    before = harness.snapshot()
    for engine in ("nobody", "building"):
        attach(harness, engine)
        assert harness.error().kind == "CommandRejected"
    harness.client(
        AttachFrontend(
            call=9, engine="building", timeout_s=1.0,
            input_address="tcp://10.0.0.1:5", output_address=OUT,
        )
    )  # fmt: skip
    assert "beyond this machine" in harness.error().message
    assert harness.state == before


def test_a_leader_that_cannot_connect_fails_the_call():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = attach(harness)
    error = ErrorInfo("CommandRejected", "no such socket")
    harness.rank(FrontendConnected(rank=0, generation=1, frontend=1, error=error))
    assert harness.to_clients() == [CallFailed(call=call, error=error)]
    assert not harness.state.frontends


def test_a_leader_that_does_not_answer_is_given_up():
    harness = Harness()
    harness.load_ready(spec("a"))
    attach(harness)
    harness.heartbeats()
    harness.tick(1.0)
    assert phases(harness) == ["ready"]  # the client sees that the pool lives
    for _ in range(30):
        harness.heartbeats()
        harness.tick(1.0)
        if not harness.state.frontends:
            break
    assert harness.error().kind == "RankTimeout"
    assert [type(m) for _, m in harness.to_ranks()] == [DisconnectFrontend]


def test_phases_are_told_when_they_change_and_each_second():
    harness = Harness()
    harness.load_ready(spec("a"))
    attached(harness)
    told = []
    harness.sleep("a")
    told += phases(harness)
    harness.answer_all()
    told += phases(harness)
    harness.wake_up("a")
    told += phases(harness)
    harness.answer_all()
    told += phases(harness)
    # Of the two commands' own progress there is none: phases of the engine only.
    of_engine = [p for p in told if p in ("suspending", "asleep", "resuming", "ready")]
    assert of_engine[0] == "suspending"
    assert "asleep" in of_engine
    assert of_engine[-1] == "ready"
    harness.heartbeats()
    harness.tick(1.0)
    assert phases(harness) == ["ready"]
    harness.heartbeats()
    harness.tick(0.25)
    assert phases(harness) == []


def test_draining_waits_for_requests_of_frontends():
    harness = Harness()
    harness.load_ready(spec("a"))
    attached(harness)
    count(harness, 2)
    assert harness.row("a").num_requests == 2
    harness.sleep("a", drain_s=20.0)
    assert harness.engine("a").phase.value == "draining"
    assert not harness.to_ranks(SuspendEngine)
    count(harness, 0)
    assert harness.to_ranks(SuspendEngine)


def test_draining_ends_at_its_deadline():
    harness = Harness()
    harness.load_ready(spec("a"))
    attached(harness)
    count(harness, 1)
    harness.sleep("a", drain_s=1.0)
    harness.heartbeats()
    harness.tick(1.1)
    assert harness.to_ranks(SuspendEngine)


@pytest.mark.parametrize("way", ["detach", "gone"])
def test_who_leaves_is_disconnected(way: str):
    harness = Harness()
    harness.load_ready(spec("a"))
    call = attached(harness)
    attached(harness, client=BOB)
    if way == "detach":
        harness.client(DetachFrontend(call=call))
        (ended,) = harness.to_clients()
        assert isinstance(ended, FrontendDetached)
    else:
        harness.effects = harness.pool.client_gone(ALICE)
        assert harness.to_clients() == []
    assert harness.to_ranks() == [(0, DisconnectFrontend(generation=1, frontend=1))]
    assert list(harness.state.frontends) == [2]
    harness.client(DetachFrontend(call=call))  # again: there is nothing to do
    assert harness.effects == []


def test_an_unloaded_engine_ends_what_is_attached_to_it():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = attached(harness)
    harness.unload("a")
    harness.answer_all()
    ended = [m for m in harness.to_clients() if isinstance(m, FrontendDetached)]
    assert [m.call for m in ended] == [call]
    assert "unloaded" in ended[0].reason


def test_a_failed_step_and_a_lost_rank_end_it_with_their_error():
    harness = Harness()
    harness.load_ready(spec("a", [0]))
    harness.load_ready(spec("b", [1]))
    call = attached(harness, "a")
    harness.rank(failed(0, 1))
    assert [m.call for m in harness.to_clients(CallFailed)] == [call]
    call = attached(harness, "b")
    harness.kill(1)
    (lost,) = harness.to_clients(CallFailed)
    assert isinstance(lost, CallFailed)
    assert (lost.call, lost.error.kind) == (call, "RankLost")


def test_a_stopping_pool_ends_all():
    harness = Harness()
    harness.load_ready(spec("a"))
    call = attached(harness)
    harness.effects = harness.pool.stop(10.0, harness.now)
    assert [m.call for m in harness.to_clients(CallFailed)] == [call]
    assert not harness.state.frontends


def test_only_the_leader_is_believed():
    harness = Harness()
    harness.load_ready(spec("a", [0, 1], tensor_parallel_size=2))
    harness.rank(FrontendRequests(rank=1, generation=1, num_requests=3))
    assert harness.row("a").num_requests == 0
    assert harness.status().num_stale_messages == 1
