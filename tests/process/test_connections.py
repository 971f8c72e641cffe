"""The gateway's app behind its real server: what callers cannot do to it.

The pool is `test_gateway`'s stand-in; sockets, parser and limits are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
import uvloop

from tests.conftest import RANDOM_VARIABLE
from tests.process.test_controller import PoolFixture, pool  # noqa: F401 (a fixture)
from tests.unit.test_gateway import FakePool
from vllm_resident import AsyncClient
from vllm_resident.gateway import asgi, connections
from vllm_resident.gateway.app import Gateway
from vllm_resident.gateway.asgi import Bodies, Keys
from vllm_resident.gateway.connections import BoundedProtocol, Crowd
from vllm_resident.gateway.pool_routes import PoolRoutes
from vllm_resident.gateway.residents import Residents

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

CHAT = {"model": "a", "messages": []}
# What the crowds of these tests may add to the memory of this process.
MEMORY_BYTES = 150 * 2**20
ENDLESS_PART = b"x" * 2**16


class Frontend:
    """Answers at once; to `{"endless": true}` for as long as somebody reads."""

    num_unfinished = 0
    num_streaming = 0
    num_begun = 0

    async def open(self) -> None:
        pass

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        if not body.get("endless"):
            await asgi.answer(send, 200, {"size": len(str(body))})
            return
        gone = asyncio.ensure_future(asgi.gone(receive))
        Frontend.num_streaming += 1
        Frontend.num_begun += 1
        try:
            await asgi.begin(send, 200, {"content-type": "text/event-stream"})
            while not gone.done():
                part = {"body": ENDLESS_PART, "more_body": True}
                await send({"type": "http.response.body", **part})
        finally:
            gone.cancel()
            Frontend.num_streaming -= 1

    def has_response(self, name: str) -> bool:
        return False

    def fail(self) -> None:
        pass

    def close(self) -> None:
        pass


class Served:
    """A gateway on a thread of its own; `address` is where it listens."""

    def __init__(self, server: uvicorn.Server, address: tuple[str, int]) -> None:
        self.server = server
        self.address = address
        self.url = "http://{}:{}".format(*address)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    def chat(self, **more: Any) -> httpx.Response:
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json={**CHAT, **more}, timeout=30)


@contextmanager
def serving(
    folder: Path,
    *,
    max_connections: int = 200,
    bodies: Bodies | None = None,
    connect: Callable[[], Any] = lambda: FakePool(a="ready"),
) -> Iterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    bodies = bodies or Bodies()
    stop: list[Any] = []

    async def run() -> None:
        client = connect()
        there = Residents(client, client, lambda *_: Frontend(), folder)  # type: ignore[arg-type]
        routes = PoolRoutes(client, Keys(()), bodies, is_open=True)  # type: ignore[arg-type]
        app = Gateway(client, there, routes, Keys(()), bodies)  # type: ignore[arg-type]
        config = uvicorn.Config(
            app,
            http=partial(BoundedProtocol, crowd=Crowd(max_connections)),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        stop.append(server)
        there.start()
        await server.serve([listener])
        await there.close()
        await client.close()

    thread = threading.Thread(target=lambda: uvloop.run(run()))
    thread.start()
    try:
        until(lambda: bool(stop) and stop[0].started)
        yield Served(stop[0], listener.getsockname())
    finally:
        stop[0].should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_cut_off(connection: socket.socket, content: bytes) -> bool:
    """Whether nobody takes that any more."""
    try:
        connection.sendall(content)
    except OSError:
        return True
    return False


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """Status and body of the one answer after which the server closes."""
    content = b""
    while part := connection.recv(2**16):
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


@pytest.mark.parametrize(
    "flood",
    [
        b"x-large: " + b"y" * 2**17,  # one header that does not end
        b"x: y\r\n" * 1000,  # more of them than anybody sends
        b"x-a-name: " + b"y" * 2**15 + b"\r\nx-b: " + b"y" * 2**16,
    ],
    ids=["endless", "many", "large"],
)
def test_a_flood_of_headers_is_cut_off(served: Served, flood: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + flood)
        with contextlib.suppress(OSError):  # it has closed already
            connection.sendall(b"\r\n\r\n")
        status, body = answer_of(connection)
    assert status == 431
    assert "headers" in json.loads(body)["error"]["message"]
    assert served.chat().status_code == 200


def test_a_long_address_is_cut_off_too(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /" + b"a" * 2**17)
        assert answer_of(connection)[0] == 431


def test_a_head_that_does_not_come_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 3.0)
    with serving(tmp_path) as served, served.connect() as silent:
        with served.connect() as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            assert answer_of(slow)[0] == 408
        assert answer_of(silent)[0] == 408
        # A second request of a connection has its own time.
        with httpx.Client() as client:
            for pause_s in (3.2, 0.0):
                assert client.get(f"{served.url}/health").status_code == 200
                time.sleep(pause_s)


@pytest.mark.parametrize(
    "head",
    [b"nonsense\r\n\r\n", b"GET  HTTP/9\r\n\r\n", b"\x16\x03\x01\x02\x00" * 9],
    ids=["words", "version", "tls"],
)
def test_what_is_not_http_is_refused(served: Served, head: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(head)
        assert answer_of(connection)[0] == 400
    assert served.chat().status_code == 200


def test_who_does_not_read_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "STALL_TIMEOUT_S", 0.5)
    body = json.dumps({**CHAT, "endless": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
    before = psutil.Process().memory_info().rss
    begun = Frontend.num_begun
    with serving(tmp_path) as served, ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(served.connect())
            connection.sendall(head % len(body) + b"\r\n" + body)
        # The first may have been let go by now.
        until(lambda: Frontend.num_begun == begun + 20)
        assert served.chat().status_code == 200
        until(lambda: Frontend.num_streaming == 0)
        assert psutil.Process().memory_info().rss - before < MEMORY_BYTES


def test_idle_connections_make_room_and_others_are_served(tmp_path: Path) -> None:
    with serving(tmp_path, max_connections=50) as served, ExitStack() as stack:
        idle = [stack.enter_context(served.connect()) for _ in range(50)]
        until(lambda: len(served.server.server_state.connections) == 50)
        assert served.chat().status_code == 200
        assert idle[0].recv(1) == b""  # the oldest went
        idle[-1].sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert answer_of(idle[-1])[0] == 200


def test_more_requests_at_once_than_it_keeps_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, max_connections=10) as served, ExitStack() as stack:
        for _ in range(10):
            client = stack.enter_context(httpx.Client())
            stack.enter_context(
                client.stream(
                    "POST",
                    f"{served.url}/v1/completions",
                    json={**CHAT, "endless": True},
                )
            )
        refused = served.chat()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "at once" in refused.json()["error"]["message"]
    assert Frontend.num_streaming == 0


def test_ten_thousand_connections(tmp_path: Path) -> None:
    """As many as this process may open, of which the gateway keeps 2000."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num = min(10_000, hard - 3000)
    if num < 3000:
        pytest.skip(f"this process may open {hard} files only (ulimit -Hn)")
    before = psutil.Process().memory_info().rss
    with serving(tmp_path, max_connections=2000) as served, ExitStack() as stack:
        for n in range(num):
            connection = stack.enter_context(served.connect())
            connection.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
            if n % 2000 == 0:
                assert served.chat().status_code == 200
        until(lambda: len(served.server.server_state.connections) <= 2000)
        assert served.chat().status_code == 200
        assert psutil.Process().memory_info().rss - before < MEMORY_BYTES


