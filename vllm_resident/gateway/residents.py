"""The models this gateway serves: each with a frontend, brought up when it is called.

One `Served` per model in use. A request waits until the model's engine is awake and its
frontend attached; what is asleep is woken, what pool.toml declares is loaded. Knows the
pool by its client and a frontend by the few methods of `Frontend`; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vllm_resident import transport
from vllm_resident.client import AsyncClient
from vllm_resident.errors import CommandRejected, PoolUnreachable, ResidentError
from vllm_resident.gateway import problems
from vllm_resident.gateway.asgi import App, Disconnected
from vllm_resident.gateway.attachment import Attachments
from vllm_resident.messages import (
    EngineSpec,
    EngineStatus,
    FrontendAttached,
    PoolStatus,
    Progress,
)

log = logging.getLogger("vllm_resident.gateway")

# How long a request may wait for its model; a load may go on after that.
MAX_WAIT_S = 120.0
# An engine that has requests serves at least so long before another that needs its
# ranks is brought up: two models called in turn would only take turns in falling
# asleep.
MIN_RESIDENCY_S = 2.0
# So many frontends at once: each holds a tokenizer and its configuration.
MAX_FRONTENDS = 16
# What a command is refused for may pass: so often it is tried before that is believed.
NUM_TRIES = 5
POLL_S = 0.1
WATCH_S = 0.5
# Requests that were aborted when their engine fell asleep have ended by then: those
# still there came too late for it, wait at the leader, and want it awake.
OVERDUE_S = 1.0

_SETTLED = ("ready", "asleep", "failed", "lost")


class Frontend(Protocol):
    """One model's server in this process (`frontend.py`)."""

    @property
    def app(self) -> App: ...

    @property
    def num_unfinished(self) -> int: ...

    async def open(self) -> None: ...

    def fail(self) -> None: ...

    def close(self) -> None: ...


# What builds one: of an engine's spec, at two addresses. Blocks, on a thread of its
# own; the leader has connected already.
Build = Callable[[EngineSpec, str, str], Frontend]


@dataclass
class Served:
    """One model, as this gateway knows it."""

    name: str
    # Of its engine, as the controller last said; "" while there is no attachment.
    phase: str = ""
    phase_since: float = 0.0
    generation: int = 0
    frontend: Frontend | None = None
    attachment: asyncio.Task[None] | None = None
    bringing_up: asyncio.Task[None] | None = None
    num_waiting: int = 0
    num_in_flight: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def is_ready(self) -> bool:
        return self.frontend is not None and self.phase == "ready"

    @property
    def is_wanted(self) -> bool:
        return self.num_waiting + self.num_in_flight > 0

    @property
    def has_time_left(self) -> bool:
        """Whether it is to go on serving, though another wants its ranks."""
        age_s = time.monotonic() - self.phase_since
        return self.is_wanted and self.phase == "ready" and age_s < MIN_RESIDENCY_S


