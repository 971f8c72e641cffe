"""The gateway's own half, without vLLM: who is asked, what is refused, in what form."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_resident import (
    CommandRejected,
    EngineSpec,
    EngineStatus,
    PoolStatus,
    PoolUnreachable,
    ProtocolError,
    RankLost,
    SwitchReport,
    patching,
)
from vllm_resident.gateway import __main__ as gateway_process
from vllm_resident.gateway import asgi, problems, residents
from vllm_resident.gateway.app import MAX_TRIES, Gateway
from vllm_resident.gateway.asgi import Bodies, Keys
from vllm_resident.gateway.pool_routes import PoolRoutes
from vllm_resident.gateway.problems import Problem
from vllm_resident.gateway.residents import Residents
from vllm_resident.messages import (
    EngineAwake,
    EngineRefused,
    FrontendAttached,
    FrontendDetached,
    ModelCalls,
    PoolTotals,
    Progress,
)
from vllm_resident.transport import is_loopback, parse_http_address

REPORT = SwitchReport("wake_up", 0.1, {}, [])


class FakePool:
    """A client, its turns and attachments and what builds frontends, over engines in a
    table: what is called is brought up at once.

    `rejections` are raised by the next commands, in order; `refusal` answers every call
    for a model that is not up. `hold` is waited for before a model comes up.
    """

    endpoint = "ipc:///nowhere"

    def __init__(self, **phases: str) -> None:
        self.phases = phases
        self.models: list[str] = []
        self.adapters: dict[str, str] = {}
        self.spec_args: dict[str, Any] = {}
        self.open_error: Exception | None = None
        self.ranks = {name: [0] for name in phases}
        self.calls: list[tuple[Any, ...]] = []
        self.rejections: list[Exception] = []
        self.error: Exception | None = None
        self.watchers: dict[str, Any] = {}
        self.built: list[FakeFrontend] = []
        self.generation = 1
        self.refusal: EngineRefused | None = None
        self.hold: asyncio.Event | None = None
        self.turns: list[tuple[str, float]] = []
        self.num_held = 0
        self.num_open = 0
        self.reports: list[dict[str, ModelCalls]] = []
        self.unloaded: dict[str, asyncio.Event] = {}

    async def wait(
        self, name: str, waited_s: float = 0.0, *, is_held: bool = False
    ) -> AsyncIterator[EngineAwake | EngineRefused]:
        self.turns.append((name, waited_s))
        self.num_held += is_held
        self.num_open += 1
        try:
            if self.error is not None:
                raise self.error
            yield await self._bring_up(name)
        finally:
            self.num_open -= 1

    async def _bring_up(self, name: str) -> EngineAwake | EngineRefused:
        await asyncio.sleep(0.01)
        if self.hold is not None:
            await self.hold.wait()
        if self.refusal is not None:
            return self.refusal
        if name not in self.phases:
            return EngineRefused(call=1, reason=f"no {name!r}", is_unknown=True)
        if self.phases[name] != "ready":
            self.turn(name, "ready")
        return EngineAwake(call=1, generation=self.generation)

    async def report(self, models: dict[str, ModelCalls]) -> None:
        self.reports.append(models)

    async def status(self) -> PoolStatus:
        if self.error is not None:
            raise self.error
        engines = [
            EngineStatus(
                name, f"/m/{name}", phase, self.generation, self.ranks[name], {}, 0
            )
            for name, phase in self.phases.items()
        ]
        return PoolStatus(
            "p", "ready", 1, 1, 1.0, [], engines,
            models=self.models, adapters=self.adapters,
        )  # fmt: skip

    async def totals(self) -> PoolTotals:
        return PoolTotals()

    async def sleep(self, **options: Any) -> SwitchReport:
        self.calls.append(("sleep", options))
        await self._command()
        return REPORT

    async def close(self) -> None:
        pass

    async def _command(self) -> None:
        await asyncio.sleep(0.01)
        if self.rejections:
            raise self.rejections.pop(0)

    def turn(self, name: str, phase: str) -> None:
        self.phases[name] = phase
        if name in self.watchers:
            self.watchers[name](
                Progress(call=1, engine=name, phase=phase, elapsed_s=0.0)
            )

    async def attach(
        self, engine: str, into: str, out: str, on_progress: Any
    ) -> AsyncIterator[Any]:
        assert into != out
        self.watchers[engine] = on_progress
        try:
            yield FrontendAttached(
                call=1,
                generation=self.generation,
                spec=EngineSpec(engine, "/m", frontend_args=self.spec_args),
                phase=self.phases[engine],
            )
            await self.unloaded.setdefault(engine, asyncio.Event()).wait()
            yield FrontendDetached(call=1, reason="unloaded")
        finally:
            del self.watchers[engine]

    def unload(self, name: str) -> None:
        """It may be called again: it is declared."""
        self.phases[name] = "asleep"
        self.generation += 1
        self.unloaded.pop(name).set()

    def build(self, spec: EngineSpec, into: str, out: str) -> FakeFrontend:
        self.built.append(FakeFrontend(spec.name))
        self.built[-1].error, self.open_error = self.open_error, None
        return self.built[-1]


class FakeFrontend:
    """Answers each request with its model's name and the body it got."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_closed = False
        self.has_failed = False
        self.hold: asyncio.Event | None = None
        # A request comes to `hold`.
        self.on_hold: Callable[[], None] = lambda: None
        self.responses: set[str] = set()
        self.error: Exception | None = None
        self.begins_with = b""
        # The request is with an engine that sleeps, until its caller has gone.
        self.is_held = False

    async def open(self) -> None:
        if self.error is not None:
            raise self.error

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        if self.is_held:
            self.is_held = (await receive())["type"] != "http.disconnect"
            await asgi.answer(send, 200, None)  # as vLLM does, to nobody
            return
        if self.begins_with:
            await asgi.begin(send, 200, {"content-type": "text/plain"})
            part = {"type": "http.response.body", "body": self.begins_with}
            await send({**part, "more_body": True})
        if self.hold is not None:
            self.on_hold()
            await self.hold.wait()
        if self.has_failed and self.begins_with:
            await send({"type": "http.response.body", "body": b"failed"})
            return
        if self.has_failed:
            await asgi.answer(send, 500, {"error": "the engine is dead"})
            raise RuntimeError("as ServerErrorMiddleware raises it again")
        body = json.loads(message["body"] or b"null")
        await asgi.answer(send, 200, {"by": self.name, "body": body})

    def has_response(self, name: str) -> bool:
        return name in self.responses

    def fail(self) -> None:
        self.has_failed = True
        if self.hold is not None:
            self.hold.set()

    def close(self) -> None:
        self.is_closed = True


