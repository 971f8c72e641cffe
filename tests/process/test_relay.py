"""A relay between a frontend's unix sockets and a leader over TCP, for real."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from vllm_resident import transport
from vllm_resident.gateway.relay import Relay
from vllm_resident.keys import PoolKey

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]

IDENTITY = (0).to_bytes(2, "little")
COMES_MS = 5000
STAYS_AWAY_MS = 300


class Ends:
    """The sockets that `AsyncLLM` binds, and those that a leader connects."""

    def __init__(self, folder: Path, key: PoolKey, leader_key: PoolKey | None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        into, out = f"ipc://{folder}/in.sock", f"ipc://{folder}/out.sock"
        self.ended = threading.Event()
        self.relay = Relay(into, out, self.ended.set, "127.0.0.1", key)
        # The leader is told before the frontend is built.
        self.received = transport.open_socket(self.context, zmq.DEALER)
        self.sent = transport.open_socket(self.context, zmq.PUSH)
        transport.connect(self.received, self.relay.input_address, leader_key)
        transport.connect(self.sent, self.relay.output_address, leader_key)
        self.received.send(b"ready")
        self.input = self.context.socket(zmq.ROUTER)
        self.output = self.context.socket(zmq.PULL)
        self.input.bind(into)
        self.output.bind(out)

    def close(self) -> None:
        self.relay.close()
        self.relay.close()
        self.context.destroy(linger=0)


@pytest.fixture
def key() -> PoolKey:
    return PoolKey(*zmq.curve_keypair())


@pytest.fixture
def ends(tmp_path: Path, key: PoolKey) -> Iterator[Ends]:
    ends = Ends(tmp_path, key, key)
    yield ends
    ends.close()


def test_frames_pass_both_ways_as_they_are(ends: Ends) -> None:
    assert ends.input.poll(COMES_MS)
    assert ends.input.recv_multipart() == [IDENTITY, b"ready"]
    for number in range(500):
        frames = [b"\x00", str(number).encode(), b"", os.urandom(number)]
        ends.input.send_multipart([IDENTITY, *frames])
        ends.sent.send_multipart(frames)
        for end in (ends.received, ends.output):
            assert end.poll(COMES_MS)
            assert end.recv_multipart() == frames


def test_a_leader_without_the_key_reaches_nobody(tmp_path: Path, key: PoolKey) -> None:
    ends = Ends(tmp_path, key, PoolKey(*zmq.curve_keypair()))
    try:
        assert not ends.input.poll(STAYS_AWAY_MS)
    finally:
        ends.close()


def test_that_a_leader_has_gone_is_told(ends: Ends) -> None:
    """What is sent to it then is lost."""
    assert ends.input.poll(COMES_MS)
    ends.received.close()
    deadline = time.monotonic() + 20
    while not ends.ended.is_set():
        assert time.monotonic() < deadline
        ends.input.send_multipart([IDENTITY, b"lost"])
        time.sleep(0.02)


def test_nothing_is_left_of_a_relay(tmp_path: Path, key: PoolKey) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    ended = threading.Event()
    none, here = "ipc:///none", f"ipc://{tmp_path}/sock"
    Relay(none, none, ended.set, "127.0.0.1", key).close()
    before = held()
    for _ in range(5):
        Relay(here, here, ended.set, "127.0.0.1", key).close()
    assert not ended.is_set()
    # A thread that was joined may be in the kernel's list for a moment.
    deadline = time.monotonic() + 20
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (held(), before)
        time.sleep(0.02)


def test_an_address_that_is_not_this_machines_leaves_nothing(key: PoolKey) -> None:
    before = len(os.listdir("/proc/self/task"))
    with pytest.raises(zmq.ZMQError):
        Relay("ipc:///none", "ipc:///none", lambda: None, "192.0.2.1", key)
    deadline = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
