"""What every test stands on."""

from __future__ import annotations

import signal

# vLLM builds its shared-memory collectives into its AVX-512 kernels alone (0.32.0).
NO_SHARED_MEMORY = "vLLM's kernels for this CPU have no shared-memory collectives"


def pytest_configure() -> None:
    """As if started from a terminal: a shell that starts this in the background has it
    ignore Ctrl-C, and so would every process that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
