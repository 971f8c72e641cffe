"""What every test stands on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

# vLLM builds its shared-memory collectives into its AVX-512 kernels alone (0.32.0).
NO_SHARED_MEMORY = "vLLM's kernels for this CPU have no shared-memory collectives"

# Set it for other input than the last time, where hypothesis or schemathesis makes it.
RANDOM_VARIABLE = "VLLM_RESIDENT_RANDOM"

# It may not be there where the tests of an accelerator run.
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    settings.register_profile(
        "vllm-resident", derandomize=RANDOM_VARIABLE not in os.environ
    )
    settings.load_profile("vllm-resident")


def pytest_configure() -> None:
    """As if started from a terminal: a shell that starts this in the background has it
    ignore Ctrl-C, and so would every process that the tests start. And with bytecode
    written, wherever this runs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # As in the Makefile: a hundred processes import what one has compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
