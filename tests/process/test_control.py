"""The control thread of a rank whose main thread is stuck, against a real socket."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from vllm_resident.messages import (
    DropEngine,
    EngineClosed,
    ExitRank,
    Heartbeat,
    HeartbeatAck,
    Hello,
    RankMessage,
    ToRankMessage,
)
from vllm_resident.transport import Decoder, encode, open_socket

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

REPOSITORY = Path(__file__).parents[2]
START_S = 60
END_S = 10
IDENTITY = b"rank-0"


class StuckRank:
    """The process, and the controller's end of its channel."""

    def __init__(self, folder: Path, *state: int | str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = open_socket(self._context, zmq.ROUTER)
        endpoint = f"ipc://{folder}/control"
        self._socket.bind(endpoint)
        self._decoder: Decoder[RankMessage] = Decoder(RankMessage)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.process.control_rank", endpoint]
            + [str(each) for each in state],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def receive(self, timeout_s: float) -> RankMessage:
        assert self._socket.poll(timeout_s * 1000), "the rank said nothing"
        identity, *frames = self._socket.recv_multipart()
        assert identity == IDENTITY
        return self._decoder.decode(frames)

    def send(self, message: ToRankMessage) -> None:
        self._socket.send_multipart([IDENTITY, *encode(message)])

    def wait(self) -> int:
        """The exit status; heartbeats are answered meanwhile."""
        while self.process.poll() is None:
            if self._socket.poll(100):
                self._socket.recv_multipart()
                try:
                    self.send(HeartbeatAck())
                except zmq.ZMQError:
                    break
        return self.process.wait(END_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._socket.close()
        self._context.term()


@contextmanager
def stuck_rank(folder: Path, *state: int | str) -> Iterator[StuckRank]:
    """`state` as of `control_rank`."""
    rank = StuckRank(folder, *state)
    try:
        assert isinstance(rank.receive(START_S), Hello)
        assert isinstance(rank.receive(END_S), Heartbeat)
        yield rank
    finally:
        rank.close()


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[StuckRank]:
    with stuck_rank(tmp_path) as rank:
        yield rank


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda rank: rank.process.send_signal(signal.SIGTERM), 0),
        (lambda rank: rank.send(ExitRank(reason="done")), 0),
        (lambda rank: rank.send(ExitRank(reason="evicted", failed=True)), 1),
        (
            lambda rank: rank.send(
                DropEngine(generation=1, reason="too late", timeout_s=0.2)
            ),
            70,
        ),
    ],
    ids=["SIGTERM", "ExitRank", "ExitRank failed", "DropEngine"],
)
def test_a_stuck_rank_is_ended(
    rank: StuckRank, end: Callable[[StuckRank], None], status: int
) -> None:
    """Within its grace time, with the status of what was asked."""
    end(rank)
    assert rank.wait() == status


def drop(generation: int) -> DropEngine:
    return DropEngine(generation=generation, reason="too late", timeout_s=0.2)


def test_a_rank_at_work_on_another_engine_is_not_stuck(tmp_path: Path) -> None:
    """It can give one up only when it comes to it; what it works on has its own end."""
    with stuck_rank(tmp_path, 2, "has=1") as rank:
        rank.send(drop(1))
        for _ in range(10):
            assert isinstance(rank.receive(END_S), Heartbeat)
        rank.send(drop(2))
        assert rank.wait() == 70


def test_what_a_rank_at_work_on_another_engine_has_nothing_of_is_given_up(
    tmp_path: Path,
) -> None:
    """At once: who waits for it would wait for that other one."""
    with stuck_rank(tmp_path, 2) as rank:
        rank.send(drop(1))
        while isinstance(said := rank.receive(END_S), Heartbeat):
            rank.send(HeartbeatAck())
        assert isinstance(said, EngineClosed)
        assert (said.generation, said.memory_after_bytes) == (1, 1)


def test_a_rank_stuck_in_a_step_of_what_it_is_to_give_up_is_ended(
    tmp_path: Path,
) -> None:
    """Also where it took that step beside the build of another."""
    with stuck_rank(tmp_path, 2, 1) as rank:
        rank.send(drop(1))
        assert rank.wait() == 70


def test_a_rank_that_another_process_is_told_to_leave_stays(rank: StuckRank) -> None:
    """Two had its name for a moment."""
    another = os.getpid()
    rank.send(ExitRank(reason="not of this pool", failed=True, pid=another))
    rank.send(drop(1))
    assert rank.wait() == 70


def test_a_rank_that_was_suspended_has_time_left_to_give_up(rank: StuckRank) -> None:
    """As where the machine was paused: the main thread has not run either."""
    rank.send(DropEngine(generation=1, reason="too late", timeout_s=3.0))
    assert isinstance(rank.receive(END_S), Heartbeat)
    assert isinstance(rank.receive(END_S), Heartbeat)
    rank.process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)
    rank.process.send_signal(signal.SIGCONT)
    for _ in range(8):
        assert isinstance(rank.receive(END_S), Heartbeat)
    assert rank.wait() == 70


def test_a_mailbox_left_by_a_slow_sender_does_not_wake_its_reader_for_ever() -> None:
    from vllm_resident.rank.control import Mailbox

    box = Mailbox()
    box._queue.put("seen before its event is written")
    assert box.take_all() == ["seen before its event is written"]
    os.eventfd_write(box.fd, 1)
    assert box.take_all() == []
    assert select.select([box.fd], [], [], 0) == ([], [], [])
    box.put("next")
    assert select.select([box.fd], [], [], 0)[0] == [box.fd]
    assert box.take_all() == ["next"]
    os.close(box.fd)


def test_an_output_too_large_for_the_channel_fails_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_resident import transport
    from vllm_resident.messages import Completion, RequestFailed, RequestOutput
    from vllm_resident.rank.control import Control

    sent: list[msgspec.Struct] = []

    class FakeSocket:
        def send_multipart(self, frames: list[bytes], flags: int) -> None:
            sent.append(Decoder(RankMessage).decode(frames))

    monkeypatch.setattr(transport, "MAX_MESSAGE_BYTES", 1000)
    control = Control(0, 0, "inproc://nowhere", lambda: None, lambda: None)  # type: ignore[arg-type]
    completion = Completion(0, 0, "x" * 2000, [], "length")
    control._post(
        FakeSocket(),  # type: ignore[arg-type]
        RequestOutput(
            rank=0, generation=4, request=9, completions=[completion], done=True
        ),
    )
    (failure,) = sent
    assert isinstance(failure, RequestFailed)
    assert (failure.generation, failure.request) == (4, 9)
    assert failure.error.kind == "ProtocolError"
