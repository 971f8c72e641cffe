"""Ranks that fail, hang or die: said plainly, unwound everywhere, healed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pools import (
    ENGINE_ARGS,
    SAMPLING,
    is_alive,
    pids,
    running_pool,
    wait_until,
)
from vllm_resident import Client, RankLost, RankTimeout, ResidentError

# Before it a rank of this machine is not lost for saying nothing.
SILENCE_S = 25.0
LONG = {"temperature": 0.0, "max_tokens": 240, "ignore_eos": True}


class Streaming(threading.Thread):
    """A stream in a thread of its own, with what it ended in."""

    def __init__(self, client: Client, engine: str) -> None:
        super().__init__(daemon=True)
        self._client, self._engine = client, engine
        self.started = threading.Event()
        self.num_pieces = 0
        self.leave = False
        self.error: ResidentError | None = None
        self.ended_at = 0.0

    def run(self) -> None:
        try:
            while not self.leave:
                for _ in self._client.stream(self._engine, "hello", LONG):
                    self.num_pieces += 1
                    self.started.set()
        except ResidentError as error:
            self.error = error
            self.ended_at = time.monotonic()


@pytest.fixture(scope="module")
def healing_pool(
    pool_folder: Path, checkpoints: dict[str, str]
) -> Iterator[tuple[Client, str, str]]:
    """A pool whose ranks are lost and come back, and two models."""
    patch = pytest.MonkeyPatch()
    patch.setenv(
        "VLLM_RESIDENT_FAULTS",
        '[{"rank": 1, "phase": "load_model", "engine": "hangs", "action": "hang"}]',
    )
    with running_pool("failures", pool_folder) as client:
        patch.undo()
        yield client, checkpoints["llama"], checkpoints["qwen2"]


@pytest.fixture
def healed(healing_pool: tuple[Client, str, str]) -> tuple[Client, str, str]:
    """It, complete and with nothing loaded."""
    client, *_ = healing_pool
    wait_until(client, lambda s: s.phase == "ready", 120, "the ranks' return")
    client.apply([])
    return healing_pool


@pytest.mark.timeout(300)
def test_a_killed_rank_is_named_and_comes_back_while_the_other_serves(
    healed: tuple[Client, str, str],
) -> None:
    """kill -9 of rank 1 in the middle of a stream of each rank."""
    client, llama, qwen2 = healed
    client.load("left", llama, ranks=[0], **ENGINE_ARGS)
    client.load("right", qwen2, ranks=[1], **ENGINE_ARGS)
    expected = {
        name: client.generate(name, "hello", SAMPLING) for name in ("left", "right")
    }
    left, right = Streaming(client, "left"), Streaming(client, "right")
    for stream in (left, right):
        stream.start()
        assert stream.started.wait(20)
    before, old = client.status(), pids(client)
    killed_at = time.monotonic()
    os.kill(old[1], signal.SIGKILL)
    right.join(40)
    assert isinstance(right.error, RankLost)
    assert right.error.rank == 1
    assert "ended" in str(right.error)  # seen, not concluded from silence
    assert right.ended_at - killed_at < SILENCE_S
    num_pieces = left.num_pieces
    status = wait_until(
        client,
        lambda s: (
            s.phase == "ready"
            and {e.phase for e in s.engines} == {"ready"}
            and len(s.engines) == 2
        ),
        120,
        "the return of the rank and its engine",
    )
    # The other never noticed: its process, its engine, its stream.
    assert left.error is None
    assert left.num_pieces > num_pieces
    now = {e.name: e.generation for e in status.engines}
    was = {e.name: e.generation for e in before.engines}
    assert now["left"] == was["left"]
    assert now["right"] != was["right"]
    assert pids(client)[0] == old[0]
    assert pids(client)[1] != old[1]
    lives = [rank.incarnation for rank in before.ranks]
    assert [rank.incarnation for rank in status.ranks] == [lives[0], lives[1] + 1]
    for name, completions in expected.items():
        assert client.generate(name, "hello", SAMPLING) == completions
    assert not is_alive(old[1])
    left.leave = True
    left.join(20)


@pytest.mark.timeout(300)
def test_a_killed_rank_of_a_tp2_engine_leaves_no_call_hanging(
    healed: tuple[Client, str, str],
) -> None:
    """The survivor spins in a shared-memory collective that nothing can abort: it is
    ended too, and the restarted ranks serve again."""
    client, llama, _ = healed
    client.load("both", llama, ranks=[0, 1], **ENGINE_ARGS)
    expected = client.generate("both", "hello", SAMPLING)
    stream = Streaming(client, "both")
    stream.start()
    assert stream.started.wait(20)
    killed_at = time.monotonic()
    os.kill(pids(client)[1], signal.SIGKILL)
    stream.join(40)
    assert isinstance(stream.error, RankLost)
    assert "ended" in str(stream.error)
    assert stream.ended_at - killed_at < SILENCE_S
    wait_until(
        client,
        lambda s: [e.phase for e in s.engines] == ["ready"],
        120,
        "the layout's return",
    )
    assert client.generate("both", "hello", SAMPLING) == expected


@pytest.mark.timeout(300)
def test_a_hanging_load_ends_at_its_deadline(
    healed: tuple[Client, str, str],
) -> None:
    """A rank that hangs is named, ended and restarted; the pool loads again."""
    client, llama, _ = healed
    # The first load of a process that has just started takes seconds to get there.
    client.load("warm-up", llama, ranks=[0, 1], **ENGINE_ARGS)
    client.unload("warm-up")
    with pytest.raises(RankTimeout, match="1") as raised:
        client.load("hangs", llama, ranks=[0, 1], timeout_s=10, **ENGINE_ARGS)
    assert raised.value.phase == "load_model"
    wait_until(client, lambda s: s.phase == "ready", 120, "the ranks' return")
    client.load("next", llama, ranks=[0, 1], **ENGINE_ARGS)
    assert client.generate("next", "hello", SAMPLING)
