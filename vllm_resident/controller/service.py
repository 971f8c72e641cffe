"""The controller's single loop: sockets, pidfds and timers in, effects out.

The only writer of the pool's state, so there are no locks. Nothing here decides
anything: an event is handed to `Pool`, what comes back is done.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import deque
from typing import Any

import msgspec
import zmq

from vllm_resident import keys
from vllm_resident.controller.effects import (
    Effect,
    Note,
    PhaseChanged,
    RecordTransition,
    SendToClient,
    SendToRank,
    StopController,
    WatchProcess,
)
from vllm_resident.controller.pool import Pool
from vllm_resident.errors import ProtocolError, ResidentError
from vllm_resident.journal import Journal, Transition
from vllm_resident.keys import PoolKey
from vllm_resident.messages import (
    CallFailed,
    ClientMessage,
    FromRank,
    RankMessage,
    ToController,
)
from vllm_resident.transport import (
    Decoder,
    bind,
    encode,
    open_socket,
    peek_call,
)

TICK_S = 0.25
# After so many messages the loop looks at processes and the clock again.
MESSAGES_PER_ROUND = 500
STOP_TIMEOUT_S = 10.0
# The last answers (`PoolStopped`, `ExitRank`) are on their way when the loop ends.
FAREWELL_MS = 1000
# So many failures of the controller's own code in a row, and it gives up.
MAX_FAILURES = 20
STATUS_BROKEN = 1

logger = logging.getLogger("vllm_resident.controller")


def rank_identity(rank: int) -> bytes:
    """What a rank's socket must call itself for its messages to count."""
    return b"rank-%d" % rank


