"""Shared-memory mappings of this process: unlink their names, replace their pages.

vLLM's CPU communicator maps one segment per rank and group and never unmaps it
(csrc/cpu/shm.cpp, 0.32.0: its managers live until the process ends). A resident process
would keep them all.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_SHM = Path("/dev/shm")
_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) .{4} \S+ \S+ \d+\s+(/dev/shm/.*)")

_PROT_READ_WRITE = 0x3
_MAP_PRIVATE_FIXED_ANONYMOUS_NORESERVE = 0x02 | 0x10 | 0x20 | 0x4000


def unlink_shared(token: str) -> None:
    """Remove the names of the segments with `token` in them; mappings live on.

    Once every rank has mapped a segment its name serves nobody, and without a name a
    killed pool leaves nothing behind.
    """
    # Not `glob`: it keeps what it compiled of the last patterns, and these never recur.
    for name in os.listdir(_SHM):
        if token in name:
            (_SHM / name).unlink(missing_ok=True)


def release_shared(token: str) -> int:
    """Unlink the segments with `token` in their name and give their pages back.

    Each mapping is replaced in place by untouched private memory instead of being
    unmapped: the communicator's destructor still writes to it when the process ends.
    Returns the bytes of address space replaced. May be called twice.
    """
    unlink_shared(token)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    replaced = 0
    for start, end in _shared_ranges(token):
        if (
            libc.mmap(
                start,
                end - start,
                _PROT_READ_WRITE,
                _MAP_PRIVATE_FIXED_ANONYMOUS_NORESERVE,
                -1,
                0,
            )
            != start
        ):
            error = ctypes.get_errno()
            raise OSError(error, f"replacing a mapping: {os.strerror(error)}")
        replaced += end - start
    return replaced


def num_shared_segments(token: str) -> int:
    """How many mappings of this process are of segments with `token` in their name."""
    return len(_shared_ranges(token))


def _shared_ranges(token: str) -> list[tuple[int, int]]:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        matches = (_MAPS_LINE.match(line) for line in maps)
        return [
            (int(match[1], 16), int(match[2], 16))
            for match in matches
            if match and token in match[3]
        ]
