"""The little of ASGI that the gateway does itself: bodies, answers, keys, addresses.

Pure: knows neither the pool nor vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from vllm_resident.gateway import problems
from vllm_resident.gateway.problems import Problem
from vllm_resident.transport import is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 32 * 2**20
# Of all that are being answered at one time.
MAX_BODIES_BYTES = 512 * 2**20
# A caller that sends slower than this is not one.
BODY_TIMEOUT_S = 60.0
CLOSE = {"Connection": "close"}


class Disconnected(Exception):
    """The caller went away before it had sent everything."""


class _Named(msgspec.Struct):
    model: str | None = None


def model_named(body: bytes) -> str | None:
    """The `model` of a JSON body, None where it names none; raises `Problem`."""
    try:
        return msgspec.json.decode(body, type=_Named).model
    except msgspec.ValidationError as error:
        raise Problem(400, f"in the body: {error}", param="model") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}") from error


class Bodies:
    """The bodies of the requests that are being answered; together no larger than
    `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_BODIES_BYTES) -> None:
        self._num_bytes_left = max_bytes

    @asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """All of a request's body, kept until the end of this. Raises `Problem` where
        it is too large or too slow, `Disconnected` where it does not end."""
        length = header(scope, b"content-length")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise _too_large()
        body = bytearray()
        try:
            await self._fill(body, receive)
            yield bytes(body)
        finally:
            self._num_bytes_left += len(body)

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    self._append(body, message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            text = f"the body did not come within {BODY_TIMEOUT_S:g} s"
            raise Problem(408, text, headers=CLOSE) from None

    def _append(self, body: bytearray, part: bytes) -> None:
        if len(body) + len(part) > MAX_BODY_BYTES:
            raise _too_large()
        if len(part) > self._num_bytes_left:
            raise problems.unavailable("too many large bodies at once")
        self._num_bytes_left -= len(part)
        body += part


def _too_large() -> Problem:
    # Not closed with the answer: what still comes would reset it (`connections.py`).
    limit = MAX_BODY_BYTES // 2**20
    return Problem(413, f"the body is larger than {limit} MiB")


def replayed(
    body: bytes, receive: Receive, ended: asyncio.Future[Any] | None = None
) -> Receive:
    """A `receive` that gives a body that was read already, then what comes after it:
    that the caller goes away, also when `ended` is done."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given and ended is None:
            return await receive()
        if is_given:
            return await _received(receive, ended)
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def _received(receive: Receive, ended: asyncio.Future[Any]) -> Message:
    """In the task of whoever asks: an app that sends without a pause hears at once that
    its caller has gone."""
    gone = {"type": "http.disconnect"}
    if ended.done():
        return gone

    def end(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # something was received just now
            limit.reschedule(0)

    try:
        async with asyncio.timeout(None) as limit:
            ended.add_done_callback(end)
            return await receive()
    except TimeoutError:
        return gone
    finally:
        ended.remove_done_callback(end)


class HeldAnswer:
    """An answer that goes on from the first byte of its body. One that may not begin
    then does not, and nobody has seen it."""

    def __init__(self, send: Send, begin: Callable[[], bool]) -> None:
        self._send = send
        self._begin = begin
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self._begin():
            return
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)


async def gone(receive: Receive) -> None:
    """Returns when the caller has gone; of a request whose body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def header(scope: Scope, name: bytes) -> str:
    """The first header of that (lower-case) name, or nothing."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return ""


def query(scope: Scope, name: str) -> str:
    """The first value of that name in the query, or nothing."""
    text = scope.get("query_string", b"").decode("latin-1")
    return dict(reversed(parse_qsl(text))).get(name, "")


async def answer(
    send: Send, status: int, document: object, headers: dict[str, str] | None = None
) -> None:
    """A whole answer of JSON."""
    await answer_bytes(
        send, status, msgspec.json.encode(document), "application/json", headers
    )


async def answer_bytes(
    send: Send,
    status: int,
    content: bytes,
    content_type: str,
    headers: dict[str, str] | None = None,
) -> None:
    fields = {
        "content-type": content_type,
        "content-length": str(len(content)),
        **(headers or {}),
    }
    await begin(send, status, fields)
    await send({"type": "http.response.body", "body": content})


async def begin(send: Send, status: int, headers: dict[str, str]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1"))
                for name, value in headers.items()
            ],
        }
    )


class Keys:
    """The keys that open something; without any, everybody may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, scope: Scope) -> None:
        """Raise `Problem` unless the request has one: `Authorization: Bearer KEY`."""
        if not self._digests:
            return
        scheme, _, given = header(scope, b"authorization").partition(" ")
        digest = _digest(given)
        # All are compared, so that the time taken says nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Problem(
                401,
                "a key is needed: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_is_local(scope: Scope) -> None:
    """Raise `Problem` unless the request was meant for loopback by its sender, too: a
    web page of elsewhere can have a browser send requests here, under its own name."""
    host = header(scope, b"host")
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    origin = header(scope, b"origin")
    if not is_loopback(name.strip("[]")) or origin:
        raise Problem(403, "without a key these routes are for this machine only")
