"""One model's server: vLLM's `AsyncLLM` and OpenAI app over a resident engine.

With `refusals.py` what of the gateway imports vLLM. The engine core is the engine's
leader, in another process, which speaks vLLM's protocol (`rank/frontends.py`);
everything that callers see is vLLM's own code (0.32.0, entrypoints/launchers).
"""

from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import vllm
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.parser import metrics as parser_metrics
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_resident.errors import CommandRejected
from vllm_resident.gateway import metrics
from vllm_resident.gateway.asgi import App, Receive, Scope, Send
from vllm_resident.gateway.refusals import tell_refusals
from vllm_resident.messages import EngineSpec
from vllm_resident.rank.engine import configure
from vllm_resident.rank.server_options import server_arguments

try:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
except ImportError:  # vLLM 0.23.0
    from vllm.entrypoints.openai.api_server import build_app, init_app_state

VLLM_VERSION: str = vllm.__version__
# Its engine has answered before it is built; what is left is one call.
OPEN_TIMEOUT_S = 60.0


# The model whose app has the request of this task.
_serving: ContextVar[str] = ContextVar("serving", default="")


class _NameOfServing:
    """A label's value, of which Prometheus takes the text."""

    def __str__(self) -> str:
        return _serving.get()


class VllmFrontend:
    """Built on any thread, then used on the event loop's. Close it once."""

    def __init__(
        self,
        name: str,
        llm: AsyncLLM,
        arguments: Namespace,
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._llm = llm
        self._arguments = arguments
        self._registry = registry
        self._fastapi: FastAPI | None = None

    @classmethod
    def build(
        cls,
        spec: EngineSpec,
        input_address: str,
        output_address: str,
        *,
        api_keys: Sequence[str] = (),
    ) -> VllmFrontend:
        """Listen at the two addresses until the engine's leader says that it is ready,
        which it has been asked to. Blocks for seconds; not on the event loop.

        Raises `CommandRejected` for an engine that no frontend can be built of, and
        where its leader does not say so in time (VLLM_ENGINE_READY_TIMEOUT_S).
        """
        # Just as a rank configures it: both must see the same model and limits.
        config = configure(
            spec.model, {**spec.engine_args, "served_model_name": spec.name}
        ).config
        if config.parallel_config.data_parallel_size > 1:
            raise CommandRejected(
                f"engine {spec.name!r} is data-parallel, which is not served over HTTP"
            )
        arguments = server_arguments(
            spec.model, config, spec.engine_args, spec.frontend_args
        )
        registry = CollectorRegistry()
        try:
            llm = AsyncLLM.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[_stat_logger(registry)],
                client_addresses={
                    "input_address": input_address,
                    "output_address": output_address,
                },
            )
        except TimeoutError as error:
            raise CommandRejected("its leader did not say that it is ready") from error
        tell_refusals(llm.output_processor)
        arguments.served_model_name = [spec.name]
        arguments.api_key = list(api_keys) or None
        # There are many of them behind one address: none describes it.
        arguments.disable_fastapi_docs = True
        metrics.add(spec.name, registry)
        return cls(spec.name, llm, arguments, registry)

    async def open(self) -> None:
        """Make its app; raises `CommandRejected` where that cannot be now: the leader
        does not answer, or gives no adapter because the engine has fallen asleep."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                tasks = tuple(await self._llm.get_supported_tasks())
                app = build_app(self._arguments, tasks, self._llm.model_config)
                await init_app_state(self._llm, app.state, self._arguments, tasks)
        except TimeoutError as error:
            raise CommandRejected("its leader does not answer") from error
        except ValueError as error:
            raise CommandRejected(f"vLLM's server did not start: {error}") from error
        # vLLM's handler of a dead engine tells its server to exit: there is none here.
        app.state.server = SimpleNamespace(should_exit=False)
        if not self._arguments.enable_tokenizer_info_endpoint:
            # Once an app has had it, vLLM gives it to all (0.32.0, serve/tokenize/
            # api_router.py: a router of the module's).
            app.router.routes[:] = [
                route
                for route in app.router.routes
                if getattr(route, "path", "") != "/tokenizer_info"
            ]
        if self._arguments.tool_call_parser:
            # The label of what is counted, which vLLM keeps one of in a process.
            parser_metrics._model_name = cast("str", _NameOfServing())
        self._fastapi = app

    @property
    def app(self) -> App:
        assert self._fastapi is not None
        return self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._fastapi is not None
        _serving.set(self._name)
        await self._fastapi(scope, receive, send)

    def has_response(self, name: str) -> bool:
        """Whether its app keeps that response; it does where vLLM is told to
        (VLLM_ENABLE_RESPONSES_API_STORE)."""
        assert self._fastapi is not None
        serving = getattr(self._fastapi.state, "openai_serving_responses", None)
        return serving is not None and name in serving.response_store

    def fail(self) -> None:
        """End what still runs: the engine is gone, and nobody else would tell."""
        self._llm.output_processor.propagate_error(EngineDeadError())

    def close(self) -> None:
        self._llm.shutdown()
        # vLLM closes its sockets and leaves their context, with three threads and seven
        # descriptors, to some garbage collection (0.32.0, v1/engine/core_client.py,
        # BackgroundResources). Not here: a socket still open would block the loop.
        context = self._llm.engine_core.resources.ctx
        threading.Thread(
            target=context.term, name="end of context", daemon=True
        ).start()
        metrics.remove(self._name, self._registry)


def _stat_logger(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """vLLM's metrics in a registry of their own: it takes those of the model before
    out of the process's, for which it takes itself to be alone (0.32.0,
    v1/metrics/loggers.py, unregister_vllm_metrics)."""
    members: dict[str, Any] = {
        "_gauge_cls": partial(Gauge, registry=registry),
        "_counter_cls": partial(Counter, registry=registry),
        "_histogram_cls": partial(Histogram, registry=registry),
    }
    return type("ModelStatLogger", (PrometheusStatLogger,), members)
