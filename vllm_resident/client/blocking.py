"""`Client`: the asynchronous client, waited for in the caller's thread.

Every call is delegated to an `AsyncClient` that lives on an event loop in a daemon
thread. Nothing is done twice: a method here is its namesake there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from vllm_resident.client.asynchronous import AsyncClient
from vllm_resident.errors import CommandRejected

T = TypeVar("T")
P = ParamSpec("P")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The same method for `Client`: runs on its event loop, waits in this thread."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._client, *args, **kwargs))

    return call


def _blocking_iterator(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T]],
) -> Callable[Concatenate[Client, P], Generator[T]]:
    """The same for an asynchronous generator; closing this one closes that one."""

    @functools.wraps(method)
    def iterate(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T]:
        pieces = method(self._client, *args, **kwargs)
        try:
            while True:
                try:
                    piece = self._wait(_next(pieces))
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            # A client that is closed has ended its calls.
            with contextlib.suppress(CommandRejected):
                self._wait(_close(pieces))

    return iterate


class Client:
    """A client of the pool for ordinary code: `AsyncClient`, waited for.

    Takes the same arguments and has the same methods, which block the calling thread
    and raise the same errors. Any number of threads may use one client. Callbacks run
    on the client's own thread and may not call it. Ctrl-C ends the waiting call at
    once: a generate call is aborted on every rank; a load or a switch goes on in the
    pool. Close it, or use it as a context manager.
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
        self._client = AsyncClient(
            controller,
            pool=pool,
            key_file=key_file,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
        )
        self._thread = _LoopThread()
        # Also at interpreter exit and when it is collected, for those who forget.
        self._close = weakref.finalize(self, self._thread.stop, self._client)

    @property
    def endpoint(self) -> str:
        """The controller's endpoint."""
        return self._client.endpoint

    load = _blocking(AsyncClient.load)
    unload = _blocking(AsyncClient.unload)
    sleep = _blocking(AsyncClient.sleep)
    wake_up = _blocking(AsyncClient.wake_up)
    switch = _blocking(AsyncClient.switch)
    prefetch = _blocking(AsyncClient.prefetch)
    apply = _blocking(AsyncClient.apply)
    generate = _blocking(AsyncClient.generate)
    stream = _blocking_iterator(AsyncClient.stream)
    status = _blocking(AsyncClient.status)
    totals = _blocking(AsyncClient.totals)
    watch = _blocking_iterator(AsyncClient.watch)
    shutdown = _blocking(AsyncClient.shutdown)
    wait_ready = _blocking(AsyncClient.wait_ready)

    def close(self) -> None:
        """Give up the connection; calls of other threads fail. No-op if closed."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._thread.submit(work)
        try:
            return future.result()
        except BaseException:
            # True only where this thread was interrupted: the call is still running.
            if future.cancel():
                self._thread.let_cancellation_out()
            raise


class _LoopThread:
    """An event loop on a daemon thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = False
        # Work handed over after the loop's end would be waited for without end.
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._serve, name="vllm-resident client", daemon=True
        )
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if not self._stopped and not self._is_current():
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise CommandRejected(
            "this client is closed: make a new one"
            if self._stopped
            else "a callback of a client may not call it: it would wait for itself"
        )

    def let_cancellation_out(self) -> None:
        """Give a call that was just cancelled the time to tell the pool."""
        pause = self.submit(asyncio.sleep(0.02))
        with contextlib.suppress(TimeoutError):
            pause.result(1.0)

    def stop(self, client: AsyncClient) -> None:
        """Close the client, then end the loop and its thread."""
        with self._lock:
            self._stopped = True
            last = asyncio.run_coroutine_threadsafe(_finish(client), self._loop)
        last.add_done_callback(
            lambda _: self._loop.call_soon_threadsafe(self._loop.stop)
        )
        if not self._is_current():  # it is, where the client was collected there
            self._thread.join(5.0)

    def _is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()


async def _finish(client: AsyncClient) -> None:
    """Close the client and see its calls end, so that no thread waits for one."""
    await client.close()
    await asyncio.get_running_loop().shutdown_asyncgens()
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    if calls:
        await asyncio.wait(calls, timeout=1.0)


async def _next(pieces: AsyncGenerator[T]) -> T:
    return await anext(pieces)


async def _close(pieces: AsyncGenerator[T]) -> None:
    await pieces.aclose()
