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
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from vllm_resident.errors import ProtocolError
from vllm_resident.messages import (
    DropEngine,
    EngineClosed,
    ExitRank,
    FromRank,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    RankGauges,
    ReadCheckpoint,
    RequestFailed,
    RequestOutput,
    ToRankMessage,
)
from vllm_resident.rank import mapping, prefetch
from vllm_resident.rank.device import messaging_context, roam
from vllm_resident.transport import Decoder, connect, encode, open_socket

if TYPE_CHECKING:
    from vllm_resident.keys import PoolKey
    from vllm_resident.rank.world import World

log = logging.getLogger("vllm_resident.rank")

HEARTBEAT_S = 1.0
CONTROLLER_SILENCE_S = 30.0
EXIT_GRACE_S = 5.0
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
        # Always, and first: an item can be seen before its event is written, and an
        # event left unread would make every later poll return at once.
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        items = []
        while True:
            try:
                items.append(self._queue.get_nowait())
            except Empty:
                return items


@dataclass(frozen=True)
class _Guard:
    """A deadline by which the main thread must have done something, or the end; in the
    time that this thread has lived.

    With a `generation`: of giving that up, which waits for the end of a command that
    the main thread carries out for another.
    """

    deadline: float
    timeout_s: float
    what: str
    status: int = STUCK_STATUS
    generation: int | None = None


