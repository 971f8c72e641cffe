"""Sleep and wake-up of one engine's allocations among several, on a simulated device.

What is real here: holdings, arena and mover. The device, and the half that vLLM's
allocator does in C, are `simulated_device`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.simulated_device import SimulatedDevice, make_mover
from vllm_resident.errors import CommandRejected
from vllm_resident.rank import allocator, holdings
from vllm_resident.rank.device import Device
from vllm_resident.rank.holdings import Allocations, Holdings, Pools
from vllm_resident.rank.mover import Mover
from vllm_resident.rank.transfer import Link, Moved


class Engine:
    """Allocations of one engine: weights of 300 and 50 bytes, a KV cache of 500, a
    graph pool of 70."""

    def __init__(self, device: SimulatedDevice, table: Allocations, name: str) -> None:
        self.held = holdings.current = Holdings()
        self.content = {
            device.allocate(table, tag, content): (tag, content)
            for tag, content in (
                ("weights", name.encode() * 300),
                ("cudagraph", name.upper().encode() * 70),
                ("weights", name.encode() * 50),
                ("kv_cache", b"k" * 500),
            )
        }

    def addresses(self, *tags: str) -> list[int]:
        return [at for at, (tag, _) in self.content.items() if tag in tags]

    def is_whole(self, device: SimulatedDevice, *tags: str) -> bool:
        return all(
            device.read(at) == self.content[at][1] for at in self.addresses(*tags)
        )


KEPT = ("weights", "runtime", "cudagraph")


@pytest.fixture(autouse=True)
def restored_holdings() -> Iterator[None]:
    before = holdings.current
    yield
    holdings.current = before


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def table() -> Allocations:
    return Allocations()


@pytest.fixture
def mover(device: SimulatedDevice) -> Mover:
    return make_mover(device)


def wake(mover: Mover, held: Holdings, *tags: str) -> Moved:
    deferrable = ("weights", "kv_cache")
    return mover.resume(held, lambda tag: tag in tags or tag not in deferrable)


def test_the_table_shows_the_current_engine_alone(
    device: SimulatedDevice, table: Allocations
) -> None:
    a = Engine(device, table, "a")
    assert len(table) == 4
    b = Engine(device, table, "b")
    assert set(table) == set(b.content)
    assert sum(data.handle[1] for data in table.values()) == 920
    # What dies is taken out of its own, whoever is current.
    (address, *_) = a.content
    assert table.pop(address).handle[2] == address
    assert address not in a.held.allocations
    assert len(table) == 4
    assert table.get(address) is None
    holdings.current = Holdings()
    assert list(table) == []


def test_one_engine_sleeps_and_the_other_is_untouched(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a, b = Engine(device, table, "a"), Engine(device, table, "b")
    mover.link = Link(to_host=1000.0, to_device=2000.0)
    moved = mover.suspend(a.held, KEPT)
    assert (moved.num_bytes, moved.link_bytes_per_s) == (420, 1000.0)
    assert moved.seconds > 0
    assert set(device.mapped) == set(b.content)
    assert b.is_whole(device, *KEPT, "kv_cache")
    moved = wake(mover, a.held, "weights")
    assert (moved.num_bytes, moved.link_bytes_per_s) == (420, 2000.0)
    assert a.is_whole(device, *KEPT)
    assert not set(a.addresses("kv_cache")) & set(device.mapped)
    assert wake(mover, a.held, "kv_cache") == Moved()
    assert set(device.mapped) == {*a.content, *b.content}
    assert mover.arena.num_bytes == mover.arena.num_free_bytes


def test_copies_are_in_flight_together(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a = Engine(device, table, "a")
    mover.suspend(a.held, KEPT)
    assert device.num_waits == 1
    wake(mover, a.held, "weights")
    assert device.num_waits == 2


def test_the_next_sleeper_pins_nothing_new(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a, b = Engine(device, table, "a"), Engine(device, table, "b")
    mover.suspend(a.held, KEPT)
    size = mover.arena.num_bytes
    for _ in range(3):
        wake(mover, a.held, "weights", "kv_cache")
        mover.suspend(b.held, KEPT)
        wake(mover, b.held, "weights", "kv_cache")
        mover.suspend(a.held, KEPT)
    assert mover.arena.num_bytes == size
    assert b.is_whole(device, *KEPT)


def test_level_2_and_from_1_to_2(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a = Engine(device, table, "a")
    assert mover.suspend(a.held, ("runtime", "cudagraph")).num_bytes == 70
    assert wake(mover, a.held, "weights").num_bytes == 70
    assert a.is_whole(device, "cudagraph")
    assert not a.is_whole(device, "weights")
    wake(mover, a.held, "kv_cache")

    mover.suspend(a.held, KEPT)
    mover.forget(a.held, "weights")
    mover.forget(a.held, "weights")
    assert wake(mover, a.held, "weights").num_bytes == 70
    assert not a.is_whole(device, "weights")
    assert mover.arena.num_bytes == mover.arena.num_free_bytes


def test_a_discarded_kv_cache_is_not_copied(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a = Engine(device, table, "a")
    mover.discard(a.held, ("kv_cache",))
    mover.discard(a.held, ("kv_cache",))
    assert set(device.mapped) == set(a.addresses(*KEPT))
    mover.suspend(a.held, KEPT)
    mover.suspend(a.held, KEPT)
    assert device.mapped == {}


def test_no_room_in_the_arena_changes_nothing(
    device: SimulatedDevice, table: Allocations
) -> None:
    mover = make_mover(device, max_bytes=300)
    a = Engine(device, table, "a")
    assert "put it to sleep at level 2" in mover.refusal(a.held, KEPT)
    with pytest.raises(CommandRejected, match="of pinned host memory"):
        mover.suspend(a.held, KEPT)
    assert a.is_whole(device, *KEPT, "kv_cache")
    assert mover.arena.num_bytes == mover.arena.num_free_bytes
    assert mover.refusal(a.held, ("cudagraph",)) == ""


def test_a_copy_that_fails_changes_nothing(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a = Engine(device, table, "a")
    device.fails_at_copy = 2
    with pytest.raises(RuntimeError, match="launch failure"):
        mover.suspend(a.held, KEPT)
    assert set(device.mapped) == set(a.content)
    assert a.held.stored == {}
    # Nothing is on its way into blocks that are free.
    assert device.waiting == []
    assert mover.arena.num_bytes == mover.arena.num_free_bytes


def test_a_persistent_allocation_never_sleeps(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    held = holdings.current = Holdings()
    address = device.allocate(table, "sleep_persistent", b"p" * 10)
    mover.suspend(held, KEPT)
    assert device.read(address) == b"p" * 10


def test_out_of_memory_while_waking_can_be_tried_again(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    a = Engine(device, table, "a")
    mover.suspend(a.held, KEPT)
    device.total_bytes = 380
    with pytest.raises(RuntimeError, match="out of memory"):
        wake(mover, a.held, "weights")
    # What is mapped may be unmapped again.
    assert device.waiting == []
    device.total_bytes = 10_000
    wake(mover, a.held, "weights", "kv_cache")
    assert a.is_whole(device, *KEPT)


class Pool:
    """Stands for torch's MemPool: frees what is in it when it goes."""

    def __init__(self, free_all: Any) -> None:
        self._free_all = free_all

    def __del__(self) -> None:
        self._free_all()