def test_large_bodies_are_read_whole_or_refused(served: Served) -> None:
    assert served.chat(text="x" * 10 * 2**20).json()["size"] > 10 * 2**20
    refused = served.chat(text="x" * asgi.MAX_BODY_BYTES)
    assert refused.status_code == 413
    assert served.chat().status_code == 200


def test_who_is_answered_before_all_was_sent_hears_it(served: Served) -> None:
    """Most callers send everything before they read: a connection that was closed with
    something unread is reset, and the answer lost."""
    body = b"x" * (asgi.MAX_BODY_BYTES + 2**20)
    with httpx.Client(timeout=30) as client:
        for path, status in (("/v1/completions", 413), ("/nowhere", 404)) * 5:
            assert client.post(served.url + path, content=body).status_code == status
        # It is the same connection, which goes on.
        assert len(served.server.server_state.connections) == 1
        assert client.get(f"{served.url}/health").status_code == 200


def test_a_body_that_nobody_wants_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "DISCARD_TIMEOUT_S", 0.5)
    head = b"POST /nowhere HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    with serving(tmp_path) as served, served.connect() as endless:
        endless.sendall(head)
        until(lambda: is_cut_off(endless, b"5\r\nhello\r\n"))
        assert served.chat().status_code == 200


@pytest.mark.parametrize("path", ["/nowhere", "/v1/completions"])
@pytest.mark.parametrize(
    "flood", [b"a: b\r\n" * 10_000, b"y" * 60_000], ids=["many", "endless"]
)
def test_a_flood_of_trailers_is_cut_off(
    served: Served, path: str, flood: bytes
) -> None:
    """Of a request that was answered, and of one that is being read."""
    head = b"POST %b HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" % path.encode()
    with served.connect() as connection:
        connection.sendall(head + b"2\r\n{}\r\n0\r\nx-a: ")
        num_sent = 0
        while not is_cut_off(connection, flood):
            num_sent += len(flood)
            assert num_sent < 32 * 2**20
    assert served.chat().status_code == 200


