"""Says what is wrong with this machine's set-up, and how to mend it.

Each check is a function that looks and changes nothing; `fix` removes what dead pools
left in shared memory.
"""

from __future__ import annotations

from pathlib import Path

from vllm_resident import shm
from vllm_resident.doctor.accelerators import check_accelerators
from vllm_resident.doctor.check import Check
from vllm_resident.doctor.machine import check_machine
from vllm_resident.doctor.software import check_software

__all__ = ["Check", "examine", "fix"]


def examine(pool: str, num_ranks: int) -> list[Check]:
    """Look at everything a pool called `pool` of `num_ranks` ranks would need."""
    return [
        *check_software(),
        *check_accelerators(num_ranks),
        *check_machine(pool, num_ranks),
    ]


def fix() -> list[Path]:
    """Remove the shared memory of pools that are gone; returns what was removed."""
    return shm.remove(shm.stale_segments())
