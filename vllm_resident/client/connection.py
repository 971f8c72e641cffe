"""One connection to a controller, shared by any number of calls.

One DEALER socket and one reader task; a reply finds its call by number. Keeps the
deadlines: how long the first answer may take, and how long a controller may fall
silent. Knows what ends a call, not what a call is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket as sockets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from vllm_resident import transport
from vllm_resident.errors import (
    CommandRejected,
    ErrorInfo,
    PoolUnreachable,
    ProtocolError,
    from_info,
)
from vllm_resident.keys import PoolKey
from vllm_resident.messages import (
    AttachFrontend,
    AwaitEngine,
    CallFailed,
    CancelGenerate,
    DetachFrontend,
    EndAwait,
    EndWatch,
    EngineAwake,
    FromClient,
    FrontendAttached,
    Generate,
    GenerateOutput,
    Progress,
    SwitchEnded,
    SwitchMoved,
    ToClient,
    ToClientMessage,
    WatchPool,
)

ENDPOINT_VARIABLE = "VLLM_RESIDENT_CONTROLLER"
# A controller reports progress about once a second while it works on a call.
SILENCE_TIMEOUT_S = 15.0
# At most so much of a silence is counted at a time.
MAX_STEP_S = 1.0
LAST_LOOK_S = 0.1
# What a command may take beyond its own deadline, which the controller keeps: undoing
# on every rank what was begun.
UNWIND_TIMEOUT_S = 120.0
# How long closing waits for what is still to be sent, such as a cancellation.
LINGER_MS = 200

OnProgress = Callable[[Progress], None]
Reply = TypeVar("Reply", bound=ToClient)


def resolve_endpoint(controller: str | None, pool: str) -> str:
    """Where the controller is: as given, as the environment says, or the pool's own."""
    return (
        controller
        or os.environ.get(ENDPOINT_VARIABLE)
        or transport.controller_endpoint(pool)
    )


def somebody_listens(endpoint: str) -> bool:
    """Whether a connection to `endpoint` is accepted at this moment.

    True as well where that cannot be told at once (anything but a unix socket).
    """
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc":
        return True
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