class Control(threading.Thread):
    """The control thread of one rank. `inbox` holds messages for the main thread.

    `signal_fd` is for `signal.set_wakeup_fd`: the byte that the interpreter writes
    there for SIGTERM ends the rank, whatever the main thread is busy with.
    """

    def __init__(
        self,
        rank: int,
        incarnation: int,
        endpoint: str,
        hello: Callable[[], Hello],
        gauges: Callable[[], RankGauges],
        key: PoolKey | None = None,
    ) -> None:
        super().__init__(name="control", daemon=True)
        self.inbox = Mailbox()
        self._outbox = Mailbox()
        self._signals, self.signal_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rank = rank
        self._incarnation = incarnation
        self._endpoint = endpoint
        self._key = key
        self._hello = hello
        self._gauges = gauges
        self._launcher = os.getppid()
        self._num_unanswered = 0
        # Seconds, but for those in which the process was itself suspended.
        self._lived_s = 0.0
        self._exiting = False
        # What the main thread may hold something of; what was given up; and of that,
        # what it held nothing of and the controller was told so.
        self._begun: set[int] = set()
        self._dropped: set[int] = set()
        self._told: set[int] = set()
        self._worlds: dict[int, World] = {}
        self._guards: dict[int | None, _Guard] = {}
        # What the main thread works on, each within the one before.
        self._at_work: tuple[int, ...] = ()
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
        """Whether the generation was given up, or the whole rank; any thread."""
        return self._exiting or generation in self._dropped

    def begin(self, generation: int) -> bool:
        """The main thread takes it up; False if it was given up before."""
        with self._lock:
            if self.is_dropped(generation):
                return False
            self._begun.add(generation)
            return True

    def has_told_end(self, generation: int) -> bool:
        """Whether the controller was told already that nothing is held of it."""
        return generation in self._told

    @contextmanager
    def at_work_on(self, generation: int) -> Iterator[None]:
        """The main thread carries out a command for the generation; or, within one,
        takes a step of it."""
        before = self._at_work
        self._at_work = (*before, generation)
        try:
            yield
        finally:
            self._at_work = before

    def watch_world(self, generation: int, world: World) -> None:
        """Abort `world` when its generation is given up, also if it was already."""
        with self._lock:
            self._worlds[generation] = world
        if self.is_dropped(generation):
            world.abort()

    def forget(self, generation: int) -> None:
        """The main thread holds nothing of the generation any more."""
        with self._lock:
            self._worlds.pop(generation, None)
            self._guards.pop(generation, None)
            for each in (self._begun, self._dropped, self._told):
                each.discard(generation)

    def _guard(
        self,
        timeout_s: float,
        what: str,
        status: int = STUCK_STATUS,
        generation: int | None = None,
    ) -> None:
        # What it has lived is counted at a beat.
        deadline = self._lived_s + HEARTBEAT_S + timeout_s
        with self._lock:
            self._guards[generation] = _Guard(
                deadline, timeout_s, what, status, generation
            )

    def _late(self) -> list[_Guard]:
        """Guards that are over; those that wait for something else are put off.

        What is waited for has a deadline of its own: past it the controller gives that
        up too, which is then guarded itself.
        """
        working, now = self._at_work, self._lived_s
        with self._lock:
            for key, guard in self._guards.items():
                generation = guard.generation
                if working and generation is not None and generation not in working:
                    self._guards[key] = replace(guard, deadline=now + guard.timeout_s)
            return [guard for guard in self._guards.values() if now > guard.deadline]

    def run(self) -> None:
        try:
            self._serve()
        # Without this thread nobody would hear of the rank or end it: it ends now.
        except Exception:
            log.exception("event=control_failed rank=%d", self._rank)
            self._end(1, "the control thread failed")

    def _serve(self) -> None:
        roam()
        context = messaging_context()
        socket = open_socket(context, zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, f"rank-{self._rank}".encode())
        connect(socket, self._endpoint, self._key)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._outbox.fd, zmq.POLLIN)
        poller.register(self._signals, zmq.POLLIN)
        self._post(socket, self._hello())
        next_beat = last_beat = time.monotonic()
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
                self._num_unanswered = 0
                self._receive(socket)
            if self._signals in events:
                self._signalled(os.read(self._signals, 64))
            now = time.monotonic()
            if now >= next_beat:
                self._lived_s += min(now - last_beat, 2 * HEARTBEAT_S)
                next_beat, last_beat = now + HEARTBEAT_S, now
                self._beat(socket)

    def _beat(self, socket: zmq.Socket[bytes]) -> None:
        self._post(
            socket,
            Heartbeat(
                rank=self._rank, incarnation=self._incarnation, gauges=self._gauges()
            ),
        )
        # Beats, not seconds: a process that was itself suspended has heard nothing
        # because it said nothing.
        self._num_unanswered += 1
        if os.getppid() != self._launcher:
            self._end(1, "the launcher is gone")
        if self._num_unanswered * HEARTBEAT_S > CONTROLLER_SILENCE_S:
            self._end(1, f"no word from the controller for {CONTROLLER_SILENCE_S:g} s")
        if late := self._late():
            self._end(late[0].status, f"stuck: {late[0].what}")

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
                case ReadCheckpoint():
                    prefetch.start(self._rank, message, self.send)
                case _:
                    self._deliver(message)

    def _signalled(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            self._deliver(ExitRank(reason="SIGTERM"))

    def _deliver(self, message: ToRankMessage) -> None:
        """Do what cannot wait for the main thread to come round, then tell it."""
        match message:
            case ExitRank(pid=pid) if pid not in (0, os.getpid()):
                log.warning("event=exit_of_another pid=%d", pid)
                return
            case ExitRank():
                self._call_off_builds(message)
            case DropEngine():
                self._call_off(message)
        self.inbox.put(message)

    def _call_off_builds(self, message: ExitRank) -> None:
        """A ready engine may finish its step; a build has nothing left to wait for."""
        self._exiting = True
        self._guard(
            EXIT_GRACE_S,
            f"told to exit ({message.reason})",
            int(message.failed),
        )
        with self._lock:
            worlds = list(self._worlds.values())
        for world in worlds:
            world.call_off()

    def _call_off(self, message: DropEngine) -> None:
        generation, working = message.generation, self._at_work
        with self._lock:
            self._dropped.add(generation)
            world = self._worlds.get(generation)
            holds_nothing = generation not in {*self._begun, *working}
            if working and holds_nothing:
                self._told.add(generation)
        # The main thread may not come round to say so for minutes.
        if working and holds_nothing:
            used = self._gauges().memory_used_bytes
            self.send(
                EngineClosed(
                    rank=self._rank,
                    generation=generation,
                    phases={},
                    memory_before_bytes=used,
                    memory_after_bytes=used,
                )
            )
            return
        self._guard(
            message.timeout_s,
            f"generation {generation} not given up within "
            f"{message.timeout_s:g} s ({message.reason})",
            generation=generation,
        )
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
            if isinstance(message, RequestOutput):
                # Whoever waits for it must hear that it will not come.
                failure = RequestFailed(
                    rank=message.rank,
                    generation=message.generation,
                    request=message.request,
                    error=error.to_info(),
                )
                self._post(socket, failure)

    def _end(self, status: int, reason: str) -> None:
        """End the process from here: the main thread cannot be interrupted."""
        log.error("event=exit status=%d reason=%r", status, reason)
        logging.shutdown()
        with suppress(OSError):
            for world in list(self._worlds.values()):
                mapping.unlink_shared(world.segment_token)
        os._exit(status)
