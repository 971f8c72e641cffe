"""Host memory for what engines have on the device while they sleep.

Pinned memory is what a device copies to and from at full speed, and pinning costs more
than the copy: blocks are pinned once and go from one sleeper to the next. A lease is
made of whole blocks; what is stored in it is cut where blocks end. This module does not
know how a block is made nor what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_resident.errors import CommandRejected

# A power of two: torch rounds pinned memory up to one (2.13, CachingHostAllocator).
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Block:
    """`num_bytes` of host memory at `address`, for as long as `memory` is held."""

    address: int
    num_bytes: int
    memory: Any


@dataclass(frozen=True, eq=False)
class Lease:
    """Blocks taken together; offsets count through them as if they were one."""

    blocks: list[Block]

    def pieces(self, offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """(address, bytes) of the stretches that `num_bytes` at `offset` are in."""
        for block in self.blocks:
            if offset < block.num_bytes and num_bytes > 0:
                length = min(block.num_bytes - offset, num_bytes)
                yield block.address + offset, length
                num_bytes -= length
            offset = max(0, offset - block.num_bytes)


class Arena:
    """Blocks, those in use and those that are free.

    `make_block(num_bytes)` makes one; it may block for as long as pinning takes, and
    raises what it raises. Not thread-safe.
    """

    def __init__(
        self,
        make_block: Callable[[int], Block],
        max_bytes: int,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._make_block = make_block
        self._max_blocks = max_bytes // block_bytes
        self._block_bytes = block_bytes
        self._free: list[Block] = []
        self._num_in_use = 0

    @property
    def num_bytes(self) -> int:
        """Of all blocks there are."""
        return (self._num_in_use + len(self._free)) * self._block_bytes

    @property
    def num_free_bytes(self) -> int:
        return len(self._free) * self._block_bytes

    def refusal(self, *sizes: int) -> str:
        """Why leases of these bytes cannot all be had; empty where they can."""
        if self._num_in_use + sum(map(self._num_blocks, sizes)) <= self._max_blocks:
            return ""
        in_use = self._num_in_use * self._block_bytes
        return (
            f"it needs {sum(sizes)} bytes of pinned host memory; of the "
            f"{self._max_blocks * self._block_bytes} that this rank may pin, sleepers "
            f"hold {in_use}: put it to sleep at level 2, or unload one of those"
        )

    def take(self, num_bytes: int) -> Lease:
        """Blocks for `num_bytes`, free ones first. Raises `CommandRejected` beyond the
        bound, and what making a block raises; nothing is in use then."""
        if refusal := self.refusal(num_bytes):
            raise CommandRejected(refusal)
        wanted = self._num_blocks(num_bytes)
        while len(self._free) < wanted:
            self._free.append(self._make_block(self._block_bytes))
        # From the end: what was in use last is the likeliest to be in caches.
        taken = [self._free.pop() for _ in range(wanted)]
        self._num_in_use += wanted
        return Lease(taken)

    def give_back(self, lease: Lease) -> None:
        """Free the lease's blocks, which stay pinned; no-op for one given back."""
        self._num_in_use -= len(lease.blocks)
        self._free.extend(lease.blocks)
        lease.blocks.clear()

    def trim(self) -> None:
        """Let go of the blocks that are free."""
        self._free.clear()

    def _num_blocks(self, num_bytes: int) -> int:
        return -(-num_bytes // self._block_bytes)
