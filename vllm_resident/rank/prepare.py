"""What must be so in a rank's process before torch and vLLM are imported."""

from __future__ import annotations

import os

from vllm_resident import patching, shm
from vllm_resident.allocator_settings import expandable_segments
from vllm_resident.errors import ResidentError
from vllm_resident.rank import device as devices


def prepare_process(local_rank: int, local_world_size: int) -> devices.Device:
    """Bind cores, put the patches under vLLM, sweep what killed pools left behind.

    Raises `PatchError` where the installed vLLM is not one the series is for, and
    `ResidentError` for settings that no engine could sleep under.
    """
    device = devices.prepare_process(local_rank, local_world_size)
    _check_allocator(device.type)
    os.environ.update(patching.FLAGS)
    patching.activate()
    shm.remove(shm.stale_segments())
    return device


def _check_allocator(device_type: str) -> None:
    """On CUDA vLLM turns expandable segments off while it allocates what sleeps; on an
    NPU its allocator asserts that they are off (vllm-ascend 0.23.0.post1, camem.py)."""
    variable = expandable_segments(device_type, os.environ)
    if variable and device_type == "npu":
        raise ResidentError(
            f"{variable}={os.environ[variable]} turns on expandable segments, with "
            f"which no engine can sleep on an NPU: take that out of {variable}"
        )
