"""The pool's commands over HTTP, with the client's semantics, errors and reports.

`GET /pool` is the status, `GET /pool/events` the status each second and every switch,
whoever caused it, as server-sent events, and `POST /pool/COMMAND` a command, its
arguments a JSON object of the client's own. `GET /pool/openapi.json` describes it all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from vllm_resident.client import AsyncClient
from vllm_resident.errors import ResidentError
from vllm_resident.gateway import asgi, openapi, problems
from vllm_resident.gateway.asgi import Bodies, Keys, Receive, Scope, Send
from vllm_resident.gateway.feed import Event, Feed
from vllm_resident.gateway.problems import Problem
from vllm_resident.messages import SwitchReport

# A line that says nothing, for proxies that end connections where nothing is said.
KEEP_ALIVE_S = 10.0
# What a listener that lost its connection waits before it comes again.
COME_AGAIN_MS = 2000
MAX_LISTENERS = 100


class _Command(
    msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """Seconds that are not given are the client's defaults."""

    timeout_s: float | msgspec.UnsetType = msgspec.UNSET


class Sleep(_Command, kw_only=True):
    name: str
    level: int = 1
    drain_s: float | msgspec.UnsetType = msgspec.UNSET


class WakeUp(_Command, kw_only=True):
    name: str
    drain_s: float | msgspec.UnsetType = msgspec.UNSET


class Unload(WakeUp, kw_only=True):
    pass


class Load(_Command, kw_only=True):
    """Engine arguments stand beside the others in the client, under a name here."""

    name: str
    model: str = ""
    ranks: list[int] | int | None = None
    asleep: bool = False
    pinned: bool = False
    engine_args: dict[str, Any] = {}


class Switch(_Command, kw_only=True):
    """`new` is a name, or a table as in a layout."""

    old: str
    new: str | dict[str, Any]
    strategy: Literal["sleep", "unload", "stage"] = "sleep"
    drain_s: float | msgspec.UnsetType = msgspec.UNSET


class Apply(_Command, kw_only=True):
    engines: list[dict[str, Any]]
    drain_s: float | msgspec.UnsetType = msgspec.UNSET


