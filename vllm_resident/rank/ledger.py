"""What this rank holds right now, read from the kernel and the device, not from memory.

Reading costs well under a millisecond, so heartbeats carry it.
"""

from __future__ import annotations

import os

from vllm_resident.messages import RankGauges
from vllm_resident.rank import mapping
from vllm_resident.rank.device import Device


def read(device: Device, segment_token: str) -> RankGauges:
    """The rank's gauges; `segment_token` is in the name of each of the pool's shared
    segments. Any thread."""
    used, total = device.memory()
    return RankGauges(
        memory_used_bytes=used,
        memory_total_bytes=total,
        num_file_descriptors=len(os.listdir("/proc/self/fd")),
        num_threads=len(os.listdir("/proc/self/task")),
        num_shm_segments=mapping.num_shared_segments(segment_token),
    )