@contextlib.asynccontextmanager
async def serving(
    pool: FakePool,
    folder: Path,
    *,
    keys: tuple[str, ...] = (),
    operator: Any = None,
    relay: Any = None,
) -> AsyncIterator[Gateway]:
    there = Residents(pool, pool, pool.build, folder, relay)  # type: ignore[arg-type]
    routes = PoolRoutes(pool, Keys(operator or ()), Bodies(), is_open=operator is None)  # type: ignore[arg-type]
    there.start()
    try:
        yield Gateway(pool, there, routes, Keys(keys), Bodies(), "0.0.1")  # type: ignore[arg-type]
    finally:
        await there.close()


async def until(holds: Callable[[], Any], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 (it may be anything)
            await asyncio.sleep(0.005)


def task_names() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks()}


async def call(
    app: Any,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    body: bytes | dict[str, Any] = b"",
    query: bytes = b"",
    **headers: str,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON document and headers of one request."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = await messages(app, method, path, content, headers, query)
    answered = b"".join(m.get("body", b"") for m in sent[1:])
    names = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], json.loads(answered) if answered else None, names


async def raw_call(app: Any, content: bytes) -> bytes:
    """The body that is answered."""
    sent = await messages(app, "POST", "/v1/completions", content, {})
    return b"".join(m.get("body", b"") for m in sent)