def in_a_pool(
    device: SimulatedDevice, mover: Mover, table: Allocations, engine: Engine
) -> None:
    """As vLLM 0.32.0 keeps it: a list of (pool, allocator)."""
    addresses = list(engine.content)

    def free_all() -> None:
        for address in addresses:
            device.free(mover, table, address)

    engine.held.pools.setdefault("weights", []).append((Pool(free_all), object()))


@pytest.mark.parametrize("asleep", [False, True])
def test_a_buried_engine_leaves_nothing_and_the_other_everything(
    device: SimulatedDevice, table: Allocations, mover: Mover, asleep: bool
) -> None:
    a, b = Engine(device, table, "a"), Engine(device, table, "b")
    in_a_pool(device, mover, table, a)
    if asleep:
        mover.suspend(a.held, KEPT)
    mover.bury(a.held)
    assert a.held.allocations == {}
    assert set(device.mapped) == set(b.content)
    assert b.is_whole(device, *KEPT)
    assert mover.arena.num_bytes == mover.arena.num_free_bytes


def test_a_sleeper_is_buried_when_there_is_room(table: Allocations) -> None:
    device = SimulatedDevice()
    mover = make_mover(device)
    a, b = Engine(device, table, "a"), Engine(device, table, "b")
    in_a_pool(device, mover, table, a)
    in_a_pool(device, mover, table, b)
    mover.suspend(a.held, KEPT)
    device.total_bytes = sum(device.mapped.values()) + 100
    mover.bury(a.held)
    assert len(a.held.allocations) == 4
    # Its host memory is free at once.
    assert mover.arena.num_bytes == mover.arena.num_free_bytes
    mover.discard(b.held, ("kv_cache",))
    mover.bury(b.held)
    assert a.held.allocations == b.held.allocations == {}
    assert device.mapped == {}