class PoolRoutes:
    """Answers what begins with /pool. `keys` open it; without any it answers callers on
    this machine only, and `is_open` says whether even those."""

    def __init__(
        self, client: AsyncClient, keys: Keys, bodies: Bodies, *, is_open: bool
    ) -> None:
        self._client = client
        self._keys = keys
        self._bodies = bodies
        self._is_open = is_open
        self._description = openapi.describe(
            {name: known.form for name, known in _COMMANDS.items()}
        )
        self._feed = Feed(client)

    def end_streams(self) -> None:
        """End the streams of events, which have no end of their own. May be called
        twice."""
        self._feed.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check(scope)
        method, path = scope["method"], scope["path"].rstrip("/")
        if path == "/pool":
            _require(method, "GET")
            with _as_problems():
                status = await self._client.status()
            await asgi.answer(send, 200, status)
        elif path == "/pool/openapi.json":
            _require(method, "GET")
            await asgi.answer(send, 200, self._description)
        elif path == "/pool/events":
            _require(method, "GET")
            await self._tell(scope, receive, send)
        elif (known := _COMMANDS.get(path.removeprefix("/pool/"))) is not None:
            _require(method, "POST")
            await self._command(known, scope, receive, send)
        else:
            there = ", ".join(
                [
                    "/pool",
                    "/pool/events",
                    "/pool/openapi.json",
                    *(f"/pool/{c}" for c in _COMMANDS),
                ]
            )
            raise Problem(404, f"no route {path}: there are {there}")

    def _check(self, scope: Scope) -> None:
        if self._keys:
            self._keys.check(scope)
        elif self._is_open:
            asgi.check_is_local(scope)
        else:
            raise Problem(
                403,
                "the pool's routes are off: the gateway was given no --operator-key",
            )

    async def _command(
        self, known: _Known, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if asgi.header(scope, b"content-type").partition(";")[0] != "application/json":
            raise Problem(415, "the body must be JSON, and say so: application/json")
        async with self._bodies.read(scope, receive) as body:
            try:
                command = msgspec.json.decode(body, type=known.form)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise Problem(400, f"in the body: {error}") from error
        # A caller that goes away does not stop what it began; nor does the client's.
        with _as_problems():
            report = await known.run(self._client, command)
        await asgi.answer(send, 200, report)

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events until the listener goes."""
        if self._feed.num_listeners >= MAX_LISTENERS:
            raise problems.unavailable(f"{MAX_LISTENERS} listeners are there already")
        gone = asyncio.ensure_future(asgi.gone(receive))
        try:
            with self._feed.listening(asgi.header(scope, b"last-event-id")) as listener:
                gone.add_done_callback(lambda _: listener.end())
                await asgi.begin(send, 200, _STREAM)
                await _send_part(send, b"retry: %d\n\n" % COME_AGAIN_MS)
                while not listener.is_over:
                    events = listener.take()
                    part = b"".join(map(_event_bytes, events)) or b": alive\n\n"
                    await _send_part(send, part)
                    await listener.wait(KEEP_ALIVE_S)
                if not gone.done():
                    await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()


_STREAM = {
    "content-type": "text/event-stream",
    "cache-control": "no-store",
    # A proxy that gathers what it passes on would hold the events back.
    "x-accel-buffering": "no",
}


def _event_bytes(event: Event) -> bytes:
    number = b"id: %s\n" % event.id.encode() if event.id else b""
    data = msgspec.json.encode(event.data)
    return number + b"event: %s\ndata: %s\n\n" % (event.kind.encode(), data)


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _require(method: str, wanted: str) -> None:
    if method != wanted:
        raise Problem(405, f"{method} is not for this route", headers={"Allow": wanted})


@contextlib.contextmanager
def _as_problems() -> Iterator[None]:
    try:
        yield
    except ResidentError as error:
        raise problems.of_command(error) from error


def _given(command: _Command, *without: str) -> dict[str, Any]:
    """The arguments that the caller gave, by name."""
    values = msgspec.structs.asdict(command)
    return {
        name: value
        for name, value in values.items()
        if value is not msgspec.UNSET and name not in without
    }


async def _load(client: AsyncClient, command: Load) -> SwitchReport:
    own = {"name", *_given(command)}
    for name in command.engine_args.keys() & {*own, "timeout_s", "on_progress"}:
        raise Problem(400, f"{name!r} is no engine argument", param=name)
    options = _given(command, "name", "model", "engine_args")
    return await client.load(
        command.name, command.model, **options, **command.engine_args
    )


async def _unload(client: AsyncClient, command: Unload) -> SwitchReport:
    return await client.unload(**_given(command))


async def _sleep(client: AsyncClient, command: Sleep) -> SwitchReport:
    return await client.sleep(**_given(command))


async def _wake_up(client: AsyncClient, command: WakeUp) -> SwitchReport:
    return await client.wake_up(**_given(command))


async def _switch(client: AsyncClient, command: Switch) -> SwitchReport:
    return await client.switch(**_given(command))


async def _apply(client: AsyncClient, command: Apply) -> SwitchReport:
    return await client.apply(**_given(command))


@dataclass(frozen=True)
class _Known:
    """One command: the form of its body, and how it is run."""

    form: type[_Command]
    run: Callable[[AsyncClient, Any], Awaitable[SwitchReport]]


_COMMANDS = {
    "load": _Known(Load, _load),
    "unload": _Known(Unload, _unload),
    "sleep": _Known(Sleep, _sleep),
    "wake_up": _Known(WakeUp, _wake_up),
    "switch": _Known(Switch, _switch),
    "apply": _Known(Apply, _apply),
}
