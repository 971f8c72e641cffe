"""What this rank holds right now, read from the kernel and the device, not from memory.

Reading costs about a millisecond, so heartbeats carry it, and with it what the rank has
done: its steps. What should have been given back and was not is a `ReleaseIncomplete`.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

from vllm_resident.errors import ReleaseIncomplete
from vllm_resident.messages import RankGauges, StepCount
from vllm_resident.rank import mapping
from vllm_resident.rank.communicators import CommunicatorPool
from vllm_resident.rank.device import Device
from vllm_resident.rank.world import num_process_groups, num_suspended_communicators

# Other threads allocate meanwhile, and an allocator keeps what is less than a page.
_TOLERANCE = 0.25
_TOLERANCE_BYTES = 64 * 2**20

# The models of this process, also of engines that were released, while they are alive.
_models: dict[int, weakref.ref[Any]] = {}
# By engine's name. Written by the main thread alone, a whole value at a time.
_steps: dict[str, tuple[int, float]] = {}
# So many names are kept; one that was dropped is counted anew when it comes back.
MAX_NAMES = 200


def read(
    device: Device, segment_token: str, communicators: CommunicatorPool | None = None
) -> RankGauges:
    """The rank's gauges; `segment_token` is in the name of each of the pool's shared
    segments, `communicators` are those kept here. Any thread."""
    used, total = device.memory()
    descriptors = os.listdir("/proc/self/fd")
    return RankGauges(
        memory_used_bytes=used,
        memory_total_bytes=total,
        num_file_descriptors=len(descriptors),
        num_threads=len(os.listdir("/proc/self/task")),
        num_shm_segments=mapping.num_shared_segments(segment_token),
        num_sockets=sum(_is_socket(each) for each in descriptors),
        num_process_groups=num_process_groups(),
        num_engines=sum(model() is not None for model in list(_models.values())),
        steps={name: StepCount(*count) for name, count in _steps.copy().items()},
        num_kept_communicators=communicators.num if communicators else 0,
        kept_communicator_bytes=communicators.num_bytes if communicators else 0,
        num_suspended_communicators=num_suspended_communicators(),
    )


def count_step(name: str, seconds: float) -> None:
    """One step of the engine of that name; main thread only."""
    num_steps, total_s = _steps.get(name, (0, 0.0))
    if not num_steps and len(_steps) >= MAX_NAMES:
        del _steps[next(iter(_steps))]
    _steps[name] = num_steps + 1, total_s + seconds


def count_model(model: weakref.ref[Any]) -> None:
    """Count an engine's model among the living until it is not."""
    for number, known in list(_models.items()):
        if known() is None:
            del _models[number]
    _models[id(model)] = model


def require_fall(before: int, after: int, expected: int, what: str, phase: str) -> None:
    """Raise `ReleaseIncomplete` unless the device's memory fell from `before` to
    `after` by about the `expected` bytes."""
    missing = expected - (before - after)
    if missing > max(_TOLERANCE_BYTES, _TOLERANCE * expected):
        raise ReleaseIncomplete(
            f"{what} gave back {before - after} of {expected} bytes", phase=phase
        )


def _is_socket(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except OSError:  # closed since
        return False
