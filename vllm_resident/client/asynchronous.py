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
from typing import Any, Literal, Self, get_args

from vllm_resident import config, keys
from vllm_resident.client.connection import (
    Connection,
    OnProgress,
    expect,
    resolve_endpoint,
)
from vllm_resident.errors import CommandRejected, PoolUnreachable, ProtocolError
from vllm_resident.messages import (
    ApplyLayout,
    CheckpointPrefetched,
    Completion,
    EngineSpec,
    FromClient,
    Generate,
    GenerateOutput,
    GetStatus,
    GetTotals,
    LoadEngine,
    PoolStatus,
    PoolStopped,
    PoolTotals,
    PrefetchCheckpoint,
    ShutdownPool,
    SleepEngine,
    StatusReported,
    SwitchDone,
    SwitchEnded,
    SwitchEngines,
    SwitchMoved,
    SwitchReport,
    TotalsReported,
    UnloadEngine,
    WakeUpEngine,
    WatchPool,
)

STATUS_INTERVAL_S = 0.2
# What an engine that goes may still finish, where the caller does not say.
DRAIN_S = 30.0

Strategy = Literal["sleep", "unload", "stage"]

Prompts = str | Sequence[int] | Sequence[str | Sequence[int]]
Engines = Sequence[EngineSpec | Mapping[str, Any]] | str | Path