def test_what_vllm_trimmed_can_be_freed_by_torch(
    device: SimulatedDevice, table: Allocations, mover: Mover
) -> None:
    """vLLM unmaps unused memory of a pool behind torch's back (0.32.0, cumem.py,
    _trim); torch frees it when the pool goes."""
    a = Engine(device, table, "a")
    (unused, *_) = a.content
    in_a_pool(device, mover, table, a)
    device.free(mover, table, unused)
    assert unused not in device.mapped
    mover.bury(a.held)
    assert device.mapped == {}


def test_pools_that_are_overwritten_stay() -> None:
    """vLLM 0.23.0 keeps one pool a tag and lets go of the one before."""
    pools = Pools()
    pools["kv_cache"] = ("first", "allocator")
    pools["kv_cache"] = ("second", "allocator")
    pools["cudagraph"] = [("third", "allocator")]
    assert [pool for pool, _ in pools.take_all()] == ["first", "second", "third"]
    assert pools.take_all() == []
    assert not pools


class AllocatorOfOneEngine:
    """What vLLM's classes have of it: tags, and a pool for each use."""

    default_tag = "default"
    instance: Any = None

    def __init__(self) -> None:
        self.allocator_and_pools: Any = {}
        self.pointer_to_data: Any = {}
        self.current_tag = self.default_tag
        self.log: list[str] = []

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        assert tag
        before, self.current_tag = self.current_tag, tag
        number = len(self.allocator_and_pools.get(tag, []))
        pools = self.allocator_and_pools.setdefault(tag, [])
        pools.append((f"{tag} {number}", object()))
        yield
        self.current_tag = before

    @contextmanager
    def leave(self, pool: str) -> Iterator[None]:
        self.log.append(f"out of {pool}")
        yield
        self.log.append(f"into {pool}")


def test_an_engine_steps_outside_of_the_pool_of_what_is_built(
    device: SimulatedDevice,
) -> None:
    mover = make_mover(device)
    resident = allocator.resident("cuda", AllocatorOfOneEngine, mover)
    assert resident.can_step_aside
    with resident.aside():
        pass
    with resident.use_memory_pool("weights"):
        # As on an NPU, where it cannot be had.
        assert not resident.can_step_aside
        mover.mapper = replace(mover.mapper, aside=resident.leave)
        assert resident.can_step_aside
        with resident.use_memory_pool("runtime"):
            with resident.aside():
                assert resident.current_tag == "default"
                assert resident.log == ["out of runtime 0", "out of weights 0"]
                with resident.use_memory_pool("workspace"), resident.aside():
                    assert resident.log[-1] == "out of workspace 0"
            assert resident.log[-2:] == ["into weights 0", "into runtime 0"]
            assert resident.current_tag == "runtime"
    resident.log.clear()
    with resident.aside():
        assert resident.log == []


def test_on_a_cpu_there_is_nothing_to_step_out_of() -> None:
    cpu = Device("cpu", 0)
    assert allocator.can_step_aside(cpu)
    with allocator.aside(cpu):
        pass
    allocator.trim(cpu)
    with pytest.raises(CommandRejected, match="no allocator for sleep mode here"):
        allocator.installed(cpu)