async def messages(
    app: Any,
    method: str,
    path: str,
    content: bytes,
    headers: dict[str, str],
    query: bytes = b"",
) -> list[Any]:
    fields = {"host": "127.0.0.1:8000", "content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(k.encode(), v.encode()) for k, v in fields.items()],
    }
    sent: list[Any] = []
    given = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if given:
            return given.pop()
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 30)
    assert [m["type"] for m in sent].count("http.response.start") == 1
    return sent


# ------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a", "stream": true}', "a"),
        (b'{"messages": [{"model": "inner"}], "model": "b"}', "b"),
        (b"{}", None),
        (b'{"model": null}', None),
    ],
)
def test_the_model_is_read_from_the_body(body: bytes, model: str | None) -> None:
    assert asgi.model_named(body) == model


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"model": 7}',
        b'{"model": ["a"]}',
        b"\xff\xfe",
        b"nope",
    ],
)
def test_a_body_that_names_no_model_is_the_callers_fault(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        asgi.model_named(body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CommandRejected("no"), 409),
        (ProtocolError("no"), 400),
        (PoolUnreachable("no"), 503),
        (RankLost("no", rank=1, generation=2, phase="step"), 500),
    ],
)
def test_errors_of_commands_have_their_status(error: Any, status: int) -> None:
    problem = problems.of_command(error)
    assert problem.status == status
    told = problem.body()["error"]
    assert told["kind"] == type(error).__name__
    assert told["message"] == "no"
    if status == 500:
        assert (told["rank"], told["generation"], told["phase"]) == (1, 2, "step")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        (":80", ("127.0.0.1", 80)),
        ("[::1]:8000", ("::1", 8000)),
        ("here.example:1", ("here.example", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_http_address(text) == address


@pytest.mark.parametrize("text", ["8000", "a:b", "a:70000", "::1:80", "", "a b:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(CommandRejected, match="HOST:PORT"):
        parse_http_address(text)


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(
        map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", ""])
    )


def test_it_needs_no_vllm() -> None:
    code = """if True:
        import sys
        import vllm_resident.gateway.__main__, vllm_resident.gateway.app
        print(sorted({"torch", "vllm", "transformers"} & set(sys.modules)))
    """
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------ whose it is


async def test_requests_go_to_the_model_they_name(tmp_path: Path) -> None:
    pool = FakePool(a="ready", b="ready")
    pool.ranks["b"] = [1]
    async with serving(pool, tmp_path) as app:
        for name in ("a", "b", "a"):
            body = {"model": name, "n": 1}
            status, answer, _ = await call(app, body=body)
            assert (status, answer) == (200, {"by": name, "body": body})
        assert [f.name for f in pool.built] == ["a", "b"]  # once each
        assert pool.calls == []
    assert all(f.is_closed for f in pool.built)
    assert not pool.watchers


async def test_a_call_for_a_sleeper_waits_for_its_turn(tmp_path: Path) -> None:
    pool = FakePool(a="asleep")
    pool.hold = asyncio.Event()
    async with serving(pool, tmp_path) as app:
        callers = [
            asyncio.create_task(call(app, body={"model": "a"})) for _ in range(20)
        ]
        await asyncio.sleep(0.1)
        assert pool.num_open == 20
        assert app._residents.counts() == {"a": (20, 0)}
        pool.hold.set()
        answers = [await caller for caller in callers]
        assert {status for status, _, _ in answers} == {200}
        assert len(pool.built) == 1
        assert pool.num_open == 0


async def test_a_turn_lasts_as_long_as_its_request(tmp_path: Path) -> None:
    """So long the pool counts it as one of the model's."""
    pool = FakePool(a="asleep")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        pool.turn("a", "asleep")
        pool.built[0].hold = asyncio.Event()
        caller = asyncio.create_task(call(app, body={"model": "a"}))
        await asyncio.sleep(0.1)
        assert pool.num_open == 1
        pool.built[0].hold.set()
        assert (await caller)[0] == 200
        assert pool.num_open == 0


async def test_calls_for_engines_that_are_awake_are_only_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "REPORT_S", 0.05)
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        for _ in range(5):
            await call(app, body={"model": "a"})
        assert len(pool.turns) == 1  # the first, which had no frontend yet
        for _ in range(1000):
            await asyncio.sleep(0.02)
            if sum(report["a"].num_ended for report in pool.reports) == 5:
                break
        told = len(pool.reports)
        await asyncio.sleep(0.2)
        assert len(pool.reports) == told  # none while there is nothing to tell
        reports = [report["a"] for report in pool.reports]
        assert sum(report.num_begun for report in reports) == 4
        assert sum(report.num_ended for report in reports) == 5
        assert all(report.service_s > 0 for report in reports)


async def test_one_that_falls_asleep_before_its_frontend_is_there_is_called_again(
    tmp_path: Path,
) -> None:
    pool = FakePool(a="asleep")
    build = pool.build

    def build_slowly(*arguments: Any) -> FakeFrontend:
        if not pool.built:
            pool.phases["a"] = "asleep"
            loop.call_soon_threadsafe(pool.turn, "a", "asleep")
        return build(*arguments)

    loop = asyncio.get_running_loop()
    pool.build = build_slowly  # type: ignore[method-assign]
    async with serving(pool, tmp_path) as app:
        assert (await call(app, body={"model": "a"}))[0] == 200
        assert [name for name, _ in pool.turns][:2] == ["a", "a"]
        assert pool.turns[1][1] > 0  # what it has waited is not forgotten
        assert len(pool.built) == 1


async def test_no_frontend_is_built_of_an_engine_that_has_gone(tmp_path: Path) -> None:
    """While others were built: its leader would be listened for in vain."""
    pool = FakePool(a="ready", b="ready")
    build, may_build = pool.build, threading.Event()

    def build_in_turn(*arguments: Any) -> FakeFrontend:
        frontend = build(*arguments)
        assert may_build.wait(30)
        return frontend

    pool.build = build_in_turn  # type: ignore[method-assign]
    async with serving(pool, tmp_path) as app:
        first = asyncio.create_task(call(app, body={"model": "a"}))
        await until(lambda: pool.built)
        second = asyncio.create_task(call(app, body={"model": "b"}))
        await until(lambda: "b" in pool.unloaded)
        pool.unload("b")
        await until(lambda: "attach b" not in task_names())
        may_build.set()
        assert ((await first)[0], (await second)[0]) == (200, 200)
        assert [f.name for f in pool.built] == ["a", "b"]
        assert [name for name, _ in pool.turns] == ["a", "b", "b"]


@pytest.mark.parametrize(("given", "kept"), [(None, "20"), ("7", "7")])
def test_a_leader_is_not_listened_for_as_long_as_vllm_would(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    monkeypatch.setattr(patching, "activate", lambda: None)
    monkeypatch.setattr(os, "environ", {})
    if given is not None:
        os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = given
    gateway_process.prepare_imports()
    assert os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] == kept


async def test_a_frontend_that_does_not_open_is_closed(tmp_path: Path) -> None:
    """It holds threads and sockets; the next call tries again."""
    pool = FakePool(a="ready")
    pool.open_error = CommandRejected("no adapter")
    async with serving(pool, tmp_path) as app:
        status, answer, _ = await call(app, body={"model": "a"})
        assert (status, "no adapter" in answer["error"]["message"]) == (503, True)
        assert pool.built[0].is_closed
        assert pool.watchers == {}
        assert (await call(app, body={"model": "a"}))[0] == 200


async def test_an_adapter_is_called_by_its_name(tmp_path: Path) -> None:
    """Its model is brought up, whose app knows it by the body's name; on the hot path
    the pool is not asked whose it is."""
    pool = FakePool(a="asleep", b="ready")
    pool.adapters = {"tuned": "a"}
    pool.spec_args = {"lora_modules": [{"name": "tuned", "path": "/t"}]}
    async with serving(pool, tmp_path) as app:
        status, answer, _ = await call(app, body={"model": "tuned"})
        assert (status, answer["by"]) == (200, "a")
        assert answer["body"] == {"model": "tuned"}
        pool.error = PoolUnreachable("no status")
        assert (await call(app, body={"model": "tuned"}))[1]["by"] == "a"
        pool.error = None
        _, cards, _ = await call(app, "GET", "/v1/models")
        assert [card["id"] for card in cards["data"]] == ["a", "b", "tuned"]
        _, card, _ = await call(app, "GET", "/v1/models/tuned")
        assert (card["parent"], card["state"]) == ("a", "ready")


async def test_a_response_is_found_where_it_is_kept(tmp_path: Path) -> None:
    """Without its model's name, and without bringing the model up."""
    pool = FakePool(a="ready", b="ready")
    pool.ranks["b"] = [1]
    async with serving(pool, tmp_path) as app:
        for name in ("a", "b"):
            await call(app, body={"model": name})
        pool.built[1].responses.add("resp_1")
        turns = len(pool.turns)
        pool.turn("b", "asleep")
        for method, path in (("GET", ""), ("POST", "/cancel")):
            status, answer, _ = await call(app, method, f"/v1/responses/resp_1{path}")
            assert (status, answer["by"]) == (200, "b")
        assert len(pool.turns) == turns
        assert (await call(app, "GET", "/v1/responses/resp_2"))[0] == 404


async def test_what_has_no_body_names_its_model_in_the_query(tmp_path: Path) -> None:
    pool = FakePool(a="ready", b="ready")
    async with serving(pool, tmp_path) as app:
        status, answer, _ = await call(app, "GET", "/load", query=b"x=1&model=b")
        assert (status, answer["by"]) == (200, "b")
        status, answer, _ = await call(app, "GET", "/load")
        assert (status, answer["error"]["param"]) == (400, "model")
        assert (await call(app, "GET", "/load", query=b"model=nobody"))[0] == 404
        # A body goes before it.
        body = {"model": "a"}
        assert (await call(app, body=body, query=b"model=b"))[1]["by"] == "a"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/chat/completion", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/wake_up", 501),
    ],
)
async def test_a_path_that_leads_nowhere_brings_no_model_up(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    pool = FakePool(a="asleep")
    async with serving(pool, tmp_path) as app:
        answered, answer, _ = await call(app, method, path, {"model": "a"})
        assert (answered, answer["error"]["code"]) == (status, status)
        assert pool.turns == []


async def test_the_version_is_vllms(tmp_path: Path) -> None:
    async with serving(FakePool(), tmp_path, keys=("k",)) as app:
        assert (await call(app, "GET", "/version"))[1] == {"version": "0.0.1"}


async def test_an_unknown_model_is_404(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        for _ in range(3):
            status, answer, _ = await call(app, body={"model": "nobody"})
            assert status == 404
            assert "no 'nobody'" in answer["error"]["message"]
            assert (answer["error"]["code"], answer["error"]["param"]) == (404, "model")
        assert app._residents.counts() == {}


async def test_what_does_not_come_up_is_503_with_the_reason(tmp_path: Path) -> None:
    pool = FakePool(a="asleep")
    pool.refusal = EngineRefused(call=1, reason="max_queue", retry_after_s=2.2)
    async with serving(pool, tmp_path) as app:
        status, answer, headers = await call(app, body={"model": "a"})
        assert (status, answer["error"]["message"]) == (503, "max_queue")
        assert answer["error"]["type"] == "ServiceUnavailableError"
        assert headers["retry-after"] == "3"
        pool.refusal = None
        assert (await call(app, body={"model": "a"}))[0] == 200  # not for ever


async def test_who_leaves_does_not_wait_on(tmp_path: Path) -> None:
    pool = FakePool(a="asleep")
    pool.hold = asyncio.Event()
    async with serving(pool, tmp_path) as app:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"host", b"127.0.0.1")],
        }
        given: list[Any] = [
            {"type": "http.request", "body": b'{"model": "a"}', "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Any:
            return given.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError("there is nobody to send to")

        await asyncio.wait_for(app(scope, receive, send), 5)
        assert app._residents.counts() == {}
        assert pool.num_open == 0


async def test_a_request_whose_engine_is_given_up_goes_to_the_next(
    tmp_path: Path,
) -> None:
    """On its way to an engine that is unloaded (for a budget, for other ranks)."""
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        pool.built[0].hold = asyncio.Event()
        pool.built[0].on_hold = lambda: pool.unload("a")
        caller = asyncio.create_task(call(app, body={"model": "a", "n": 3}))
        status, answer, _ = await caller
        assert (status, answer["body"]) == (200, {"model": "a", "n": 3})
        assert [f.is_closed for f in pool.built] == [True, False]
        assert app._residents.counts() == {"a": (0, 0)}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "ENDED_S", 0.05)


@pytest.mark.usefixtures("soon")
async def test_a_request_that_reached_a_sleeper_is_within_the_limits(
    tmp_path: Path,
) -> None:
    """It met the engine awake and is held by a leader that knows none."""
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        pool.built[0].is_held = True
        caller = asyncio.create_task(call(app, body={"model": "a"}))
        await asyncio.sleep(0.05)
        pool.turn("a", "draining")
        await asyncio.sleep(0.1)
        assert pool.num_held == 0
        pool.refusal = EngineRefused(call=1, reason="no room", retry_after_s=2.0)
        pool.turn("a", "asleep")
        status, answer, headers = await caller
        assert (status, answer["error"]["message"]) == (503, "no room")
        assert headers["retry-after"] == "2"
        assert not pool.built[0].is_held  # it was told to abort it
        assert app._residents.counts() == {"a": (0, 0)}
        assert (pool.num_held, pool.num_open) == (1, 0)


@pytest.mark.usefixtures("soon")
async def test_one_that_a_sleeper_wakes_up_for_is_answered_once(
    tmp_path: Path,
) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        pool.built[0].hold, is_there = asyncio.Event(), asyncio.Event()
        pool.built[0].on_hold = is_there.set
        caller = asyncio.create_task(call(app, body={"model": "a"}))
        await is_there.wait()
        pool.hold = asyncio.Event()
        for _ in range(3):  # it is said each second
            pool.turn("a", "asleep")
            await asyncio.sleep(0.01)
        pool.hold.set()
        await until(lambda: pool.phases["a"] == "ready")
        await until(lambda: "ask for a" not in task_names())
        assert (pool.num_held, pool.phases["a"], pool.num_open) == (1, "ready", 0)
        pool.built[0].hold.set()
        assert (await caller)[0] == 200
        assert len(pool.built) == 1


async def test_what_was_ended_or_begun_wakes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "ENDED_S", 60.0)
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        frontend = pool.built[0]
        for begins_with in (b"", b"begun and "):
            pool.turn("a", "ready")
            frontend.hold, is_there = asyncio.Event(), asyncio.Event()
            frontend.on_hold = is_there.set
            frontend.begins_with = begins_with
            frontend.has_failed = bool(begins_with)
            caller = asyncio.create_task(raw_call(app, b'{"model": "a"}'))
            await is_there.wait()
            pool.turn("a", "asleep")
            assert ("ask for a" in task_names()) == (not begins_with)
            frontend.hold.set()
            assert await caller
            # What was asked for it is called off.
            await until(lambda: "ask for a" not in task_names())
        assert (pool.num_held, pool.phases["a"]) == (0, "asleep")


