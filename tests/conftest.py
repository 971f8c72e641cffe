"""What every test stands on."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """As if started from a terminal: a shell that starts this in the background has it
    ignore Ctrl-C, and so would every process that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
