"""The models this gateway serves: each with a frontend, brought up when it is called.

One `Served` per model in use. A request for a model that is awake goes to its frontend
at once; any other is announced to the pool, which decides (`turns.py`), and waits for
its turn. Knows a frontend by the few methods of `Frontend`; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vllm_resident import transport
from vllm_resident.config import adapters
from vllm_resident.errors import PoolUnreachable, ResidentError
from vllm_resident.gateway import problems
from vllm_resident.gateway.asgi import App, Disconnected
from vllm_resident.gateway.attachment import Attachments
from vllm_resident.gateway.problems import Problem
from vllm_resident.gateway.relay import Relay
from vllm_resident.gateway.served import Frontend, Served, Visit
from vllm_resident.gateway.turns import Turns
from vllm_resident.messages import (
    EngineAwake,
    EngineRefused,
    EngineSpec,
    FrontendAttached,
    ModelCalls,
    PoolStatus,
    Progress,
)

log = logging.getLogger("vllm_resident.gateway")

T = TypeVar("T")

# So many frontends at once: each holds a tokenizer and its configuration.
MAX_FRONTENDS = 16
# The pool says that a model is awake, and its attachment is about to.
POLL_S = 0.05
# What was served is reported so often.
REPORT_S = 1.0
# What an engine ended as it fell asleep is answered within this; what has no answer
# then waits for it to wake up.
ENDED_S = 1.0


# What builds one: of an engine's spec, at two addresses. Blocks, on a thread of its
# own; the leader has connected already.
Build = Callable[[EngineSpec, str, str], Frontend]


# What makes one, for leaders on other machines, of the same two addresses; calls back
# on another thread when it ends by itself.
MakeRelay = Callable[[str, str, Callable[[], None]], Relay]


class Residents:
    """All models of one gateway, in one event loop."""

    def __init__(
        self,
        turns: Turns,
        attachments: Attachments,
        build: Build,
        directory: Path,
        relay: MakeRelay | None = None,
    ) -> None:
        self._turns = turns
        self._attachments = attachments
        self._build = build
        self._directory = directory
        self._relay = relay
        self._served: dict[str, Served] = {}
        # vLLM's configuration keeps state in the process: one at a time.
        self._building = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._reporter: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._reporter = asyncio.create_task(self._report(), name="gateway report")

    async def close(self) -> None:
        """Detach and close every frontend. No-op if already closed."""
        tasks = [self._reporter] if self._reporter else []
        self._reporter = None
        tasks += [s.attaching for s in self._served.values() if s.attaching]
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

    def engine_of(self, name: str) -> str | None:
        """Whose the name is, among the models that have a frontend."""
        there = [s for s in self._served.values() if s.frontend is not None]
        if any(served.name == name for served in there):
            return name
        return next((s.name for s in there if name in s.adapters), None)

    def app_with_response(self, name: str) -> App | None:
        """The app that keeps that response (of OpenAI's Responses API)."""
        for served in self._served.values():
            if served.frontend is not None and served.frontend.has_response(name):
                return served.frontend.app
        return None

    @asynccontextmanager
    async def serving(
        self, name: str, gone: asyncio.Future[None]
    ) -> AsyncIterator[Visit]:
        """A model that is awake and its app, for one request. Raises `Problem`: 404
        where there is no such model, 503 where it does not come up for this request;
        and `Disconnected` where `gone`, the caller's going, is done before that."""
        served = self._served.setdefault(name, Served(name))
        turn = None
        if served.is_ready:
            served.num_begun += 1
        else:
            turn = await self._turn(served, gone)
        assert served.frontend is not None
        refusal: asyncio.Future[Problem] = asyncio.get_running_loop().create_future()
        visit = Visit(served.frontend.app, served, served.num_withdrawn, refusal)
        served.visits.add(visit)
        began = time.monotonic()
        try:
            yield visit
        finally:
            served.visits.remove(visit)
            if visit.asking is not None:
                visit.asking.cancel()
            served.last_used = time.monotonic()
            served.num_ended += 1
            served.service_s += served.last_used - began
            if turn is not None:
                await turn.aclose()
            self._forget_if_unused(served)

    # ------------------------------------------------------------ waiting for a turn

    async def _turn(
        self, served: Served, gone: asyncio.Future[None]
    ) -> AsyncGenerator[Any]:
        """Wait until the model is up and its frontend there. What is returned is open
        as long as the pool is to count the call as one of the model's."""
        served.num_waiting += 1
        began = time.monotonic()
        try:
            while True:
                turn = self._turns.wait(served.name, time.monotonic() - began)
                try:
                    await _unless(gone, self._come_up(served, turn))
                    if served.is_ready:
                        return turn
                # Ended and raised again, cancelled too: the pool counts the call.
                except BaseException:
                    await turn.aclose()
                    raise
                # It has fallen asleep meanwhile.
                await turn.aclose()
        except ResidentError as error:
            raise problems.of_model(served.name, error) from error
        finally:
            served.num_waiting -= 1
            self._forget_if_unused(served)

    async def _come_up(
        self, served: Served, turn: AsyncGenerator[EngineAwake | EngineRefused]
    ) -> None:
        answer = await anext(turn)
        if isinstance(answer, EngineRefused):
            raise problems.of_refusal(answer)
        is_attached = served.attachment is not None and not served.attachment.done()
        is_same = is_attached and served.generation == answer.generation
        if served.frontend is None or not is_same:
            await asyncio.shield(self._attached(served))
        elif served.phase != "ready":
            await asyncio.sleep(POLL_S)

    def _is_told(self, served: Served, phase: str) -> None:
        """Of its engine's phase, each second and whenever it changes. Calls that met it
        awake may have reached it asleep: they are held there, within no limits."""
        served.phase = phase
        if phase != "asleep":
            return
        for visit in served.visits:
            is_asking = visit.asking is not None and not visit.asking.done()
            if not (is_asking or visit.has_begun or visit.refusal.done()):
                visit.asking = asyncio.create_task(
                    self._ask(visit), name=f"ask for {served.name}"
                )

    async def _ask(self, visit: Visit) -> None:
        """Announce it to the pool as a call that comes now; refuse it as that does."""
        name = visit.served.name
        await asyncio.sleep(ENDED_S)
        turn = self._turns.wait(name, ENDED_S, is_held=True)
        try:
            async with contextlib.aclosing(turn):
                answer = await anext(turn)
            if isinstance(answer, EngineRefused):
                visit.refuse(problems.of_refusal(answer))
        except ResidentError as error:
            visit.refuse(problems.of_model(name, error))

    async def _report(self) -> None:
        """Tell the pool of the calls it did not hear of, while there are any."""
        while True:
            await asyncio.sleep(REPORT_S)
            calls = {s.name: s.take_calls() for s in self._served.values()}
            calls = {name: each for name, each in calls.items() if each != ModelCalls()}
            if not calls:
                continue
            try:
                await self._turns.report(calls)
            except ResidentError as error:
                log.warning("event=not_reported error=%s", error)

    # ------------------------------------------------------------ frontends

    def _attached(self, served: Served) -> asyncio.Task[None]:
        """Once for all who wait; who leaves does not end it for the others."""
        if served.attaching is None:
            served.attaching = asyncio.create_task(
                self._attach_anew(served), name=f"attach to {served.name}"
            )
            served.attaching.add_done_callback(
                lambda task: self._is_attached(served, task)
            )
        return served.attaching

    def _is_attached(self, served: Served, task: asyncio.Task[None]) -> None:
        served.attaching = None
        if not task.cancelled() and (error := task.exception()):
            log.warning("event=not_attached model=%s error=%s", served.name, error)
        self._forget_if_unused(served)

    async def _attach_anew(self, served: Served) -> None:
        await self._release(served)
        await self._make_place(served)
        await self._attach(served)

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
        attachment = served.attachment = asyncio.create_task(
            self._follow(served, into, out, attached), name=f"attach {served.name}"
        )
        try:
            reply = await attached
            began = time.monotonic()
            async with self._building:
                if attachment.done():
                    return  # nobody would answer; who waits asks for its turn again
                frontend = await asyncio.to_thread(self._build, reply.spec, into, out)
            await _opened(frontend)
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
        served.adapters = frozenset(adapters(reply.spec.frontend_args))
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
            self._is_told(served, progress.phase)

        try:
            async with (
                self._reachable(served, into, out) as addresses,
                contextlib.aclosing(
                    self._attachments.attach(served.name, *addresses, on_progress)
                ) as replies,
            ):
                async for reply in replies:
                    if isinstance(reply, FrontendAttached):
                        served.phase = reply.phase
                        attached.set_result(reply)
                    else:
                        error = PoolUnreachable(reply.reason)
                        served.num_withdrawn += 1
        except ResidentError as failure:
            error = failure
        finally:
            served.phase = ""
            if not attached.done():
                attached.set_exception(error)
                attached.exception()  # seen, should nobody wait any more
        log.info("event=detached model=%s why=%s", served.name, error)
        if (frontend := served.frontend) is not None:
            served.frontend = None
            frontend.fail()
            frontend.close()
        self._forget_if_unused(served)

    @asynccontextmanager
    async def _reachable(
        self, served: Served, into: str, out: str
    ) -> AsyncIterator[tuple[str, str]]:
        """The two addresses as the leader is to be told them, while it is attached.
        Raises `PoolUnreachable` as soon as what lies between has ended."""
        if self._relay is None:
            yield into, out
            return
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                end = partial(loop.call_soon_threadsafe, limit.reschedule, loop.time())
                relay = await asyncio.to_thread(self._relay, into, out, end)
                try:
                    yield relay.input_address, relay.output_address
                finally:
                    await asyncio.to_thread(relay.close)
        except TimeoutError as error:
            served.num_withdrawn += 1
            raise PoolUnreachable("the relay to its leader ended") from error

    async def _release(self, served: Served) -> None:
        """Detach and close its frontend, if there is one."""
        attachment, served.attachment = served.attachment, None
        frontend, served.frontend = served.frontend, None
        if attachment is not None:
            attachment.cancel()
            await asyncio.wait([attachment])
        if frontend is not None:
            served.num_withdrawn += 1
            frontend.fail()
            frontend.close()

    def _forget_if_unused(self, served: Served) -> None:
        """Names that nobody has must not add up."""
        is_used = served.is_wanted or served.frontend or served.attaching
        if not is_used and self._served.get(served.name) is served:
            del self._served[served.name]


def known_models(status: PoolStatus) -> list[str]:
    """What a request may name: engines that are there, and declared models."""
    there = {engine.name for engine in status.engines}
    return sorted(there | set(status.models))


async def _opened(frontend: Frontend) -> None:
    try:
        await frontend.open()
    except BaseException:
        # Cancelled too: nobody else knows of it.
        frontend.close()
        raise


async def _unless(gone: asyncio.Future[None], waiting: Coroutine[Any, Any, T]) -> T:
    """What is waited for, or `Disconnected` where the caller has gone before it is
    there."""
    task = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({task, gone}, return_when=FIRST_COMPLETED)
        if gone.done():
            raise Disconnected
        return await task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen, should nobody wait any more
