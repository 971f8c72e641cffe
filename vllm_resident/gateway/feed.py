"""What happens in the pool, for any number of listeners: one watch of the controller
and one status a second, while anybody listens.

A listener that reads slowly is behind by what fits its mailbox and no more: of a status
and of a switch under way it gets the newest, of switches that have ended the last ones.
Knows the pool's messages and nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field

import msgspec

from vllm_resident.client import AsyncClient
from vllm_resident.errors import ErrorInfo, ResidentError
from vllm_resident.messages import (
    PoolStatus,
    SwitchEnded,
    SwitchMoved,
    SwitchReport,
    SwitchStatus,
)

STATUS_INTERVAL_S = 1.0
# A controller that did not answer is asked again after so long.
RETRY_S = 1.0
# Switches that have ended: what a listener may be behind, and is told at first.
MAX_ENDED = 100


class EndedSwitch(msgspec.Struct, frozen=True):
    """One that is over; began in seconds since 1970. `number` is what it was called in
    `SwitchStatus`."""

    number: int
    began_unix_s: float
    cause: str
    engines: list[str]
    report: SwitchReport


@dataclass(frozen=True)
class Event:
    """`kind`: "status" (of `PoolStatus`), "progress" (`SwitchStatus`), "switch"
    (`EndedSwitch`, with an `id`) or "error" (`ErrorInfo`)."""

    kind: str
    data: PoolStatus | SwitchStatus | EndedSwitch | ErrorInfo
    id: str = ""


@dataclass
class Listener:
    """One listener's mailbox; `after` is the id of the last switch that it knows."""

    after: str = ""
    is_over: bool = False
    _latest: dict[str, Event] = field(default_factory=dict)
    _moving: dict[int, Event] = field(default_factory=dict)
    _ended: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_ENDED))
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, event: Event) -> None:
        data = event.data
        if isinstance(data, EndedSwitch):
            if _is_known(event.id, self.after):
                return
            self._moving.pop(data.number, None)
            self._ended.append(event)
        elif isinstance(data, SwitchStatus):
            self._moving[data.number] = event
        else:
            self._latest[event.kind] = event
        self._news.set()

    def end(self) -> None:
        """There is nothing more to come."""
        self.is_over = True
        self._news.set()

    def take(self) -> list[Event]:
        """All that is there, in order: how it is, what is under way, what has ended."""
        self._news.clear()
        events = [*self._latest.values(), *self._moving.values(), *self._ended]
        self._latest.clear()
        self._moving.clear()
        self._ended.clear()
        return events

    async def wait(self, timeout_s: float) -> None:
        """Until there is something to take, or so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)


class Feed:
    """Of one pool, in one event loop."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._listeners: list[Listener] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False
        # What a new listener is told first.
        self._latest: dict[str, Event] = {}
        self._moving: dict[int, Event] = {}
        self._ended: deque[Event] = deque(maxlen=MAX_ENDED)

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    @contextmanager
    def listening(self, after: str = "") -> Iterator[Listener]:
        """A mailbox that is filled until this is left; of the switches that have ended,
        with those after the one of that id."""
        listener = Listener(after, self._is_over)
        for event in (*self._latest.values(), *self._moving.values(), *self._ended):
            listener.put(event)
        self._listeners.append(listener)
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._poll(), name="feed: status"),
                asyncio.create_task(self._watch(), name="feed: switches"),
            ]
        try:
            yield listener
        finally:
            self._listeners = [each for each in self._listeners if each is not listener]
            if not self._listeners:
                self._rest()

    def end(self) -> None:
        """End every listener, those to come too. May be called twice."""
        self._is_over = True
        for listener in self._listeners:
            listener.end()

    def _rest(self) -> None:
        """Nobody listens: what is known grows old."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self._latest.clear()
        self._moving.clear()
        self._ended.clear()

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener.put(event)

    async def _poll(self) -> None:
        while True:
            try:
                event = Event("status", await self._client.status())
            except ResidentError as error:
                event = Event("error", error.to_info())
            self._latest = {event.kind: event}
            self._tell(event)
            await asyncio.sleep(STATUS_INTERVAL_S)

    async def _watch(self) -> None:
        last = ""
        while True:
            # That the pool does not answer is told by the other task.
            with suppress(ResidentError):
                async with aclosing(self._client.watch()) as messages:
                    async for message in messages:
                        event = _event(message)
                        if not _is_known(event.id, last):
                            self._note(event)
                            self._tell(event)
                        last = event.id or last
            self._moving.clear()
            await asyncio.sleep(RETRY_S)

    def _note(self, event: Event) -> None:
        if isinstance(event.data, EndedSwitch):
            self._moving.pop(event.data.number, None)
            self._ended.append(event)
        elif isinstance(event.data, SwitchStatus):
            self._moving[event.data.number] = event


def _event(message: SwitchMoved | SwitchEnded) -> Event:
    if isinstance(message, SwitchMoved):
        return Event("progress", message.switch)
    ended = EndedSwitch(
        number=message.number,
        # The controller's clock is nobody else's: how long ago is told.
        began_unix_s=round(time.time() - message.age_s, 3),
        cause=message.cause,
        engines=message.engines,
        report=message.report,
    )
    return Event("switch", ended, f"{message.session}.{message.sequence}")


def _is_known(event_id: str, last: str) -> bool:
    """Whether the switch of that id ended no later than the last one known, in the same
    life of the controller."""
    session, _, number = event_id.rpartition(".")
    last_session, _, last_number = last.rpartition(".")
    is_comparable = session == last_session and number.isdigit()
    return is_comparable and last_number.isdigit() and int(number) <= int(last_number)