class Connection:
    """Calls to the controller at `endpoint`, from the tasks of one event loop.

    Connects at the first call. `connect_timeout_s` is how long the first answer to a
    call may take; `key` is the pool's, where the endpoint is on another machine.
    """

    def __init__(
        self, endpoint: str, connect_timeout_s: float, key: PoolKey | None = None
    ) -> None:
        self.endpoint = endpoint
        self.key = key
        self.connect_timeout_s = connect_timeout_s
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Queue[ToClientMessage]] = {}
        self._decoder = transport.Decoder[ToClientMessage](ToClientMessage)
        self._context: zmq.asyncio.Context | None = None
        self._socket: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._closed = False

    def next_call(self) -> int:
        """A number for a call; never given twice."""
        return next(self._numbers)

    async def ask(
        self,
        command: FromClient,
        expected: type[Reply],
        timeout_s: float,
        on_progress: OnProgress | None = None,
    ) -> Reply:
        """The one reply to a command that has one."""
        replies = self.replies(command, timeout_s, on_progress)
        async with contextlib.aclosing(replies):
            return expect(expected, await anext(replies))

    async def replies(
        self,
        command: FromClient,
        timeout_s: float,
        on_progress: OnProgress | None = None,
    ) -> AsyncGenerator[ToClientMessage]:
        """Send a command and yield its replies, up to and with the last.

        However a call that stays open is left before its end, the pool is told.
        """
        queue: asyncio.Queue[ToClientMessage] = asyncio.Queue()
        self._calls[command.call] = queue
        running = False
        try:
            await self._send(command)
            running = True
            async for reply in self._received(queue, timeout_s):
                if isinstance(reply, Progress):
                    if on_progress is not None:
                        on_progress(reply)
                    continue
                running = not _is_last(reply)
                if isinstance(reply, CallFailed):
                    raise from_info(reply.error)
                yield reply
                if not running:
                    return
        finally:
            del self._calls[command.call]
            if running and isinstance(command, Generate):
                self._cancel(CancelGenerate(call=command.call))
            elif running and isinstance(command, AttachFrontend):
                self._cancel(DetachFrontend(call=command.call))
            elif running and isinstance(command, AwaitEngine):
                self._cancel(EndAwait(call=command.call))
            elif running and isinstance(command, WatchPool):
                self._cancel(EndWatch(call=command.call))

    async def tell(self, message: FromClient) -> None:
        """Send what is not answered."""
        await self._send(message)

    async def close(self) -> None:
        """Disconnect; calls under way fail. No-op if already closed."""
        self._closed = True
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])
        self._fail_all(
            ErrorInfo(
                PoolUnreachable.__name__, "the client was closed while the call ran"
            )
        )
        # The calls that failed just now still send their cancellations.
        await asyncio.sleep(0.01 if self._calls else 0)
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close(linger=LINGER_MS)
        context, self._context = self._context, None
        if context is not None:
            context.term()

    async def _received(
        self, queue: asyncio.Queue[ToClientMessage], timeout_s: float
    ) -> AsyncGenerator[ToClientMessage]:
        # A time-out that is none is for the controller to reject.
        end = time.monotonic() + max(0.0, timeout_s) + UNWIND_TIMEOUT_S
        silence_s, silent_s = self.connect_timeout_s, 0.0
        while True:
            left_s = end - time.monotonic()
            # In steps that count for no more than they were to take: whoever stood
            # still has not listened, and what came meanwhile is about to be read.
            step_s = min(silence_s - silent_s, max(left_s, 0.0), MAX_STEP_S)
            if (reply := await _within(step_s, queue)) is None:
                silent_s += step_s
                is_overdue = left_s <= step_s
                if not is_overdue and silent_s < silence_s:
                    continue
                # In the last step too.
                if (reply := await _within(LAST_LOOK_S, queue)) is None:
                    raise (
                        self._overdue(timeout_s)
                        if is_overdue
                        else self._silent(silence_s)
                    )
            yield reply
            silence_s, silent_s = SILENCE_TIMEOUT_S, 0.0

    def _silent(self, silence_s: float) -> PoolUnreachable:
        return PoolUnreachable(
            f"no controller answered at {self.endpoint} within {silence_s:g} s: is the "
            "pool up? start one with `vllm-resident up`, or name the right one "
            f"(--pool, --controller, {ENDPOINT_VARIABLE})"
        )

    def _overdue(self, timeout_s: float) -> PoolUnreachable:
        return PoolUnreachable(
            f"the controller at {self.endpoint} answers but did not end a call of "
            f"{timeout_s:g} s within {timeout_s + UNWIND_TIMEOUT_S:g} s: its log says "
            "what it waits for"
        )

    async def _send(self, command: FromClient) -> None:
        if self._closed:
            raise CommandRejected("this client is closed: make a new one")
        try:
            frames = transport.encode(command)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CommandRejected(f"cannot be sent: {error}") from error
        if self._socket is None:
            self._open()
        await self._socket.send_multipart(frames)

    def _open(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = transport.open_socket(self._context, zmq.DEALER)
        try:
            transport.connect(self._socket, self.endpoint, self.key)
        except zmq.ZMQError as error:
            self._socket.close()
            self._socket = None
            raise CommandRejected(
                f"cannot connect to {self.endpoint!r}: {error}; an endpoint is "
                "ipc:///path/to.sock or tcp://127.0.0.1:PORT"
            ) from error
        self._reader = asyncio.create_task(self._read(), name="vllm-resident reader")

    def _cancel(self, command: FromClient) -> None:
        # Also runs while a task is being cancelled, so it must not wait; the socket
        # has room, and a full one means that the controller does not read anyway.
        if self._socket is not None:
            self._socket.send_multipart(transport.encode(command))

    async def _read(self) -> None:
        """Give every message to the call it answers; late ones are dropped."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                message = self._decoder.decode(frames)
            except ProtocolError as error:
                call = transport.peek_call(frames)
                message = CallFailed(call=call, error=error.to_info())
            if isinstance(message, CallFailed) and message.call == -1:
                # The controller could not read a frame of ours, nor tell whose it was.
                self._fail_all(message.error)
            elif (queue := self._calls.get(message.call)) is not None:
                queue.put_nowait(message)

    def _fail_all(self, error: ErrorInfo) -> None:
        for call, queue in self._calls.items():
            queue.put_nowait(CallFailed(call=call, error=error))


async def _within(
    seconds: float, queue: asyncio.Queue[ToClientMessage]
) -> ToClientMessage | None:
    """The next message, if it comes in time."""
    try:
        async with asyncio.timeout(seconds):
            return await queue.get()
    except TimeoutError:
        return None


def _is_last(reply: ToClient) -> bool:
    """Whether nothing follows this reply; not of `Progress`."""
    if isinstance(reply, GenerateOutput):
        return reply.done
    return not isinstance(
        reply, FrontendAttached | EngineAwake | SwitchMoved | SwitchEnded
    )


def expect(expected: type[Reply], reply: ToClient) -> Reply:
    """`reply` if it is of the type expected; else a `ProtocolError`."""
    if not isinstance(reply, expected):
        raise ProtocolError(
            f"expected {expected.__name__}, got {type(reply).__name__} from the "
            "controller: install the same vllm-resident on both sides"
        )
    return reply
