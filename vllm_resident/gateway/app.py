"""The gateway's ASGI app: which request goes where.

Inference goes to the app of the model it names, vLLM's own; what is asked of all models
together is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from vllm_resident.client import AsyncClient
from vllm_resident.config import adapters
from vllm_resident.errors import ResidentError
from vllm_resident.gateway import asgi, metrics, problems, routes, status_page
from vllm_resident.gateway.asgi import (
    Bodies,
    Disconnected,
    Keys,
    Receive,
    Scope,
    Send,
)
from vllm_resident.gateway.pool_routes import PoolRoutes
from vllm_resident.gateway.problems import Problem
from vllm_resident.gateway.residents import Residents, known_models
from vllm_resident.gateway.routes import Who
from vllm_resident.messages import EngineStatus, PoolStatus

log = logging.getLogger("vllm_resident.gateway")

# So often a request goes to its model anew where the engine it went to was given up.
MAX_TRIES = 5

# Open to everybody, as in vLLM's server: nothing of a request or an answer shows here.
_OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
# Who scrapes waits ten seconds; a pool that does not answer is a fact, too.
METRICS_TIMEOUT_S = 3.0


class Gateway:
    """One ASGI app for all models of a pool. `keys` open inference; `version` is
    vLLM's."""

    def __init__(
        self,
        client: AsyncClient,
        residents: Residents,
        pool_routes: PoolRoutes,
        keys: Keys,
        bodies: Bodies,
        version: str = "",
    ) -> None:
        self._client = client
        self._residents = residents
        self._pool_routes = pool_routes
        self._keys = keys
        self._bodies = bodies
        self._version = version
        self._created = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_on(message: Any) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._route(scope, receive, send_on)
        except Disconnected:
            pass
        except Problem as problem:
            await asgi.answer(send, problem.status, problem.body(), problem.headers)
        # The one broad except of this process.
        except Exception as error:
            log.exception("event=request_failed path=%s", scope["path"])
            if not has_begun:
                text = f"the gateway failed at this request: {type(error).__name__}"
                await asgi.answer(send, 500, Problem(500, text).body())

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if path == "/pool" or path.startswith("/pool/"):
            await self._pool_routes(scope, receive, send)
            return
        if path == "/" and method in ("GET", "HEAD"):
            # It says nothing of the pool: what it shows is asked for with a key.
            await status_page.answer(method, send)
            return
        if path not in _OPEN_PATHS:
            self._keys.check(scope)
        match routes.who_answers(method, path):
            case Who.GATEWAY:
                await self._answer_itself(path, send)
            case Who.RESPONSE:
                await self._of_response(routes.response_id(path), scope, receive, send)
            case Who.MODEL:
                await self._infer(scope, receive, send)

    async def _answer_itself(self, path: str, send: Send) -> None:
        if path in ("/health", "/ping"):
            await self._health(send)
        elif path == "/metrics":
            await self._metrics(send)
        elif path == "/version":
            await asgi.answer(send, 200, {"version": self._version})
        elif path == "/v1/models":
            status = await self._status()
            cards = [self._card(status, name) for name in _served_names(status)]
            await asgi.answer(send, 200, {"object": "list", "data": cards})
        else:
            await self._one_model(path.removeprefix("/v1/models/"), send)

    async def _of_response(
        self, name: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Of a response that is kept by the app that made it: no engine is needed."""
        app = self._residents.app_with_response(name)
        if app is None:
            raise Problem(404, f"no response {name!r} is kept here")
        async with self._bodies.read(scope, receive) as body:
            await app(scope, asgi.replayed(body, receive), send)

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._bodies.read(scope, receive) as body:
            name = await self._engine_of(await self._model_named(scope, body))
            for _ in range(MAX_TRIES):
                if await self._is_answered(name, body, scope, receive, send):
                    return
            raise problems.unavailable(
                f"model {name!r}: its engine was given up under this request "
                f"{MAX_TRIES} times"
            )

    async def _is_answered(
        self, name: str, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        """Whether the model's app has answered: not where the engine was given up (for
        a budget, for other ranks) when the request was on its way to it. Raises
        `Problem` where it had fallen asleep, and does not come up again for this."""
        gone = asyncio.ensure_future(asgi.gone(receive))
        try:
            async with self._residents.serving(name, gone) as visit:
                # From here on the app listens for it.
                gone.cancel()
                await asyncio.wait({gone})
                if not gone.cancelled():
                    raise Disconnected
                answer = asgi.HeldAnswer(send, visit.begin_answer)
                given = asgi.replayed(body, receive, visit.refusal)
                try:
                    # The app writes into its scope.
                    await visit.app(dict(scope), given, answer.send)
                except Exception as error:
                    if not visit.is_withdrawn:
                        raise
                    log.info("event=withdrawn model=%s error=%r", name, error)
                if visit.is_withdrawn and visit.refusal.done():
                    raise visit.refusal.result()
                return not visit.is_withdrawn
        finally:
            gone.cancel()

    async def _model_named(self, scope: Scope, body: bytes) -> str:
        kind = asgi.header(scope, b"content-type").partition(";")[0].strip().lower()
        if kind.startswith("multipart/"):
            raise Problem(
                415, "the model is read from a JSON body: forms are not served"
            )
        named = asgi.model_named(body) if body or scope["method"] == "POST" else None
        return named or asgi.query(scope, "model") or await self._only_model()

    async def _engine_of(self, name: str) -> str:
        """Whose the name is: a model's own, or an adapter's of it."""
        engine = self._residents.engine_of(name)
        if engine is None:
            engine = (await self._status()).adapters.get(name, name)
        return engine

    async def _only_model(self) -> str:
        """What is meant by a request that names none: there is but one."""
        known = known_models(await self._status())
        if len(known) != 1:
            raise Problem(400, f"name a model: there are {known}", param="model")
        return known[0]

    async def _health(self, send: Send) -> None:
        """Whether requests may come: the pool answers and has ranks."""
        status = await self._status()
        if status.phase not in ("ready", "degraded"):
            raise problems.unavailable(f"the pool is {status.phase}")
        await asgi.answer(send, 200, {"pool": status.pool, "phase": status.phase})

    async def _metrics(self, send: Send) -> None:
        status = totals = None
        with contextlib.suppress(TimeoutError, ResidentError):
            async with asyncio.timeout(METRICS_TIMEOUT_S):
                status = await self._client.status()
                totals = await self._client.totals()
        counts = self._residents.counts()
        page, content_type = await asyncio.to_thread(
            metrics.page, counts, status, totals
        )
        await asgi.answer_bytes(send, 200, page, content_type)

    async def _one_model(self, name: str, send: Send) -> None:
        status = await self._status()
        if name not in _served_names(status):
            raise problems.unknown_model(name, _served_names(status))
        await asgi.answer(send, 200, self._card(status, name))

    async def _status(self) -> PoolStatus:
        try:
            return await self._client.status()
        except ResidentError as error:
            raise problems.unavailable(error.message) from error

    def _card(self, status: PoolStatus, name: str) -> dict[str, Any]:
        """A model, or an adapter of one, as OpenAI's API shows it, and beside that its
        state here."""
        is_own = name in known_models(status)
        parent = name if is_own else status.adapters[name]
        engine = next((e for e in status.engines if e.name == parent), None)
        root = engine.model if engine else None
        if engine and not is_own:
            root = adapters(engine.engine_args).get(name)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "vllm",
            "root": root,
            "parent": None if is_own else parent,
            "max_model_len": engine.engine_args.get("max_model_len")
            if engine
            else None,
            "permission": [],
            **_state(engine),
        }


def _served_names(status: PoolStatus) -> list[str]:
    """What a request may name: models, and the adapters they were given."""
    return sorted({*known_models(status), *status.adapters})


def _state(engine: EngineStatus | None) -> dict[str, Any]:
    if engine is None:
        return {"state": "declared", "sleep_level": None, "num_requests": 0}
    return {
        "state": engine.phase,
        "sleep_level": engine.sleep_level,
        "num_requests": engine.num_requests,
    }
