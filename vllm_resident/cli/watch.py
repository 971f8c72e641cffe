"""`status --watch`: the pool each second, until q, Ctrl-C or its end."""

from __future__ import annotations

import contextlib
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

from rich.console import RenderableType
from rich.live import Live

from vllm_resident.cli.output import Output
from vllm_resident.client import Client
from vllm_resident.messages import PoolStatus

_INTERVAL_S = 1.0

Show = Callable[[PoolStatus], RenderableType]


def watch(client: Client, output: Output, show: Show) -> None:
    """Show the status each second, made into tables by `show`; JSON lines with --json.

    q and Ctrl-C end it; a pool that ends raises `PoolUnreachable`.
    """
    with contextlib.suppress(KeyboardInterrupt):
        if output.json or not output.stdout.is_terminal:
            _print_each(client, output, show)
        else:
            _refresh(client, output, show)


def _print_each(client: Client, output: Output, show: Show) -> None:
    while True:
        status = client.status()
        output.result(status, show(status))
        time.sleep(_INTERVAL_S)


def _refresh(client: Client, output: Output, show: Show) -> None:
    with _single_keys(), Live(console=output.stdout, auto_refresh=False) as live:
        while True:
            live.update(show(client.status()), refresh=True)
            if _quit_pressed(_INTERVAL_S):
                return


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Keys arrive without Return, and are not echoed; Ctrl-C still interrupts."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _quit_pressed(timeout_s: float) -> bool:
    """Whether q was pressed; waits for `timeout_s` at most."""
    if not sys.stdin.isatty():
        time.sleep(timeout_s)
        return False
    ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q")
