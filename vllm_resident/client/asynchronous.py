"""`AsyncClient`: the pool's commands as methods, with typed results.

Brings arguments into the shape of the messages and refuses what cannot be one. All else
that may be wrong with a command is the controller's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_resident import config
from vllm_resident.client.connection import (
    Connection,
    OnProgress,
    expect,
    resolve_endpoint,
)
from vllm_resident.errors import CommandRejected, PoolUnreachable
from vllm_resident.messages import (
    ApplyLayout,
    Completion,
    EngineSpec,
    Generate,
    GenerateOutput,
    GetStatus,
    LoadEngine,
    PoolStatus,
    PoolStopped,
    ShutdownPool,
    StatusReported,
    SwitchDone,
    SwitchReport,
    UnloadEngine,
)

STATUS_INTERVAL_S = 0.2

Prompts = str | Sequence[int] | Sequence[str | Sequence[int]]
Engines = Sequence[EngineSpec | Mapping[str, Any]] | str | Path


class AsyncClient:
    """A client of the pool for asyncio code; any number of tasks of one event loop.

    `controller` is the endpoint; without it `VLLM_RESIDENT_CONTROLLER`, and without
    that the socket of the pool called `pool` on this machine. `timeout_s` holds for
    calls that name no deadline of their own; `connect_timeout_s` is how long the first
    answer to a call may take. Nothing is sent before the first call; the client belongs
    to the event loop that makes it.

    Every call raises `PoolUnreachable` when no controller answers, or when one that
    answered falls silent for 15 seconds; `ProtocolError` when the message is too large
    or the controller speaks another version; otherwise what the pool answers, as the
    class of the tree in `vllm_resident.errors`.
    """

    def __init__(
        self,
        controller: str | None = None,
        *,
        pool: str = "default",
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self._connection = Connection(
            resolve_endpoint(controller, pool), connect_timeout_s
        )
        self._timeout_s = timeout_s

    @property
    def endpoint(self) -> str:
        """The controller's endpoint."""
        return self._connection.endpoint

    async def load(
        self,
        /,
        name: str,
        model: str,
        *,
        ranks: list[int] | int | None = None,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        **engine_args: Any,
    ) -> SwitchReport:
        """Build an engine called `name` from the checkpoint `model`; wait until it
        serves.

        `ranks` are global ranks, or how many the pool shall pick; by default as many as
        the parallel sizes need. `engine_args` are vLLM's `EngineArgs` by name. A
        relative `model` that exists here is passed on as an absolute path.
        `on_progress` is called on the event loop at each phase and about once a second;
        it must not block. Cancelling stops the waiting, not the load.

        Raises `CommandRejected` (nothing was changed) or `RankFailure` (every rank
        has given back what it had built).
        """
        spec = EngineSpec(name, config.resolve_model(model), ranks, engine_args)
        timeout_s = self._default(timeout_s)
        command = LoadEngine(
            call=self._connection.next_call(), spec=spec, timeout_s=timeout_s
        )
        reply = await self._connection.ask(command, SwitchDone, timeout_s, on_progress)
        return reply.report

    async def unload(
        self,
        name: str,
        *,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Destroy the engine and give everything back; its ranks stay.

        Raises `CommandRejected` where there is none of that name, or
        `ReleaseIncomplete` where a rank still holds something of it.
        """
        timeout_s = self._default(timeout_s)
        command = UnloadEngine(
            call=self._connection.next_call(), name=name, timeout_s=timeout_s
        )
        reply = await self._connection.ask(command, SwitchDone, timeout_s, on_progress)
        return reply.report

    async def apply(
        self,
        engines: Engines,
        *,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Make the pool hold exactly these engines, in one transaction.

        `engines` are `EngineSpec`s, tables like those of a layout file, or the path of
        one. An engine that already is as asked stays untouched.
        """
        timeout_s = self._default(timeout_s)
        specs = (
            config.read_layout(engines)
            if isinstance(engines, (str, Path))
            else [config.engine_spec(engine) for engine in engines]
        )
        command = ApplyLayout(
            call=self._connection.next_call(), engines=specs, timeout_s=timeout_s
        )
        reply = await self._connection.ask(command, SwitchDone, timeout_s, on_progress)
        return reply.report

    async def generate(
        self,
        /,
        engine: str,
        prompts: Prompts,
        sampling_params: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **sampling_kwargs: Any,
    ) -> list[Completion]:
        """Complete one prompt or many, as text or as token ids.

        Sampling parameters are vLLM's by name, in `sampling_params`, as keywords, or
        both. Returns `n` completions for each prompt, sorted by prompt, then by index;
        no prompts, no completions. Cancelling aborts the requests on every rank.
        """
        batch = _as_batch(prompts)
        if not batch:
            return []
        params = _sampling(sampling_params, sampling_kwargs)
        replies = self._generate(engine, batch, params, False, timeout_s)
        async with contextlib.aclosing(replies):
            pieces = [piece async for piece in replies]
        return sorted(pieces, key=lambda piece: (piece.prompt_index, piece.index))

    async def stream(
        self,
        /,
        engine: str,
        prompt: str | list[int],
        sampling_params: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **sampling_kwargs: Any,
    ) -> AsyncGenerator[Completion]:
        """Complete one prompt piece by piece: text and token ids are what is new.

        The call is made at the first iteration. Leaving the iterator early aborts the
        request; in asyncio code use `contextlib.aclosing` to leave it at a known time.
        """
        batch = _as_batch(prompt)
        if len(batch) != 1:
            raise CommandRejected(f"a stream takes one prompt, not {len(batch)}")
        params = _sampling(sampling_params, sampling_kwargs)
        pieces = self._generate(engine, batch, params, True, timeout_s)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def status(self) -> PoolStatus:
        """The whole pool at this moment."""
        command = GetStatus(call=self._connection.next_call())
        reply = await self._connection.ask(
            command, StatusReported, self._connection.connect_timeout_s
        )
        return reply.status

    async def shutdown(
        self,
        timeout_s: float = 60.0,
        *,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Unload every engine and end every rank; returns when the pool has stopped."""
        command = ShutdownPool(call=self._connection.next_call(), timeout_s=timeout_s)
        await self._connection.ask(command, PoolStopped, timeout_s, on_progress)

    async def wait_ready(
        self,
        timeout_s: float = 300.0,
        *,
        on_status: Callable[[PoolStatus], None] | None = None,
    ) -> PoolStatus:
        """Wait until every rank of the pool has reported; returns its status.

        `on_status` is called on the event loop with each status seen on the way. Raises
        `PoolUnreachable` when the pool is not ready within `timeout_s`.
        """
        seen = "no controller answered"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(PoolUnreachable):
                        status = await self.status()
                        if on_status is not None:
                            on_status(status)
                        if status.phase == "ready":
                            return status
                        seen = _describe(status)
                    await asyncio.sleep(STATUS_INTERVAL_S)
        raise PoolUnreachable(
            f"the pool at {self.endpoint} was not ready within {timeout_s:g} s "
            f"({seen}): see the logs in its folder, or run `vllm-resident doctor`"
        )

    async def close(self) -> None:
        """Give up the connection; calls under way fail. No-op if already closed."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _default(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    async def _generate(
        self,
        engine: str,
        prompts: list[str | list[int]],
        sampling_params: dict[str, Any],
        stream: bool,
        timeout_s: float | None,
    ) -> AsyncGenerator[Completion]:
        timeout_s = self._default(timeout_s)
        command = Generate(
            call=self._connection.next_call(),
            engine=engine,
            prompts=prompts,
            sampling_params=sampling_params,
            stream=stream,
            timeout_s=timeout_s,
        )
        replies = self._connection.replies(command, timeout_s)
        async with contextlib.aclosing(replies):
            async for reply in replies:
                for piece in expect(GenerateOutput, reply).completions:
                    yield piece


def _as_batch(prompts: Prompts) -> list[str | list[int]]:
    """One prompt or many, as many."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise CommandRejected(
            "prompts are text, token ids, or a list of either, not "
            f"{type(prompts).__name__}"
        )
    if prompts and all(map(_is_token, prompts)):
        return [list(prompts)]
    return [_as_prompt(position, prompt) for position, prompt in enumerate(prompts)]


def _as_prompt(position: int, prompt: object) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (list, tuple)) and all(map(_is_token, prompt)):
        return list(prompt)
    raise CommandRejected(
        f"prompt {position} is neither text nor a list of token ids: "
        f"{repr(prompt)[:80]}"
    )


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sampling(
    given: Mapping[str, Any] | None, keywords: Mapping[str, Any]
) -> dict[str, Any]:
    given = given or {}
    for name in given.keys() & keywords.keys():
        raise CommandRejected(f"sampling parameter {name!r} is given twice")
    return {**given, **keywords}


def _describe(status: PoolStatus) -> str:
    ready = sum(rank.phase == "ready" for rank in status.ranks)
    return f"phase {status.phase!r}, {ready} of {status.world_size} ranks ready"
