"""Watching a real controller: every switch is told, whoever makes it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.process.test_controller import PoolFixture, pool, wait_until  # noqa: F401
from vllm_resident import AsyncClient, Client, PoolUnreachable
from vllm_resident.messages import (
    CallFailed,
    EndWatch,
    Progress,
    SwitchEnded,
    SwitchMoved,
    SwitchReport,
    UnloadEngine,
    WatchPool,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]


async def test_another_clients_switch_is_told_as_it_gets_on(
    pool: PoolFixture,  # noqa: F811
) -> None:
    pool.up(2)
    async with (
        AsyncClient(pool.endpoint) as client,
        AsyncClient(pool.endpoint) as other,
    ):
        await other.load("before", "/m/b", ranks=[0], asleep=True)
        async with contextlib.aclosing(client.watch()) as seen:
            first = await anext(seen)
            assert isinstance(first, SwitchEnded)
            assert first.engines == ["before"]
            arguments = {"tensor_parallel_size": 2, "take_s": 0.5}
            load = asyncio.create_task(
                other.load("wide", "/m/w", ranks=[0, 1], **arguments)
            )
            moved = []
            async for message in seen:
                if isinstance(message, SwitchEnded):
                    break
                moved.append(message)
        report = await load
    assert isinstance(report, SwitchReport)
    assert message.report == report
    assert message.sequence == first.sequence + 1
    assert all(isinstance(each, SwitchMoved) for each in moved)
    assert {each.switch.number for each in moved} == {message.number}
    for rank in (0, 1):
        phases = [each.phase for each in moved[-1].switch.moves[0].rank_phases[rank]]
        began = [each.began_s for each in moved[-1].switch.moves[0].rank_phases[rank]]
        assert phases[-5:] == list(report.engines[0].rank_phases[rank])
        assert began == sorted(began)


def test_who_has_left_is_told_no_more(pool: PoolFixture) -> None:  # noqa: F811
    peer, _ = pool.up(1)
    watcher = pool.client()
    call = watcher.send(WatchPool)
    peer.load("a", [0])
    while not isinstance(message := watcher.receive(), SwitchEnded):
        assert isinstance(message, SwitchMoved | Progress)
        assert message.call == call
    watcher.send(EndWatch)  # of another number: of no call
    watcher.calls = call - 1
    watcher.send(EndWatch)
    watcher.status()  # it was read
    peer.done(UnloadEngine, name="a", timeout_s=10.0)
    with pytest.raises(AssertionError, match="no answer"):
        watcher.receive(1.5)


def test_a_watch_ends_with_its_pool(pool: PoolFixture) -> None:  # noqa: F811
    pool.up(1)
    watcher = pool.client()
    watcher.send(WatchPool)
    watcher.status()
    with Client(pool.endpoint) as client:
        client.shutdown()
    while isinstance(message := watcher.receive(), Progress):
        pass
    assert isinstance(message, CallFailed)
    assert "stopping" in message.error.message


def test_what_was_counted_outlives_engines_and_ranks(pool: PoolFixture) -> None:  # noqa: F811
    _peer, ranks = pool.up(2)
    with Client(pool.endpoint) as client:
        client.load("a", "/m/a", ranks=[0])
        client.generate("a", "hello", max_tokens=5)
        wait_until(
            "all steps are told",
            lambda: [each.num_steps for each in client.totals().steps] == [5],
        )
        ranks[1].kill()
        wait_until("it is lost", lambda: client.totals().ranks)
        client.unload("a")
        pool.rank(1, 2, "--incarnation", "1")
        wait_until("it is back", lambda: client.status().phase == "ready")
        totals = client.totals()
        (steps,) = totals.steps
        assert (steps.model, steps.rank, steps.num_steps) == ("a", 0, 5)
        assert steps.seconds == pytest.approx(1.25)
        (rank,) = [each for each in totals.ranks if each.num_losses]
        assert (rank.rank, rank.num_losses, rank.num_restarts) == (1, 1, 1)
        kinds = {(each.action, each.result) for each in totals.switches}
        assert kinds == {("load", "done"), ("unload", "done")}
    with Client(pool.endpoint, connect_timeout_s=0.5) as client:
        pool.processes[0].kill()
        with pytest.raises(PoolUnreachable):
            client.totals()
