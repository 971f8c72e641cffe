"""Copies between a device's memory and pinned host memory, many in flight together.

They run one after the other on a stream of their own and are waited for once: so the
link never idles between two of them. What is known of CUDA's and ACL's runtimes is
here; whose memory it is, is not.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_resident.rank.arena import Arena, Block
from vllm_resident.rank.device import Device

# cudaMemcpyDeviceToHost and so on (driver_types.h); ACL's numbers are the same.
_TO_HOST, _TO_DEVICE = 2, 1
_MEASURED_BYTES = 64 * 2**20
_NUM_MEASUREMENTS = 3


@dataclass(frozen=True)
class Moved:
    """What was copied between host and device, and how long that took.

    `link_bytes_per_s` is what the link could do in that direction when the rank
    started; 0 where it was not measured, as on CPU.
    """

    num_bytes: int = 0
    seconds: float = 0.0
    link_bytes_per_s: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.num_bytes + other.num_bytes,
            self.seconds + other.seconds,
            self.link_bytes_per_s or other.link_bytes_per_s,
        )


@dataclass(frozen=True)
class Link:
    """What the link between host and device can do, in bytes per second."""

    to_host: float = 0.0
    to_device: float = 0.0


class Copies(Protocol):
    """A device's copies. `start` returns before the copy is done, `wait` after all
    that were started."""

    def start(
        self, target: int, source: int, num_bytes: int, *, to_host: bool
    ) -> None: ...

    def wait(self) -> None: ...


class CudaCopies:
    """Through the CUDA runtime that torch has loaded: torch itself has no tensors of
    memory that vLLM's allocator has unmapped and mapped again."""

    def __init__(self, index: int) -> None:
        import torch

        self._stream = torch.cuda.Stream(index)
        runtime = ctypes.CDLL(_loaded_library("libcudart"))
        self._copy = runtime.cudaMemcpyAsync
        self._copy.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        self._describe = runtime.cudaGetErrorString
        self._describe.restype = ctypes.c_char_p

    def start(self, target: int, source: int, num_bytes: int, *, to_host: bool) -> None:
        kind = _TO_HOST if to_host else _TO_DEVICE
        if error := self._copy(
            target, source, num_bytes, kind, self._stream.cuda_stream
        ):
            what = self._describe(error).decode()
            raise RuntimeError(f"cudaMemcpyAsync of {num_bytes} bytes: {what}")

    def wait(self) -> None:
        self._stream.synchronize()


class AclCopies:
    """Through ACL (CANN's `acl` module, which vllm-ascend's allocator uses too)."""

    def __init__(self, index: int) -> None:
        import acl
        import torch

        self._runtime = acl.rt
        self._stream = torch.npu.Stream(index)

    def start(self, target: int, source: int, num_bytes: int, *, to_host: bool) -> None:
        error = self._runtime.memcpy_async(
            target,
            num_bytes,
            source,
            num_bytes,
            _TO_HOST if to_host else _TO_DEVICE,
            self._stream.npu_stream,
        )
        if error:
            raise RuntimeError(
                f"aclrtMemcpyAsync of {num_bytes} bytes: ACL error {error}"
            )

    def wait(self) -> None:
        self._stream.synchronize()


_COPIES = {"cuda": CudaCopies, "npu": AclCopies}


def copies_of(device: Device) -> Copies:
    """The copies of a CUDA device or an NPU, which must be the current one."""
    return _COPIES[device.type](device.index)


def pinned_block(num_bytes: int) -> Block:
    """A block of pinned memory for an arena; blocks while its pages are pinned."""
    import torch

    memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return Block(memory.data_ptr(), num_bytes, memory)


def release_pinned() -> None:
    """Give pinned memory that nothing holds back to the kernel: torch keeps it."""
    import torch

    # Not in torch 2.11.
    if release := getattr(torch.accelerator, "empty_host_cache", None):
        release()


def measure(device: Device, copies: Copies, arena: Arena) -> Link:
    """What the link can do right now: the best of a few copies each way of one block.
    Other ranks that start beside this one share it. Takes tens of milliseconds."""
    import torch

    memory = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, device=device.name)
    lease = arena.take(_MEASURED_BYTES)
    device.synchronize()
    try:
        return Link(
            *(
                _MEASURED_BYTES / _best_of(copies, memory.data_ptr(), lease, way)
                for way in (True, False)
            )
        )
    finally:
        arena.give_back(lease)
        del memory
        device.empty_cache()


def _best_of(copies: Copies, pointer: int, lease: Any, to_host: bool) -> float:
    """Seconds of the fastest of a few copies, one way."""
    seconds = []
    for _ in range(_NUM_MEASUREMENTS):
        began = time.perf_counter()
        offset = 0
        for address, length in lease.pieces(0, _MEASURED_BYTES):
            ends = (address, pointer + offset)
            copies.start(*(ends if to_host else ends[::-1]), length, to_host=to_host)
            offset += length
        copies.wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _loaded_library(name: str) -> str:
    """The path of a shared library this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            path = line.partition("/")[2].strip()
            if path.rpartition("/")[2].startswith(name):
                return f"/{path}"
    raise RuntimeError(f"{name} is not loaded: is this torch built for CUDA?")