class Residents:
    """All models of one gateway, in one event loop."""

    def __init__(
        self,
        client: AsyncClient,
        attachments: Attachments,
        build: Build,
        directory: Path,
    ) -> None:
        self._client = client
        self._attachments = attachments
        self._build = build
        self._directory = directory
        self._served: dict[str, Served] = {}
        # vLLM's configuration keeps state in the process: one at a time.
        self._building = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch(), name="gateway watch")

    async def close(self) -> None:
        """Detach and close every frontend. No-op if already closed."""
        tasks = [self._watcher] if self._watcher else []
        self._watcher = None
        tasks += [s.bringing_up for s in self._served.values() if s.bringing_up]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for served in list(self._served.values()):
            await self._release(served)
        self._served.clear()

    def counts(self) -> dict[str, tuple[int, int]]:
        """By model: requests that wait for it, and that are with it."""
        return {s.name: (s.num_waiting, s.num_in_flight) for s in self._served.values()}

    @asynccontextmanager
    async def serving(
        self, name: str, gone: asyncio.Future[None]
    ) -> AsyncIterator[App]:
        """The app of a model that is awake, for one request. Raises `Problem`: 404
        where there is no such model, 503 where it cannot be brought up in time; and
        `Disconnected` where `gone`, the caller's going, is done before that."""
        served = self._served.setdefault(name, Served(name))
        served.num_waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                while not served.is_ready:
                    task = self._bring_up(served)
                    await asyncio.wait({task, gone}, return_when=FIRST_COMPLETED)
                    if gone.done():
                        raise Disconnected
                    await task
        except TimeoutError:
            raise problems.unavailable(
                f"model {name!r} was not up within {MAX_WAIT_S:g} s"
            ) from None
        except ResidentError as error:
            raise problems.of_model(name, error) from error
        finally:
            served.num_waiting -= 1
            self._forget_if_unused(served)
        assert served.frontend is not None
        served.num_in_flight += 1
        try:
            yield served.frontend.app
        finally:
            served.num_in_flight -= 1
            served.last_used = time.monotonic()
            self._forget_if_unused(served)

    # ------------------------------------------------------------ bringing one up

    def _bring_up(self, served: Served) -> asyncio.Task[None]:
        """Once for all who wait; who leaves does not end it for the others."""
        if served.bringing_up is None:
            served.bringing_up = asyncio.create_task(
                self._make_ready(served), name=f"bring up {served.name}"
            )
            served.bringing_up.add_done_callback(lambda task: self._is_up(served, task))
        return served.bringing_up

    def _is_up(self, served: Served, task: asyncio.Task[None]) -> None:
        served.bringing_up = None
        if not task.cancelled() and (error := task.exception()):
            log.warning("event=not_brought_up model=%s error=%s", served.name, error)
        self._forget_if_unused(served)

    async def _make_ready(self, served: Served) -> None:
        engine = await self._make_awake(served)
        is_detached = served.attachment is None or served.attachment.done()
        is_of_another = served.generation != engine.generation
        if served.frontend is None or is_detached or is_of_another:
            await self._release(served)
            await self._make_place(served)
            await self._attach(served)
        elif served.phase != "ready":
            # The status was before or after what the attachment says: it is next.
            await asyncio.sleep(POLL_S)

    async def _make_awake(self, served: Served) -> EngineStatus:
        """Have the engine loaded and awake, whatever that takes; its status then."""
        num_tries = 0
        while True:
            status = await self._client.status()
            engine = _engine_of(status, served.name)
            if engine is not None and engine.phase == "ready":
                return engine
            try:
                await self._take_step(served.name, status, engine)
            except CommandRejected:
                # Somebody else's command may be in the way for as long as it runs.
                num_tries += _is_settled(await self._client.status())
                if num_tries >= NUM_TRIES:
                    raise
                await asyncio.sleep(POLL_S)

    async def _take_step(
        self, name: str, status: PoolStatus, engine: EngineStatus | None
    ) -> None:
        if engine is None:
            if name not in status.models:
                raise problems.unknown_model(name, known_models(status))
            await self._load(name)
        elif engine.phase == "failed":
            raise problems.unavailable(
                f"model {name!r} failed and must be loaded again: {engine.error}"
            )
        elif engine.phase == "asleep":
            await self._let_serve(status, engine)
            await self._client.wake_up(name)
        else:
            await asyncio.sleep(POLL_S)

    async def _load(self, name: str) -> None:
        """Load a declared model: on free ranks, else beside what is awake, asleep
        until that has made room."""
        try:
            await self._client.load(name)
        except CommandRejected as error:
            log.info("event=load_asleep model=%s because=%r", name, error.message)
            await self._client.load(name, asleep=True)

    async def _let_serve(self, status: PoolStatus, engine: EngineStatus) -> None:
        """Wait until those on the engine's ranks have had their time."""
        there = [
            self._served[other.name]
            for other in status.engines
            if other.name in self._served and set(other.ranks) & set(engine.ranks)
            if other.name != engine.name
        ]
        # Time ends it as well as requests do, so there is no one event to wait for.
        while any(served.has_time_left for served in there):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    # ------------------------------------------------------------ frontends

    async def _make_place(self, served: Served) -> None:
        """Close the frontend unused longest, where there are too many."""
        having = [s for s in self._served.values() if s.frontend is not None]
        if len(having) < MAX_FRONTENDS:
            return
        unused = [s for s in having if not s.is_wanted and s is not served]
        if not unused:
            raise problems.unavailable(
                f"{len(having)} models are being called at once, more than this "
                "gateway keeps"
            )
        await self._release(min(unused, key=lambda s: s.last_used))

    async def _attach(self, served: Served) -> None:
        """Attach to the engine's leader and build the frontend."""
        number = next(self._numbers)
        paths = [
            self._directory / f"http-{os.getpid()}-{number}-{way}.sock"
            for way in ("in", "out")
        ]
        into, out = (transport.unix_endpoint(path) for path in paths)
        attached: asyncio.Future[FrontendAttached] = (
            asyncio.get_running_loop().create_future()
        )
        served.attachment = asyncio.create_task(
            self._follow(served, into, out, attached), name=f"attach {served.name}"
        )
        try:
            reply = await attached
            began = time.monotonic()
            async with self._building:
                frontend = await asyncio.to_thread(self._build, reply.spec, into, out)
            await frontend.open()
        except BaseException:
            # Cancelled too: nobody else knows of the attachment.
            await self._release(served)
            raise
        finally:
            # Both sides are connected, or never will be; libzmq leaves the files.
            for path in paths:
                path.unlink(missing_ok=True)
        served.frontend = frontend
        served.generation = reply.generation
        log.info(
            "event=frontend_built model=%s generation=%d seconds=%.3f",
            served.name, reply.generation, time.monotonic() - began,
        )  # fmt: skip

    async def _follow(
        self,
        served: Served,
        into: str,
        out: str,
        attached: asyncio.Future[FrontendAttached],
    ) -> None:
        """Keep the attachment until it ends, or this task is cancelled."""
        error: Exception = PoolUnreachable("the attachment ended")

        def on_progress(progress: Progress) -> None:
            self._note_phase(served, progress.phase)

        replies = self._attachments.attach(served.name, into, out, on_progress)
        try:
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    if isinstance(reply, FrontendAttached):
                        self._note_phase(served, reply.phase)
                        attached.set_result(reply)
                    else:
                        error = PoolUnreachable(reply.reason)
        except ResidentError as failure:
            error = failure
        finally:
            self._note_phase(served, "")
            if not attached.done():
                attached.set_exception(error)
                attached.exception()  # seen, should nobody wait any more
        log.info("event=detached model=%s why=%s", served.name, error)
        if (frontend := served.frontend) is not None:
            served.frontend = None
            frontend.fail()
            frontend.close()
        self._forget_if_unused(served)

    def _note_phase(self, served: Served, phase: str) -> None:
        if phase != served.phase:
            served.phase, served.phase_since = phase, time.monotonic()

    async def _release(self, served: Served) -> None:
        """Detach and close its frontend, if there is one."""
        attachment, served.attachment = served.attachment, None
        frontend, served.frontend = served.frontend, None
        if attachment is not None:
            attachment.cancel()
            await asyncio.wait([attachment])
        if frontend is not None:
            frontend.fail()
            frontend.close()

    def _forget_if_unused(self, served: Served) -> None:
        """Names that nobody has must not add up."""
        is_used = served.is_wanted or served.frontend or served.bringing_up
        if not is_used and self._served.get(served.name) is served:
            del self._served[served.name]

    async def _watch(self) -> None:
        """Wake engines that fell asleep while requests were on their way to them."""
        while True:
            await asyncio.sleep(WATCH_S)
            for served in list(self._served.values()):
                is_overdue = (
                    served.frontend is not None
                    and served.phase == "asleep"
                    and time.monotonic() - served.phase_since > OVERDUE_S
                    and served.frontend.num_unfinished > 0
                )
                if is_overdue and served.bringing_up is None:
                    log.info("event=wake_for_late_requests model=%s", served.name)
                    self._bring_up(served)


def known_models(status: PoolStatus) -> list[str]:
    """What a request may name: engines that are there, and declared models."""
    there = {engine.name for engine in status.engines}
    return sorted(there | set(status.models))


def _engine_of(status: PoolStatus, name: str) -> EngineStatus | None:
    return next((e for e in status.engines if e.name == name), None)


def _is_settled(status: PoolStatus) -> bool:
    return all(engine.phase in _SETTLED for engine in status.engines)
