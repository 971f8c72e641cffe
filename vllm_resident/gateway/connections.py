"""What one connection may cost: uvicorn's HTTP protocol with limits.

uvicorn (0.54) reads heads of any size, waits for ever for one to be complete, and for
ever for a caller to read its answer. Knows bytes and time, nothing of requests.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vllm_resident.gateway.problems import RETRY_AFTER_S, Problem

# Request line and headers; a browser sends about 1 KiB.
MAX_HEAD_BYTES = 64 * 2**10
MAX_HEADERS = 128
# A caller that sends its head slower than this, or sends none, is not one.
HEAD_TIMEOUT_S = 20.0
# Nor one that reads so little of its answer: its request is aborted.
STALL_TIMEOUT_S = 60.0
# What still comes of a request that was answered is read and dropped for so long.
DISCARD_TIMEOUT_S = 20.0
# How long a caller that was refused may take to notice.
LINGER_S = 1.0
MAX_CONNECTIONS = 4096
# Descriptors for all else: sockets to the leaders, tokenizers, logs.
_RESERVED_FILES = 512


def max_connections() -> int:
    """As many as this process may have files for, which is raised as far as it goes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, hard - _RESERVED_FILES))


@dataclass
class Crowd:
    """The connections of one server: no more than `max_connections`. Where one more
    comes, the one that has been without a request longest makes room."""

    max_connections: int = MAX_CONNECTIONS
    # In the order in which they became so.
    idle: dict[BoundedProtocol, None] = field(default_factory=dict)

    def has_room(self, num_connections: int) -> bool:
        """For one more, beside so many; closes an idle one if need be."""
        if num_connections < self.max_connections:
            return True
        if not self.idle:
            return False
        oldest = next(iter(self.idle))
        del self.idle[oldest]
        oldest.transport.abort()
        return True


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It answers by itself, and ends then: 431 to a head that is too
    large, 408 to one that is too slow, 503 where too many have requests."""

    def __init__(self, *args: Any, crowd: Crowd, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._crowd = crowd
        # Between a head and the next what comes is body, or at a body's end trailers.
        self._is_in_head = True
        # As they came, of what is no body: of a head, of trailers.
        self._num_head_bytes = 0
        self._is_refused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        has_room = self._crowd.has_room(len(self.connections))
        super().connection_made(transport)
        if has_room:
            self._crowd.idle[self] = None
            self._await_head()
        else:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once")

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.idle.pop(self, None)
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse_head()

    # What the parser finds may go on after a refusal, until the data is at its end.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._is_in_head:
            self._is_in_head = True
            self._num_head_bytes = 0
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are dropped: uvicorn (0.54) adds them to the request's headers.
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        num_bytes = len(self.url) + sum(len(name) + len(v) for name, v in self.headers)
        if len(self.headers) > MAX_HEADERS or num_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        if self._is_refused:
            return
        self._is_in_head = False
        self._num_head_bytes = 0
        self._crowd.idle.pop(self, None)
        self._stop_timer("head")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer("discard")
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        is_unread = self.cycle.more_body
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._crowd.idle[self] = None
            if is_unread:
                self._start_timer("discard", DISCARD_TIMEOUT_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer("stall", STALL_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_timer("stall")
        super().resume_writing()

    def _await_head(self) -> None:
        self._start_timer("head", HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the headers did not come within {HEAD_TIMEOUT_S:g} s",
            )

    def _refuse_head(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"more than {MAX_HEAD_BYTES // 2**10} KiB of headers, or {MAX_HEADERS}",
        )

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        """Answer, once, and close; where the request has its answer or is getting one,
        only close. What the caller still sends is read for a moment: a reset would
        overtake the answer."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        is_under_way = self.cycle is not None and not self.cycle.response_complete
        if is_under_way or not self._is_in_head:
            self.transport.close()
            return
        self.transport.write(_whole_answer(status, why))
        self.transport.write_eof()
        self._start_timer("linger", LINGER_S, self.transport.abort)

    def _start_timer(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._stop_timer(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop_timer(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


def _whole_answer(status: HTTPStatus, why: str) -> bytes:
    body = msgspec.json.encode(Problem(status, why).body())
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        head.append(f"retry-after: {RETRY_AFTER_S}")
    return "\r\n".join([*head, "", ""]).encode() + body