def test_trailers_are_no_headers(served: Served) -> None:
    body = json.dumps(CHAT).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
        b"%x\r\n%b\r\n0\r\nx-trailer: 1\r\nexpect: 100-continue\r\n\r\n"
    ) % (len(body), body)
    with served.connect() as connection:
        for _ in range(2):
            connection.sendall(request)
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_small_chunks_are_no_headers(served: Served) -> None:
    """A body may come in as many parts as its caller likes."""
    body = json.dumps({**CHAT, "text": "x" * 2**15}).encode()
    parts = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    head = b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    with served.connect() as connection:
        connection.sendall(head + parts + b"0\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_large_bodies_together_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, bodies=Bodies(2**20)) as served:
        with served.connect() as slow:
            head = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n"
            slow.sendall(head % 2**20 + b" " * (2**20 - 100))
            until(lambda: served.chat(text="x" * 1000).status_code == 503)
            assert served.chat().status_code in (200, 503)
        # What it held is free again.
        until(lambda: served.chat(text="x" * 2**19).status_code == 200)


def test_a_body_that_is_not_the_one_announced(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99\r\n\r\n{"
        )
    with served.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
        )
        assert answer_of(connection)[0] == 400
    assert served.chat().status_code == 200


def test_a_websocket_is_not_opened(served: Served) -> None:
    headers = {"connection": "upgrade", "upgrade": "websocket"}
    answer = httpx.get(f"{served.url}/v1/realtime", headers=headers)
    assert answer.status_code == 501
    assert "websockets" in answer.json()["error"]["message"]


def test_the_pools_routes_are_as_described(
    pool: PoolFixture,  # noqa: F811
    tmp_path: Path,
) -> None:
    """schemathesis sends what the description allows and what it does not, and checks
    every answer against it; the ranks are simulated, the controller is not."""
    client, _ = pool.up(2)
    client.load("a", [0])
    with serving(tmp_path, connect=lambda: AsyncClient(pool.endpoint)) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run"]
        command += [f"{served.url}/pool/openapi.json", "--max-examples", "8"]
        # A stream that does not end.
        command += ["--exclude-path", "/pool/events", "--generation-database", "none"]
        command += ["--request-timeout", "60"]
        if RANDOM_VARIABLE not in os.environ:
            command += ["--seed", "1"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "engines" in httpx.get(f"{served.url}/pool").json()
    assert client.status().phase == "ready"
