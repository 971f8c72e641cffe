"""Pages of this process's memory: give them back, count those that are there.

`madvise` (madvise(2)) frees the pages of a range and keeps the range: nothing that
points into it moves, reading gives zeros, writing takes a page again. Knows nothing of
tensors or engines.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

# Addresses [start, end), page-aligned.
Range = tuple[int, int]

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def inside(address: int, num_bytes: int) -> Range:
    """The whole pages of a stretch of memory; an empty range where it has none."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return start, max(start, end)


def give_back(ranges: list[Range]) -> None:
    """Free every page of `ranges`; they read as zeros afterwards. For private anonymous
    memory that nothing needs the contents of."""
    for start, end in ranges:
        if start != end:
            _check(_libc.madvise(start, end - start, _MADV_DONTNEED), "madvise")


def num_resident_bytes(ranges: list[Range]) -> int:
    """How much of `ranges` is in memory right now (mincore(2))."""
    resident = 0
    for start, end in ranges:
        if start == end:
            continue
        present = np.empty((end - start) // mmap.PAGESIZE, np.uint8)
        _check(_libc.mincore(start, end - start, present.ctypes.data), "mincore")
        # A byte per page, of which the lowest bit counts.
        resident += int(np.count_nonzero(present & 1))
    return resident * mmap.PAGESIZE


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