async def test_an_answer_that_had_begun_ends_as_the_app_says(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        pool.built[0].hold = asyncio.Event()
        pool.built[0].begins_with = b'"begun and '
        pool.built[0].on_hold = lambda: pool.unload("a")
        caller = asyncio.create_task(raw_call(app, b'{"model": "a"}'))
        assert await caller == b'"begun and failed'
        assert len(pool.built) == 1


async def test_a_request_is_not_tried_for_ever(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    build = pool.build

    def build_what_goes(*arguments: Any) -> FakeFrontend:
        frontend = build(*arguments)
        frontend.hold = asyncio.Event()
        frontend.on_hold = lambda: pool.unload("a")
        return frontend

    pool.build = build_what_goes  # type: ignore[method-assign]
    async with serving(pool, tmp_path) as app:
        status, answer, headers = await call(app, body={"model": "a"})
        assert status == 503
        assert "given up" in answer["error"]["message"]
        assert headers["retry-after"]
        assert len(pool.built) == MAX_TRIES


class FakeRelay:
    """`end` is what a real one's thread does when its leader does not read."""

    def __init__(self, into: str, out: str, on_end: Callable[[], None]) -> None:
        self.input_address, self.output_address = f"{into}+", f"{out}+"
        self.is_closed = False
        self._on_end = on_end

    def end(self) -> None:
        thread = threading.Thread(target=self._on_end)
        thread.start()
        thread.join()

    def close(self) -> None:
        self.is_closed = True


async def test_a_relay_that_ends_takes_its_attachment_along(tmp_path: Path) -> None:
    """Nothing would come through any more; what waits for it goes there anew."""
    pool = FakePool(a="ready")
    relays: list[FakeRelay] = []

    def relay(*arguments: Any) -> FakeRelay:
        relays.append(FakeRelay(*arguments))
        return relays[-1]

    async with serving(pool, tmp_path, relay=relay) as app:
        await call(app, body={"model": "a"})
        pool.built[0].hold = asyncio.Event()
        caller = asyncio.create_task(call(app, body={"model": "a"}))
        await asyncio.sleep(0.05)
        relays[0].end()
        assert (await caller)[0] == 200
        assert [f.is_closed for f in pool.built] == [True, False]
        assert [r.is_closed for r in relays] == [True, False]
        assert (await call(app, body={"model": "a"}))[0] == 200
        assert len(pool.built) == 2
    assert relays[1].is_closed


async def test_an_engine_built_anew_gets_a_new_frontend(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        await call(app, body={"model": "a"})
        pool.generation = 2
        pool.turn("a", "asleep")
        await call(app, body={"model": "a"})
        assert [f.is_closed for f in pool.built] == [True, False]


async def test_the_frontend_unused_longest_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "MAX_FRONTENDS", 2)
    pool = FakePool(a="ready", b="ready", c="ready")
    async with serving(pool, tmp_path) as app:
        for name in ("a", "b", "a", "c"):
            assert (await call(app, body={"model": name}))[0] == 200
        closed = {f.name: f.is_closed for f in pool.built}
        assert closed == {"a": False, "b": True, "c": False}


async def test_an_unreachable_pool_is_503(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    pool.error = PoolUnreachable("nobody there")
    async with serving(pool, tmp_path) as app:
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/health"),
        ):
            status, answer, _ = await call(app, method, path, {"model": "a"})
            assert status == 503
            assert "nobody there" in answer["error"]["message"]


# ------------------------------------------------------------ what is refused


async def test_too_large_a_body_is_413(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asgi, "MAX_BODY_BYTES", 1000)
    async with serving(FakePool(a="ready"), tmp_path) as app:
        body = {"model": "a", "prompt": "x" * 1000}
        status, _, headers = await call(app, body=body)
        # What still comes would reset a connection that is closed (`connections.py`).
        assert (status, "connection" in headers) == (413, False)
        status, _, _ = await call(app, body=b"", **{"content-length": "99999"})
        assert status == 413


async def test_keys_open_inference_and_nothing_else_needs_them(tmp_path: Path) -> None:
    async with serving(FakePool(a="ready"), tmp_path, keys=("k1", "k2")) as app:
        body = {"model": "a"}
        assert (await call(app, body=body))[0] == 401
        for wrong in ("Bearer k3", "Bearer ", "Basic k1", "k1"):
            assert (await call(app, body=body, authorization=wrong))[0] == 401
        for key in ("k1", "k2"):
            answer = await call(app, body=body, authorization=f"Bearer {key}")
            assert answer[0] == 200
        assert (await call(app, "GET", "/v1/models"))[0] == 401
        assert (await call(app, "GET", "/health"))[0] == 200


async def test_models_are_listed_with_their_state(tmp_path: Path) -> None:
    pool = FakePool(a="ready", b="asleep")
    pool.models = ["b", "c"]
    async with serving(pool, tmp_path) as app:
        status, answer, _ = await call(app, "GET", "/v1/models")
        assert status == 200
        states = {card["id"]: card["state"] for card in answer["data"]}
        assert states == {"a": "ready", "b": "asleep", "c": "declared"}
        assert (await call(app, "GET", "/v1/models/b"))[1]["state"] == "asleep"
        assert (await call(app, "GET", "/v1/models/x"))[0] == 404


# ------------------------------------------------------------ the pool's routes


async def test_commands_are_the_clients(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        status, answer, _ = await call(
            app, path="/pool/sleep", body={"name": "a", "level": 2, "drain_s": 0}
        )
        assert (status, answer["action"]) == (200, "wake_up")
        assert pool.calls == [("sleep", {"name": "a", "level": 2, "drain_s": 0.0})]
        status, answer, _ = await call(app, "GET", "/pool")
        assert answer["engines"][0]["name"] == "a"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/pool/sleep", {"name": "a", "levle": 2}, 400),
        ("/pool/sleep", {}, 400),
        ("/pool/sleep", b"nope", 400),
        ("/pool/dance", {}, 404),
        ("/pool/load", {"name": "a", "engine_args": {"timeout_s": 1}}, 400),
        ("/pool", {}, 405),
    ],
)
async def test_what_is_no_command_is_told(
    tmp_path: Path, path: str, body: Any, status: int
) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        assert (await call(app, path=path, body=body))[0] == status
        assert pool.calls == []


async def test_a_rejected_command_says_why(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    pool.rejections = [CommandRejected("it is pinned")]
    async with serving(pool, tmp_path) as app:
        status, answer, _ = await call(app, path="/pool/sleep", body={"name": "a"})
        assert (status, answer["error"]["kind"]) == (409, "CommandRejected")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8000"},
        {"origin": "http://evil.example"},
        {"content-type": "text/plain"},
    ],
)
async def test_a_web_page_cannot_command_the_pool(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path) as app:
        answer = await call(app, path="/pool/sleep", body={"name": "a"}, **headers)
        assert answer[0] in (403, 415)
        assert pool.calls == []


async def test_an_operator_key_opens_the_pools_routes(tmp_path: Path) -> None:
    async with serving(FakePool(a="ready"), tmp_path, operator=["op"]) as app:
        assert (await call(app, "GET", "/pool"))[0] == 401
        answer = await call(
            app, "GET", "/pool", host="pool.example", authorization="Bearer op"
        )
        assert answer[0] == 200


async def test_beyond_loopback_they_are_off_without_one(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    routes = PoolRoutes(pool, Keys(()), Bodies(), is_open=False)  # type: ignore[arg-type]
    there = Residents(pool, pool, pool.build, tmp_path)  # type: ignore[arg-type]
    app = Gateway(pool, there, routes, Keys(("k",)), Bodies())  # type: ignore[arg-type]
    assert (await call(app, "GET", "/pool", authorization="Bearer k"))[0] == 403
