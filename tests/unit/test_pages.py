"""Pages given back are gone, and the range stays usable."""

import ctypes
import mmap

from vllm_resident.rank import pages

NUM_PAGES = 64
SIZE = NUM_PAGES * mmap.PAGESIZE


def test_given_back() -> None:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ranges = [pages.inside(address, SIZE)]
    assert pages.num_resident_bytes(ranges) == 0
    memory[:] = b"x" * SIZE
    assert pages.num_resident_bytes(ranges) == SIZE
    pages.give_back(ranges)
    assert pages.num_resident_bytes(ranges) == 0
    memory[:3] = b"new"
    assert pages.num_resident_bytes(ranges) == mmap.PAGESIZE
    assert memory[:6] == b"new\0\0\0"


def test_only_whole_pages_are_inside() -> None:
    page = mmap.PAGESIZE
    assert pages.inside(page, 2 * page) == (page, 3 * page)
    assert pages.inside(page - 1, page + 2) == (page, 2 * page)
    start, end = pages.inside(page + 1, page)
    assert start == end
    pages.give_back([(start, end)])
    assert pages.num_resident_bytes([(start, end)]) == 0
