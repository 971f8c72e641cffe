"""Names of vLLM's that ranks use and that not every version with a series has.

Ranks import them from here. What a version lacks gets the least that lets the others'
code stand; docs/ACCELERATORS.md lists the differences.
"""

from __future__ import annotations

from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.v1.engine import EngineCoreReadyResponse
from vllm.v1.engine.core import EngineCore, EngineCoreProc

__all__ = [
    "GracefulHTTPError",
    "MultiModalCacheMissError",
    "SleepModeBackend",
    "ready_response",
]

try:
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
except ImportError:  # vLLM 0.23.0: its workers call the allocator themselves.

    class SleepModeBackend:
        """The part of 0.32.0's interface that is filled in here."""

        def __init__(self) -> None:
            self._state = "RUNNING"


try:
    from vllm.multimodal.cache.base import MultiModalCacheMissError
except ImportError:  # vLLM 0.23.0: a miss is an assertion there.

    class MultiModalCacheMissError(Exception):
        """Never raised there."""


try:
    from vllm.exceptions import GracefulHTTPError
except ImportError:  # vLLM 0.23.0: no error there says with what it is answered.

    class GracefulHTTPError(Exception):
        """Answered with 500 there, whatever it says."""

        def __init__(self, message: str, http_status: HTTPStatus) -> None:
            super().__init__(message)
            self.http_status = http_status


def ready_response(core: EngineCore) -> Any:
    """What vLLM's core tells a frontend first, of a core that has no process."""
    stand_in = SimpleNamespace(
        vllm_config=core.vllm_config,
        scheduler=core.scheduler,
        model_executor=core.model_executor,
        frontend_stats_publish_address=None,
        engine_index=0,
    )
    if make := getattr(EngineCoreProc, "_make_ready_response", None):
        return make(stand_in)
    # vLLM 0.23.0 makes it in the middle of a thread's loop (v1/engine/core.py).
    config = core.vllm_config
    return EngineCoreReadyResponse(
        max_model_len=config.model_config.max_model_len,
        num_gpu_blocks=config.cache_config.num_gpu_blocks or 0,
        block_size=config.cache_config.block_size,
        dp_stats_address=None,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        vllm_version=vllm.__version__,
    )
