"""`up`: start a pool, see its ranks arrive, stay with it or leave it alone."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from rich.markup import escape

from vllm_resident import config
from vllm_resident.cli import gateway, parser
from vllm_resident.cli.display import describe_error, rank_table, switch_summary
from vllm_resident.cli.output import Output
from vllm_resident.client import Client
from vllm_resident.errors import ResidentError
from vllm_resident.launch import POLL_INTERVAL_S, Launch, default_num_ranks, launch
from vllm_resident.messages import EngineSpec, PoolStatus, SwitchReport

_SHUTDOWN_TIMEOUT_S = 60.0
_SETTLED = ("ready", "asleep", "failed", "lost")
_TERMINATED = 128 + signal.SIGTERM


class _Terminated(BaseException):
    """SIGTERM: end the pool in order, as for Ctrl-C."""


def up(arguments: argparse.Namespace, output: Output) -> int:
    """Start the pool; in the foreground, return when it has ended."""
    layout = config.read_layout(arguments.layout) if arguments.layout else None
    if arguments.http is not None:
        gateway.check(arguments.http, arguments.api_key)
    num_ranks = arguments.nproc_per_node or default_num_ranks()
    with contextlib.suppress(_Terminated), _sigterm_raises():
        started = launch(
            arguments.pool,
            num_ranks,
            controller=arguments.controller,
            config=arguments.config,
            max_restarts=arguments.max_restarts,
            detach=arguments.detach,
        )
        # Made after the fork: a client has a thread.
        with Client(started.endpoint, connect_timeout_s=5.0) as client:
            return _see_through(started, client, layout, arguments, output)
    return _TERMINATED


def _see_through(
    started: Launch,
    client: Client,
    layout: list[EngineSpec] | None,
    arguments: argparse.Namespace,
    output: Output,
) -> int:
    """From the start to the end of the pool, or of our interest in it. Whatever goes
    wrong on the way up, nothing is left behind."""
    http: gateway.GatewayProcess | None = None
    try:
        status = _wait_ready(started, client, arguments.timeout, output)
        status = _wait_started(started, client, status, arguments.timeout, output)
        report = _apply(client, layout, output) if layout is not None else None
        if arguments.http is not None:
            http = _start_gateway(started, client, arguments)
            _wait_listening(http, arguments.timeout, output)
    except (ResidentError, KeyboardInterrupt, _Terminated):
        with _second_interrupt_kills(started):
            if http is not None:
                http.end()
            started.terminate()
        raise

    def announce() -> None:
        _announce(started, client, status, report, http, arguments, output)

    if arguments.detach:
        announce()
        return parser.OK
    try:
        return _stay(started, client, http, announce, output)
    finally:
        if http is not None:
            http.end()


def _start_gateway(
    started: Launch, client: Client, arguments: argparse.Namespace
) -> gateway.GatewayProcess:
    return gateway.start(
        arguments.pool,
        arguments.http,
        client.endpoint,
        api_key=arguments.api_key,
        owner_pid=started.process.pid,
        detach=arguments.detach,
    )


def _wait_listening(
    http: gateway.GatewayProcess, timeout_s: float, output: Output
) -> None:
    with output.phases() as phases:
        phases.phase_started("gateway", "starting (importing vLLM)", 0.0)
        http.wait_listening(timeout_s)


def _wait_ready(
    started: Launch, client: Client, timeout_s: float, output: Output
) -> PoolStatus:
    began = time.monotonic()
    with output.phases() as phases:
        phases.phase_started("pool", "starting ranks (importing torch and vLLM)", 0.0)

        def on_status(status: PoolStatus) -> None:
            ready = sum(rank.phase == "ready" for rank in status.ranks)
            text = f"{ready} of {status.world_size} ranks ready"
            if ready:
                phases.phase_started("pool", text, time.monotonic() - began)

        return started.wait_ready(client, timeout_s, on_status)


def _wait_started(
    started: Launch,
    client: Client,
    status: PoolStatus,
    timeout_s: float,
    output: Output,
) -> PoolStatus:
    """Until what pool.toml says is loaded or asleep, or has failed: that does not end
    the pool, and is said."""
    names = [spec.name for spec in started.start_up]
    deadline = time.monotonic() + timeout_s
    with output.phases() as phases:
        while moving := [
            engine
            for engine in status.engines
            if engine.name in names and engine.phase not in _SETTLED
        ]:
            if time.monotonic() > deadline:
                break
            for engine in moving:
                phases.phase_started(engine.name, engine.progress, status.uptime_s)
            time.sleep(POLL_INTERVAL_S)
            status = client.status()
    there = {engine.name: engine for engine in status.engines}
    for name in names:
        if name not in there or there[name].phase not in ("ready", "asleep"):
            why = (name in there and there[name].error) or "controller.log says why"
            output.message(f"[yellow]{escape(name)} was not started: {escape(why)}[/]")
    return status


def _apply(client: Client, layout: list[EngineSpec], output: Output) -> SwitchReport:
    with output.phases() as phases:
        return client.apply(layout, on_progress=phases.on_progress)


def _announce(
    started: Launch,
    client: Client,
    status: PoolStatus,
    report: SwitchReport | None,
    http: gateway.GatewayProcess | None,
    arguments: argparse.Namespace,
    output: Output,
) -> None:
    output.result(
        {
            "pool": arguments.pool,
            "endpoint": client.endpoint,
            "torchrun_pid": started.process.pid,
            "log": str(started.log),
            "status": client.status() if report else status,
            "layout": report,
            "http": http.url if http else None,
        },
    )
    if output.json:
        return
    output.message(
        f"pool [bold]{escape(arguments.pool)}[/] is ready at "
        f"{escape(client.endpoint)}, logs in {escape(str(started.log.parent))}"
    )
    output.message(rank_table(status.ranks))
    if report is not None:
        output.message(switch_summary(report))
    if http is not None:
        page = http.url.removesuffix("v1")
        output.message(f"OpenAI clients: base URL {escape(http.url)}")
        output.message(f"the pool to look at: {escape(page)}")
    output.message(_what_next(arguments))


def _what_next(arguments: argparse.Namespace) -> str:
    named = "" if arguments.pool == "default" else f" --pool {arguments.pool}"
    where = "" if arguments.detach else " in another terminal"
    end = f"`vllm-resident shutdown{named}`" if arguments.detach else "Ctrl-C"
    return (
        f"[dim]next{where}: `vllm-resident load NAME MODEL{named}`, then "
        f'`vllm-resident generate NAME "Once upon a time"{named}`; '
        f"{end} ends the pool[/]"
    )


def _stay(
    started: Launch,
    client: Client,
    http: gateway.GatewayProcess | None,
    announce: Callable[[], None],
    output: Output,
) -> int:
    """Until the pool ends or is to end. Who reads that it is ready may end it at once,
    so that is said in here."""
    try:
        announce()
        status = _wait_for_end(started)
    except (KeyboardInterrupt, _Terminated) as signalled:
        _shut_down(started, client, http, output)
        interrupted = isinstance(signalled, KeyboardInterrupt)
        return parser.INTERRUPTED if interrupted else parser.OK
    if status == 0:
        output.message("the pool has stopped")
        return parser.OK
    raise ResidentError(
        f"torchrun ended with status {status}; the end of {started.log}:\n"
        f"{started.tail()}"
    )


def _wait_for_end(started: Launch) -> int:
    # Not Popen.wait without a timeout: polling lets signals in at once everywhere.
    while (status := started.process.poll()) is None:
        time.sleep(POLL_INTERVAL_S)
    return status


def _shut_down(
    started: Launch,
    client: Client,
    http: gateway.GatewayProcess | None,
    output: Output,
) -> None:
    output.message("shutting the pool down; Ctrl-C again kills it")
    with _second_interrupt_kills(started), output.phases() as phases:
        if http is not None:
            phases.phase_started("gateway", "shutting down", 0.0)
            http.end()
        phases.phase_started("pool", "shutting down", 0.0)
        try:
            client.shutdown(_SHUTDOWN_TIMEOUT_S, on_progress=phases.on_progress)
        except ResidentError as error:
            output.message(f"[yellow]{escape(describe_error(error))}[/]")
            started.terminate()
        started.wait_end()
    output.message("the pool has stopped")


@contextlib.contextmanager
def _second_interrupt_kills(started: Launch) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, _Terminated):
        started.kill()
        raise


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `_Terminated` in the main thread, as SIGINT does its own."""

    def raise_it(_signum: int, _frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
