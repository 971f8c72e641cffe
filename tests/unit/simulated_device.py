"""A simulated device for what moves memory: addresses, a limit, copies.

Its memory is the process's own. What is not mapped can be neither read nor unmapped,
as on a real device; copies happen when they are waited for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from vllm_resident.rank import holdings
from vllm_resident.rank.arena import Arena, Block
from vllm_resident.rank.mover import Mapper, Mover

Handle = tuple[int, int, int, int]


def buffer(num_bytes: int) -> Block:
    memory = ctypes.create_string_buffer(num_bytes)
    return Block(ctypes.addressof(memory), num_bytes, memory)


@dataclass
class Record:
    """As vLLM 0.23.0 has it, without `is_asleep`."""

    handle: Handle
    tag: str
    cpu_backup_tensor: Any = None


@dataclass
class SimulatedDevice:
    total_bytes: int = 10_000
    mapped: dict[int, int] = field(default_factory=dict)
    backing: dict[int, Any] = field(default_factory=dict)
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    num_waits: int = 0
    fails_at_copy: int = -1

    # ------------------------------------------------------------- the driver

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - sum(self.mapped.values())

    def map(self, handle: Handle) -> None:
        _, size, address, _ = handle
        assert address not in self.mapped
        if size > self.free_bytes:
            raise RuntimeError("CUDA Error: out of memory")
        self.mapped[address] = size

    def unmap(self, handle: Handle) -> None:
        _, size, address, _ = handle
        assert self.mapped.pop(address) == size
        ctypes.memset(address, 0xEE, size)

    def mapper(self, reserve_bytes: int = 0) -> Mapper:
        return Mapper(
            self.map,
            self.unmap,
            lambda: self.free_bytes,
            lambda: None,
            lambda: None,
            reserve_bytes,
        )

    # ------------------------------------------------------------- its copies

    def start(self, target: int, source: int, num_bytes: int, *, to_host: bool) -> None:
        if len(self.waiting) == self.fails_at_copy:
            raise RuntimeError("CUDA Error: unspecified launch failure")
        pointer = source if to_host else target
        assert any(
            start <= pointer and pointer + num_bytes <= start + size
            for start, size in self.mapped.items()
        ), "the device reads what is not mapped"
        self.waiting.append((target, source, num_bytes))

    def wait(self) -> None:
        self.num_waits += 1
        for target, source, num_bytes in self.waiting:
            ctypes.memmove(target, source, num_bytes)
        self.waiting.clear()

    # ------------------------------------------------------------- its tensors

    def allocate(self, table: Any, tag: str, content: bytes) -> int:
        """As my_malloc does: the record first, then the memory."""
        block = buffer(len(content))
        self.backing[block.address] = block
        handle = (0, len(content), block.address, 1)
        table[block.address] = Record(handle, tag)
        self.map(handle)
        ctypes.memmove(block.address, content, len(content))
        return block.address

    def read(self, address: int) -> bytes:
        return ctypes.string_at(address, self.mapped[address])

    def free(self, mover: Mover, table: holdings.Allocations, address: int) -> None:
        """As my_free does: asks, then unmaps."""

        def forget(address: int) -> Any:
            return table.pop(address).handle

        self.unmap(mover.free(table, address, forget))


def make_mover(device: SimulatedDevice, max_bytes: int = 4096) -> Mover:
    arena = Arena(buffer, max_bytes, block_bytes=128)
    return Mover(device.mapper(), arena, device)
