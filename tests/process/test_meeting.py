"""What the ranks of a world say to each other before they form it.

Each on a thread with a client of its own of a real TCPStore, as the launcher has one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from vllm_resident.errors import RankTimeout
from vllm_resident.rank import meeting
from vllm_resident.rank import store as stores
from vllm_resident.rank.meeting import Meeting
from vllm_resident.rank.store import CancellableStore, StoreCancelled

pytestmark = pytest.mark.process

IDENTITY = "7"
PATIENCE_S = 20.0
SHORT_S = 0.2


class Ranks:
    """The sides of a world's meeting, by rank."""

    def __init__(self, server: dist.TCPStore, size: int) -> None:
        self.server = server
        self.sides = [self._side(server, rank, size) for rank in range(size)]

    @staticmethod
    def _side(server: dist.TCPStore, rank: int, size: int) -> Meeting:
        client = dist.TCPStore(
            server.host, server.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=PATIENCE_S),
        )  # fmt: skip
        store = CancellableStore(client, IDENTITY, PATIENCE_S)
        return Meeting(IDENTITY, rank, size, store)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


class Clock:
    """The time, which a test can put forward."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (meeting, stores):
        monkeypatch.setattr(module, "time", clock)
    return clock


def exchange(side: Meeting, mine: str) -> list[str]:
    return side.exchange("point", mine, str, time.monotonic() + PATIENCE_S)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_everyone_hears_what_each_said(
    server: dist.TCPStore, threads: ThreadPoolExecutor, size: int
) -> None:
    ranks = Ranks(server, size)
    words = [f"of rank {rank}\n" for rank in range(size)]
    heard = list(threads.map(exchange, ranks.sides, words))
    assert heard == [words] * size
    for side in ranks.sides:
        side.store.delete_written()
    assert not any(
        server.check([f"{IDENTITY}/point/{key}"]) for key in ("said", "count")
    )


def test_who_does_not_come_is_named(
    server: dist.TCPStore, threads: ThreadPoolExecutor
) -> None:
    def wait(side: Meeting) -> None:
        def time_is_up_when_two_are_there() -> None:
            if side.store.peek("point/count") == b"2":
                raise dist.DistStoreError

        deadline = time.monotonic() + PATIENCE_S
        side.exchange("point", "", str, deadline, time_is_up_when_two_are_there)

    first, _, third, _ = Ranks(server, 4).sides
    for waiting in [threads.submit(wait, side) for side in (first, third)]:
        with pytest.raises(RankTimeout, match=r"ranks \[1, 3\] of world 7 did not"):
            waiting.result(PATIENCE_S)


def test_others_are_served_until_all_have_come(
    server: dist.TCPStore, threads: ThreadPoolExecutor
) -> None:
    first, second = Ranks(server, 2).sides
    turns = threading.Semaphore(0)
    heard = threads.submit(
        first.exchange, "point", "1", str, time.monotonic() + PATIENCE_S, turns.release
    )
    for _ in range(3):
        assert turns.acquire(timeout=PATIENCE_S)
    assert exchange(second, "2") == heard.result(PATIENCE_S) == ["1", "2"]


def test_a_meeting_is_not_missed_for_a_step_that_ends_after_the_deadline(
    server: dist.TCPStore, clock: Clock
) -> None:
    first, second = Ranks(server, 2).sides
    deadline = clock.monotonic() + PATIENCE_S

    def serve() -> None:
        second.store.append("point/said", b'[1,"2"]\n')
        second.store.add("point/count", 1)
        clock.ahead_s += 2 * PATIENCE_S

    assert first.exchange("point", "1", str, deadline, serve) == ["1", "2"]


def test_nor_is_a_hold(server: dist.TCPStore, clock: Clock) -> None:
    class Serving:
        is_held = False

        def waits_for_leaders(self) -> bool:
            return True

        def serve(self) -> None:
            self.is_held = True
            clock.ahead_s += 2 * PATIENCE_S

        def hold(self) -> bool:
            return self.is_held

    (side,) = Ranks(server, 1).sides
    side.hold(Serving(), clock.monotonic() + PATIENCE_S)


def test_a_rank_that_left_again_is_waited_for_until_the_wait_is_called_off(
    server: dist.TCPStore, threads: ThreadPoolExecutor
) -> None:
    # As one that fails as soon as all have met, here before the other has looked.
    first, second = Ranks(server, 2).sides
    original, has_left = first.store.peek, threading.Event()

    def peek_late(key: str) -> bytes | None:
        found = original(key)
        if key.endswith("count") and found == b"2":
            assert has_left.wait(PATIENCE_S)
        return found

    first.store.peek = peek_late  # type: ignore[method-assign]
    heard = threads.submit(exchange, first, "1")
    assert exchange(second, "2") == ["1", "2"]
    second.store.delete_written()
    has_left.set()
    time.sleep(SHORT_S)
    assert not heard.done()
    first.store.cancel()
    with pytest.raises(StoreCancelled):
        heard.result(PATIENCE_S)
    # What it said itself went with what the other had said: nothing is left.
    assert not server.check([f"{IDENTITY}/point/said"])


def test_looking_for_a_key_sets_none(server: dist.TCPStore) -> None:
    store = CancellableStore(server, IDENTITY, SHORT_S)
    before = server.num_keys()
    assert store.peek("key") is None
    assert server.num_keys() == before
    with pytest.raises(dist.DistStoreError, match=r"key did not appear .* 0\.2 s"):
        store.get("key")
    store.set("key", b"value")
    assert store.peek("key") == store.get("key") == b"value"