class Service:
    """Binds `endpoint`; `run` returns the exit status. Not reusable, one thread.

    Every transition goes to `journal`. With `owner_pid`, the pool is stopped when that
    process ends; with a `key`, peers over TCP must hold it too.
    """

    def __init__(
        self,
        pool: Pool,
        endpoint: str,
        journal: Journal,
        owner_pid: int | None = None,
        key: PoolKey | None = None,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._effects: deque[Effect] = deque()
        self._watched: dict[int, tuple[int, int]] = {}  # pidfd -> rank, pid
        self._decoder: Decoder[ClientMessage | RankMessage] = Decoder(ToController)
        self._status: int | None = None
        self._stop_asked = False
        self._next_tick = 0.0
        self._poller = zmq.Poller()
        self._owner_fd = None if owner_pid is None else os.pidfd_open(owner_pid)
        if self._owner_fd is not None:
            self._poller.register(self._owner_fd, zmq.POLLIN)
        self._context: zmq.Context[Any] = zmq.Context()
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(keys.guarded(self._context, key))
        self._socket = open_socket(self._context, zmq.ROUTER)
        # A restarted rank must get its name back from a connection that is not yet
        # known to be dead.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = bind(self._socket, endpoint, key)
        self._poller.register(self._socket, zmq.POLLIN)

    def ask_stop(self) -> None:
        """Stop the pool in order; safe in a signal handler. No-op the second time."""
        self._stop_asked = True

    def run(self) -> int:
        failures = 0
        while self._status is None:
            try:
                self._round()
                failures = 0
            except Exception:  # the one broad except of this process
                logger.exception("event failed; the controller goes on")
                failures += 1
                if failures >= MAX_FAILURES:
                    logger.critical("giving up after %d failures", failures)
                    return STATUS_BROKEN
        return self._status

    def close(self) -> None:
        """Give back sockets and file descriptors. May be called twice."""
        for fd in (*self._watched, self._owner_fd):
            if fd is not None:
                os.close(fd)
        self._watched.clear()
        self._owner_fd = None
        self._socket.close(linger=FAREWELL_MS)
        self._guard.close()
        self._context.term()

    # ------------------------------------------------------------ events in

    def _round(self) -> None:
        next_at = min(self._next_tick, self._pool.look_again_at)
        wait_s = max(0.0, next_at - time.monotonic())
        ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
        # The dead first: what their peers say of it must find them lost.
        for fd in [fd for fd in ready if isinstance(fd, int)]:
            self._process_ended(fd)
        for _ in range(MESSAGES_PER_ROUND):
            if self._status is not None or not self._receive():
                break
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + TICK_S
            self._tick()
        if time.monotonic() >= self._pool.look_again_at:
            self._do(self._pool.look_again(time.monotonic()))

    def _tick(self) -> None:
        if self._stop_asked:
            self._stop_asked = False
            self._do(self._pool.stop(STOP_TIMEOUT_S, time.monotonic()))
        self._do(self._pool.tick(time.monotonic()))

    def _process_ended(self, fd: int) -> None:
        self._poller.unregister(fd)
        os.close(fd)
        if fd == self._owner_fd:
            self._owner_fd = None
            logger.info("owner=ended")
            self._stop_asked = True
            return
        rank, pid = self._watched.pop(fd)
        self._do(self._pool.rank_ended(rank, pid, time.monotonic()))

    def _receive(self) -> bool:
        """Take one message off the socket; False if there is none."""
        try:
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            message = self._decode(identity, frames)
        except ProtocolError as error:
            self._do(self._pool.frame_refused(identity, peek_call(frames), error))
            return True
        now = time.monotonic()
        if isinstance(message, FromRank):
            self._do(self._pool.rank_message(message, now))
            return True
        try:
            self._do(self._pool.client_message(identity, message, now))
        except Exception as error:
            self._answer_bug(identity, message.call, error)
            raise
        return True

    def _decode(
        self, identity: bytes, frames: list[bytes]
    ) -> ClientMessage | RankMessage:
        message = self._decoder.decode(frames)
        if isinstance(message, FromRank):
            if identity != rank_identity(message.rank):
                raise ProtocolError(
                    f"{type(message).__name__} of rank {message.rank} sent by another"
                )
        elif identity.startswith(b"rank-"):
            raise ProtocolError(f"{type(message).__name__} sent by a rank")
        return message

    def _answer_bug(self, client: bytes, call: int, error: Exception) -> None:
        text = f"the controller failed at this command: {error!r}; see its log"
        answer = CallFailed(call=call, error=ResidentError(text).to_info())
        self._do([SendToClient(client, answer)])

    # ------------------------------------------------------------ effects out

    def _do(self, effects: list[Effect]) -> None:
        """Do the effects in order; those that they lead to come after them."""
        self._effects.extend(effects)
        while self._effects:
            self._do_one(self._effects.popleft())

    def _do_one(self, effect: Effect) -> None:
        match effect:
            case SendToRank():
                self._send_to_rank(effect)
            case SendToClient():
                self._send_to_client(effect)
            case WatchProcess():
                self._watch(effect)
            case PhaseChanged():
                log_phase(effect)
            case RecordTransition():
                self._record(effect)
            case Note():
                logger.warning("%s", effect.text)
            case StopController():
                self._status = effect.status

    def _record(self, effect: RecordTransition) -> None:
        # The report's seconds are of a clock that nobody else has.
        age_s = time.monotonic() - effect.began
        self._journal.append(
            Transition(
                began_unix_s=time.time() - age_s,
                pool=self._pool.state.name,
                cause=effect.cause,
                report=effect.report,
            )
        )

    def _send_to_rank(self, effect: SendToRank) -> None:
        rank, message = effect.rank, effect.message
        try:
            is_sent = self._send(rank_identity(rank), message)
        except ProtocolError as error:
            self._effects.extend(
                self._pool.message_refused(rank, message, error, time.monotonic())
            )
            return
        if not is_sent:
            self._effects.extend(self._pool.rank_unreachable(rank, time.monotonic()))

    def _send_to_client(self, effect: SendToClient) -> None:
        client, message = effect.client, effect.message
        try:
            is_sent = self._send(client, message)
        except ProtocolError as error:
            answer = CallFailed(call=message.call, error=error.to_info())
            is_sent = self._send(client, answer)
        if not is_sent:
            self._effects.extend(self._pool.client_gone(client))

    def _send(self, identity: bytes, message: msgspec.Struct) -> bool:
        """False if the peer is gone (EHOSTUNREACH) or does not read (EAGAIN)."""
        frames = encode(message)
        try:
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def _watch(self, effect: WatchProcess) -> None:
        rank, pid = effect.rank, effect.pid
        if (rank, pid) in self._watched.values():
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._effects.extend(self._pool.rank_ended(rank, pid, time.monotonic()))
            return
        self._watched[fd] = (rank, pid)
        self._poller.register(fd, zmq.POLLIN)


def log_phase(change: PhaseChanged) -> None:
    """One key=value line per phase change."""
    generation = "" if change.generation is None else f" generation={change.generation}"
    ranks = ",".join(map(str, change.ranks))
    error = f" error={change.error!r}" if change.error else ""
    name = f" {change.subject}={change.name}" if change.subject == "engine" else ""
    logger.info(
        "event=%s_phase%s ranks=%s%s old=%s new=%s seconds=%.3f%s",
        change.subject, name, ranks, generation, change.old, change.new,
        change.seconds, error,
    )  # fmt: skip