class AsyncClient:
    """A client of the pool for asyncio code; any number of tasks of one event loop.

    `controller` is the endpoint; without it `VLLM_RESIDENT_CONTROLLER`, and without
    that the socket of the pool called `pool` on this machine. `key_file` holds the key
    of a pool on several machines (default: `VLLM_RESIDENT_KEY_FILE`). `timeout_s` is
    for calls that name no deadline of their own, `connect_timeout_s` how long the first
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
        key_file: str | Path | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self._connection = Connection(
            resolve_endpoint(controller, pool),
            connect_timeout_s,
            keys.read(key_file) if key_file else keys.of_environment(),
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
        model: str = "",
        *,
        ranks: list[int] | int | None = None,
        asleep: bool = False,
        pinned: bool = False,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        **engine_args: Any,
    ) -> SwitchReport:
        """Build an engine called `name` from the checkpoint `model`; wait until it
        serves.

        Without `model`, the one that pool.toml declares under the name. `ranks` are
        global ranks, or how many the pool shall pick; by default as many as the
        parallel sizes need. `engine_args` are vLLM's `EngineArgs` by name, and its
        server's options (`chat_template`, `tool_call_parser`, ...). A relative
        `model` that exists here is passed on as an absolute path. With `asleep` it is
        left at sleep level 1; a `pinned` engine never makes room for another one.
        `on_progress` is called on the event loop at each phase and about once a second;
        it must not block. Cancelling stops the waiting, not the load.

        Raises `CommandRejected` (nothing was changed) or `RankFailure` (every rank
        has given back what it had built).
        """
        spec = EngineSpec(
            name,
            config.resolve_model(model),
            ranks,
            config.resolve_paths(engine_args),
            asleep,
            pinned,
        )
        timeout_s = self._default(timeout_s)
        command = LoadEngine(
            call=self._connection.next_call(), spec=spec, timeout_s=timeout_s
        )
        return await self._switch(command, timeout_s, on_progress)

    async def unload(
        self,
        name: str,
        *,
        drain_s: float = 0.0,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Destroy the engine and give everything back; its ranks stay.

        Requests in flight may go on for `drain_s` seconds, then they are aborted: their
        sequences finish with reason "abort". Raises `CommandRejected` where there is
        no engine of that name, or `ReleaseIncomplete` where a rank still holds
        something of it.
        """
        timeout_s = self._default(timeout_s)
        command = UnloadEngine(
            call=self._connection.next_call(),
            name=name,
            timeout_s=timeout_s,
            drain_s=drain_s,
        )
        return await self._switch(command, timeout_s, on_progress)

    async def sleep(
        self,
        name: str,
        level: int = 1,
        *,
        drain_s: float = DRAIN_S,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Put the engine to sleep: its KV cache goes, the engine itself stays.

        By vLLM's levels: 1 keeps the weights in host memory, 2 drops them, to be read
        from the checkpoint again on waking. An engine asleep at level 1 may be put to
        level 2. Requests in flight are drained as in `unload`. Raises
        `CommandRejected` (nothing was changed), or `RankFailure`: it is awake still.
        """
        timeout_s = self._default(timeout_s)
        command = SleepEngine(
            call=self._connection.next_call(),
            name=name,
            level=level,
            timeout_s=timeout_s,
            drain_s=drain_s,
        )
        return await self._switch(command, timeout_s, on_progress)

    async def wake_up(
        self,
        name: str,
        *,
        drain_s: float = DRAIN_S,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Wake an engine that sleeps; wait until it serves.

        What is awake on its ranks and leaves no room for it is put to sleep, its
        requests drained for `drain_s` seconds. Raises `CommandRejected` (nothing was
        changed), or `RankFailure`: it sleeps still, and what was awake is again.
        """
        timeout_s = self._default(timeout_s)
        command = WakeUpEngine(
            call=self._connection.next_call(),
            name=name,
            timeout_s=timeout_s,
            drain_s=drain_s,
        )
        return await self._switch(command, timeout_s, on_progress)

    async def switch(
        self,
        old: str,
        new: str | EngineSpec | Mapping[str, Any],
        *,
        drain_s: float = DRAIN_S,
        strategy: Strategy = "sleep",
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Put the engine `old` aside and bring `new` up instead, or change nothing.

        `new` is the name of an engine that sleeps or of a model that pool.toml
        declares, or an engine to be loaded, as in `apply` (on the ranks of `old` where
        it names none). `strategy` "sleep" puts `old` to sleep at level 1 first;
        "unload" gives up its memory first, and builds it anew if the switch fails;
        "stage" builds `new` asleep while `old` goes on serving, then exchanges them.

        The report's `unavailable_s` is how long neither could serve. Raises
        `CommandRejected` (nothing was changed), or `RankFailure`: `old` serves again.
        """
        if strategy not in get_args(Strategy):
            raise CommandRejected(
                f"strategy {strategy!r}: it is one of {', '.join(get_args(Strategy))}"
            )
        spec = EngineSpec(new) if isinstance(new, str) else config.engine_spec(new)
        timeout_s = self._default(timeout_s)
        command = SwitchEngines(
            call=self._connection.next_call(),
            old=old,
            new=spec,
            timeout_s=timeout_s,
            drain_s=drain_s,
            strategy=strategy,
        )
        return await self._switch(command, timeout_s, on_progress)

    async def prefetch(
        self,
        model: str,
        *,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> CheckpointPrefetched:
        """Read a checkpoint into the page cache of every machine of the pool, so that
        a load or a wake-up of level 2 finds it in memory; engines go on serving.

        `model` is a folder, or the name of a model: one that pool.toml declares, or
        one of a hub whose files are on the machines already. Raises `CommandRejected`
        where a machine has no such files or no memory for them.
        """
        timeout_s = self._default(timeout_s)
        command = PrefetchCheckpoint(
            call=self._connection.next_call(),
            model=config.resolve_model(model),
            timeout_s=timeout_s,
        )
        return await self._connection.ask(
            command, CheckpointPrefetched, timeout_s, on_progress
        )

    async def apply(
        self,
        engines: Engines,
        *,
        drain_s: float = 0.0,
        timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> SwitchReport:
        """Make the pool hold exactly these engines, in one transaction.

        `engines` are `EngineSpec`s, tables like those of a layout file, or the path of
        one. An engine that already is as asked stays untouched; the requests of one
        that goes are drained for `drain_s` seconds.
        """
        timeout_s = self._default(timeout_s)
        specs = (
            config.read_layout(engines)
            if isinstance(engines, (str, Path))
            else [config.engine_spec(engine) for engine in engines]
        )
        command = ApplyLayout(
            call=self._connection.next_call(),
            engines=specs,
            timeout_s=timeout_s,
            drain_s=drain_s,
        )
        return await self._switch(command, timeout_s, on_progress)

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

    async def totals(self) -> PoolTotals:
        """What was counted since the controller began."""
        command = GetTotals(call=self._connection.next_call())
        reply = await self._connection.ask(
            command, TotalsReported, self._connection.connect_timeout_s
        )
        return reply.totals

    async def watch(self) -> AsyncGenerator[SwitchMoved | SwitchEnded]:
        """Every switch, whoever caused it, as it gets on.

        Yields the last switches that have ended, the oldest first; then a
        `SwitchMoved` whenever one under way gets on, and its `SwitchEnded`. Goes on
        until it is left; raises when the pool stops.
        """
        command = WatchPool(call=self._connection.next_call())
        replies = self._connection.replies(command, float("inf"))
        async with contextlib.aclosing(replies):
            async for reply in replies:
                if not isinstance(reply, SwitchMoved | SwitchEnded):
                    raise ProtocolError(f"{type(reply).__name__} of no switch")
                yield reply

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

    async def _switch(
        self, command: FromClient, timeout_s: float, on_progress: OnProgress | None
    ) -> SwitchReport:
        reply = await self._connection.ask(command, SwitchDone, timeout_s, on_progress)
        return reply.report

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
