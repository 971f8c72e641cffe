"""A CUDA device's memory behind addresses that stay, by the driver's own functions.

What vLLM's allocator for sleep mode does in C (csrc/cumem_allocator.cpp), for tests in
an environment without vLLM: real memory, of which only the caller of `allocate` is
missing. `HANDLE` has the shape of vLLM's.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_uint64, c_ushort

HANDLE = tuple[int, int, int, int]
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", c_ubyte),
        ("rdma", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", c_int)]


class Vmm:
    """One device's; its context must be torch's, which is made by using it."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.cuGetErrorName.argtypes = [c_int, POINTER(ctypes.c_char_p)]
        self._location = _Location(_ON_DEVICE, index)
        self._properties = _Properties(type=_PINNED, location=self._location)
        size = c_size_t()
        self._call(
            "cuMemGetAllocationGranularity", byref(size), byref(self._properties), 0
        )
        self._granularity = size.value
        # What has been created for an address, while it is mapped.
        self._created: dict[int, c_uint64] = {}

    def reserve(self, num_bytes: int) -> HANDLE:
        """Addresses for that much, rounded up, with nothing behind them yet."""
        rounded = -(-num_bytes // self._granularity) * self._granularity
        address = c_uint64()
        self._call(
            "cuMemAddressReserve",
            byref(address),
            c_size_t(rounded),
            c_size_t(0),
            c_uint64(0),
            c_uint64(0),
        )
        return (self._index, rounded, address.value, 0)

    def create_and_map(self, handle: HANDLE) -> None:
        _, size, address, _ = handle
        created = c_uint64()
        self._call(
            "cuMemCreate",
            byref(created),
            c_size_t(size),
            byref(self._properties),
            c_uint64(0),
        )
        self._call(
            "cuMemMap",
            c_uint64(address),
            c_size_t(size),
            c_size_t(0),
            created,
            c_uint64(0),
        )
        access = _Access(self._location, _READ_WRITE)
        self._call(
            "cuMemSetAccess",
            c_uint64(address),
            c_size_t(size),
            byref(access),
            c_size_t(1),
        )
        self._created[address] = created

    def unmap_and_release(self, handle: HANDLE) -> None:
        _, size, address, _ = handle
        self._call("cuMemUnmap", c_uint64(address), c_size_t(size))
        self._call("cuMemRelease", self._created.pop(address))

    def give_back(self, handle: HANDLE) -> None:
        """Unmap what is mapped, and the addresses too."""
        _, size, address, _ = handle
        if address in self._created:
            self.unmap_and_release(handle)
        self._call("cuMemAddressFree", c_uint64(address), c_size_t(size))

    def _call(self, name: str, *arguments: object) -> None:
        if error := getattr(self._driver, name)(*arguments):
            words = ctypes.c_char_p()
            self._driver.cuGetErrorName(error, byref(words))
            raise RuntimeError(f"{name}: {(words.value or b'?').decode()}")
