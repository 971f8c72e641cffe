"""What a load may take of its device: a share of what is free now.

vLLM takes `gpu_memory_utilization` as a fraction of the whole device, and refuses to
start where less than that is free (0.32.0, v1/worker/utils.py, request_memory; the same
in vllm-ascend's worker). On a device that others live on it is a fraction of what they
leave: engines that serve, and what sleepers keep (graphs, communicators, buffers).
"""

from __future__ import annotations

from vllm_resident.errors import RankFailure
from vllm_resident.messages import EngineMemory


def utilization(
    wanted: float, expected: EngineMemory, free_bytes: int, total_bytes: int
) -> float:
    """The fraction of the whole device that is `wanted` of what is free.

    Raises `RankFailure` where what the engine is expected to need, as far as its files
    and arguments tell, is not free: before anything is built.
    """
    if expected.device_bytes > free_bytes:
        raise RankFailure(
            f"needs {expected.device_bytes} bytes of the device for weights and the KV "
            f"cache it was given, and {free_bytes} of {total_bytes} are free: others "
            f"on it hold the rest. Put some to sleep or unload them, or load it with "
            f"less (kv_cache_memory_bytes, tensor_parallel_size)",
            phase="load_model",
        )
    return wanted * free_bytes / total_bytes
