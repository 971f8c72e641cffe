"""The rank's control thread: the channel to the controller, heartbeats, last resorts.

Runs beside the main thread, which may be inside a load or a collective for minutes, and
never touches engines or devices itself. It hands commands to the main thread and sends
what that one reports; it answers the controller in the meantime, aborts a world that
the controller gave up, and ends the process when the main thread is stuck past a
deadline, the launcher is gone, or the controller stays silent.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import zmq

from vllm_resident.errors import ProtocolError
from vllm_resident.messages import (
    DropEngine,
    ExitRank,
    FromRank,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    RankGauges,
    ToRankMessage,
)
from vllm_resident.rank.world import World
from vllm_resident.transport import Decoder, encode, open_socket

log = logging.getLogger("vllm_resident.rank")

HEARTBEAT_S = 1.0
CONTROLLER_SILENCE_S = 30.0
EXIT_GRACE_S = 10.0
STUCK_STATUS = 70


class Mailbox:
    """A queue of objects between two threads with a file descriptor to poll on."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, item: object) -> None:
        self._queue.put(item)
        os.eventfd_write(self.fd, 1)

    def take_all(self) -> list[Any]:
        """Everything that is there, without waiting."""
        if self._queue.empty():
            return []
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        items = []
        while True:
            try:
                items.append(self._queue.get_nowait())
            except Empty:
                return items


@dataclass
class _Guard:
    """A deadline by which the main thread must have done something, or the end."""

    deadline: float
    what: str


class Control(threading.Thread):
    """The control thread of one rank. `inbox` holds messages for the main thread."""

    def __init__(
        self,
        endpoint: str,
        hello: Callable[[], Hello],
        gauges: Callable[[], RankGauges],
        before_exit: Callable[[], None],
    ) -> None:
        super().__init__(name="control", daemon=True)
        self.inbox = Mailbox()
        self._outbox = Mailbox()
        self._endpoint = endpoint
        self._hello = hello
        self._gauges = gauges
        self._before_exit = before_exit
        self._launcher = os.getppid()
        self._dropped: set[int] = set()
        self._worlds: dict[int, World] = {}
        self._guards: dict[object, _Guard] = {}
        self._lock = threading.Lock()
        self._decoder: Decoder[ToRankMessage] = Decoder(ToRankMessage)

    def send(self, message: FromRank) -> None:
        """Queue `message` for the controller; any thread, never blocks."""
        self._outbox.put(message)

    def send_first(self, message: FromRank) -> None:
        """Send `message` and wait until it is on its way, so that what this thread does
        next cannot be heard of before it."""
        sent = threading.Event()
        self._outbox.put(message)
        self._outbox.put(sent)
        sent.wait(HEARTBEAT_S)

    def is_dropped(self, generation: int) -> bool:
        """Whether the controller gave the generation up; any thread."""
        return generation in self._dropped

    def watch_world(self, generation: int, world: World) -> None:
        """Abort `world` when the controller gives its generation up."""
        with self._lock:
            self._worlds[generation] = world
        if generation in self._dropped:
            world.abort()

    def forget(self, generation: int) -> None:
        """The main thread holds nothing of the generation any more."""
        with self._lock:
            self._worlds.pop(generation, None)
            self._guards.pop(generation, None)
        self._dropped.discard(generation)

    def expect_exit(self, what: str) -> None:
        """End the process if it has not ended by itself within the grace time."""
        self._guard("exit", EXIT_GRACE_S, what)

    def _guard(self, key: object, timeout_s: float, what: str) -> None:
        with self._lock:
            self._guards[key] = _Guard(time.monotonic() + timeout_s, what)

    def run(self) -> None:
        context = zmq.Context()
        socket = open_socket(context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, f"rank-{self._hello().rank}".encode())
        socket.connect(self._endpoint)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._outbox.fd, zmq.POLLIN)
        self._post(socket, self._hello())
        heard = next_beat = time.monotonic()
        while True:
            events = dict(
                poller.poll(max(0, int(1000 * (next_beat - time.monotonic()))))
            )
            for item in self._outbox.take_all():
                if isinstance(item, threading.Event):
                    item.set()
                else:
                    self._post(socket, item)
            if socket in events:
                heard = time.monotonic()
                self._receive(socket)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_S
                self._beat(socket, heard)

    def _beat(self, socket: zmq.Socket[bytes], heard: float) -> None:
        hello = self._hello()
        self._post(
            socket,
            Heartbeat(
                rank=hello.rank, incarnation=hello.incarnation, gauges=self._gauges()
            ),
        )
        now = time.monotonic()
        if os.getppid() != self._launcher:
            self._end(1, "the launcher is gone")
        if now - heard > CONTROLLER_SILENCE_S:
            self._end(1, f"no word from the controller for {now - heard:.0f} s")
        with self._lock:
            late = [guard for guard in self._guards.values() if now > guard.deadline]
        if late:
            self._end(STUCK_STATUS, f"stuck: {late[0].what}")

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            try:
                message = self._decoder.decode(socket.recv_multipart())
            except ProtocolError as error:
                log.error("event=bad_frame error=%s", error)
                continue
            match message:
                case HeartbeatAck():
                    pass
                case HelloAgain():
                    self._post(socket, self._hello())
                case _:
                    self._intercept(message)
                    self.inbox.put(message)

    def _intercept(self, message: ToRankMessage) -> None:
        """What cannot wait for the main thread to come round."""
        if isinstance(message, ExitRank):
            self.expect_exit(f"told to exit ({message.reason})")
        if not isinstance(message, DropEngine):
            return
        self._dropped.add(message.generation)
        self._guard(
            message.generation,
            message.timeout_s,
            f"generation {message.generation} not given up within "
            f"{message.timeout_s:g} s ({message.reason})",
        )
        with self._lock:
            world = self._worlds.get(message.generation)
        if world is not None:
            world.abort()

    def _post(self, socket: zmq.Socket[bytes], message: msgspec.Struct) -> None:
        try:
            socket.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # Ten thousand messages unread: the controller is gone or hopeless.
            self._end(1, "the controller does not read")
        except ProtocolError as error:
            log.error("event=message_too_large error=%s", error)

    def _end(self, status: int, reason: str) -> None:
        """End the process from here: the main thread cannot be interrupted."""
        log.error("event=exit status=%d reason=%r", status, reason)
        logging.shutdown()
        self._before_exit()
        os._exit(status)
