"""Names of vLLM's that ranks use and that not every version with a series has.

Ranks import them from here. What a version lacks gets the least that lets the others'
code stand; docs/ACCELERATORS.md lists the differences.
"""

from __future__ import annotations

__all__ = ["MultiModalCacheMissError", "SleepModeBackend"]

try:
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
except ImportError:  # vLLM 0.23.0: its workers call the allocator themselves.

    class SleepModeBackend:  # type: ignore[no-redef]
        """The part of 0.32.0's interface that is filled in here."""

        def __init__(self) -> None:
            self._state = "RUNNING"


try:
    from vllm.multimodal.cache.base import MultiModalCacheMissError
except ImportError:  # vLLM 0.23.0: a miss is an assertion there.

    class MultiModalCacheMissError(Exception):  # type: ignore[no-redef]
        """Never raised there."""
