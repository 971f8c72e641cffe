"""What must be so in a rank's process before torch and vLLM are imported."""

from __future__ import annotations

import os

from vllm_resident import patching, shm
from vllm_resident.rank import device as devices


def prepare_process(local_rank: int, local_world_size: int) -> devices.Device:
    """Bind cores, put the patches under vLLM, sweep what killed pools left behind.

    Raises `PatchError` where the installed vLLM is not one the series is for.
    """
    device = devices.prepare_process(local_rank, local_world_size)
    os.environ.update(patching.FLAGS)
    patching.activate()
    shm.remove(shm.stale_segments())
    return device
