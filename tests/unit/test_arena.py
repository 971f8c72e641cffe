"""Host memory for sleepers: blocks are reused, bounded, and cut where they end."""

from __future__ import annotations

import random

import pytest

from tests.unit.simulated_device import buffer
from vllm_resident.errors import CommandRejected
from vllm_resident.rank.arena import Arena, Block

BLOCK = 128


class Maker:
    """Makes blocks, counts them, and fails at one if told to."""

    def __init__(self, fails_at: int = -1) -> None:
        self.num_made = 0
        self._fails_at = fails_at

    def __call__(self, num_bytes: int) -> Block:
        if self.num_made == self._fails_at:
            raise MemoryError("cannot pin")
        self.num_made += 1
        return buffer(num_bytes)


def test_blocks_go_from_one_sleeper_to_the_next() -> None:
    maker = Maker()
    arena = Arena(maker, 100 * BLOCK, BLOCK)
    first = arena.take(3 * BLOCK - 1)
    second = arena.take(BLOCK + 1)
    assert maker.num_made == 5
    assert (arena.num_bytes, arena.num_free_bytes) == (5 * BLOCK, 0)
    before = {block.address for block in first.blocks}
    arena.give_back(first)
    third = arena.take(2 * BLOCK)
    assert {block.address for block in third.blocks} <= before
    assert maker.num_made == 5
    arena.give_back(second)
    arena.give_back(third)
    arena.give_back(third)
    assert (arena.num_bytes, arena.num_free_bytes) == (5 * BLOCK, 5 * BLOCK)
    arena.trim()
    assert (arena.num_bytes, arena.num_free_bytes) == (0, 0)


def test_the_bound_holds_and_a_refusal_changes_nothing() -> None:
    maker = Maker()
    arena = Arena(maker, 4 * BLOCK + 1, BLOCK)
    lease = arena.take(3 * BLOCK)
    assert arena.refusal(BLOCK) == ""
    # Each would fit alone; a lease does not share a block.
    assert "sleepers hold 384" in arena.refusal(1, 1)
    with pytest.raises(CommandRejected, match="it needs 129 bytes of pinned host"):
        arena.take(BLOCK + 1)
    assert (maker.num_made, arena.num_free_bytes) == (3, 0)
    arena.give_back(lease)
    assert arena.take(4 * BLOCK).blocks


def test_a_block_that_cannot_be_made_leaves_nothing_in_use() -> None:
    arena = Arena(Maker(fails_at=2), 100 * BLOCK, BLOCK)
    with pytest.raises(MemoryError):
        arena.take(4 * BLOCK)
    assert arena.num_bytes == arena.num_free_bytes == 2 * BLOCK
    assert len(arena.take(2 * BLOCK).blocks) == 2


def test_nothing_takes_nothing() -> None:
    arena = Arena(Maker(), BLOCK, BLOCK)
    assert arena.take(0).blocks == []
    assert list(arena.take(0).pieces(0, 0)) == []


@pytest.mark.parametrize("seed", range(20))
def test_pieces_cover_each_byte_once(seed: int) -> None:
    chance = random.Random(seed)
    arena = Arena(Maker(), 100 * BLOCK, BLOCK)
    sizes = [chance.randrange(1, 4 * BLOCK) for _ in range(8)]
    lease = arena.take(sum(sizes))
    bytes_of = [
        block.address + at for block in lease.blocks for at in range(block.num_bytes)
    ]
    offset = 0
    for size in sizes:
        pieces = list(lease.pieces(offset, size))
        covered = [start + at for start, length in pieces for at in range(length)]
        assert covered == bytes_of[offset : offset + size]
        offset += size
