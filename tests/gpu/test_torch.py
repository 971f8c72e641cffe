"""Tier one: torch alone. Transfers at the link's speed, memory that comes back, worlds
over NCCL (or HCCL) formed, closed and formed again, a hung group aborted.

vLLM need not be installed; this package must be (`pip install -e .`), and pytest.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests import members
from vllm_resident.rank import holdings, transfer
from vllm_resident.rank.arena import BLOCK_BYTES, Arena
from vllm_resident.rank.device import Device
from vllm_resident.rank.mover import Mapper, Mover

GIB = 2**30
# One engine's weights, in a few allocations as torch's segments are.
NUM_ALLOCATIONS, ALLOCATION_BYTES = 8, 256 * 2**20
WEIGHT_BYTES = NUM_ALLOCATIONS * ALLOCATION_BYTES
# Of a world, after the first: caches of the driver and the library.
MAX_GROWN_BYTES = 64 * 2**20
SCENARIOS_S = 300.0


@dataclass
class Record:
    handle: Any
    tag: str


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(transfer.pinned_block, 4 * WEIGHT_BYTES)
    yield made
    made.trim()
    transfer.release_pinned()


def test_what_is_copied_is_what_arrives(device: Device, arena: Arena) -> None:
    import torch

    copies = transfer.copies_of(device)
    tensor = torch.randint(
        256, (3 * BLOCK_BYTES + 17,), dtype=torch.uint8, device=device.name
    )
    expected = tensor.cpu()
    lease = arena.take(tensor.numel())
    device.synchronize()
    for to_host in (True, False):
        at = tensor.data_ptr()
        for address, length in lease.pieces(0, tensor.numel()):
            ends = (address, at) if to_host else (at, address)
            copies.start(*ends, length, to_host=to_host)
            at += length
        copies.wait()
        if to_host:
            tensor.zero_()
            device.synchronize()
    assert torch.equal(tensor.cpu(), expected)


def test_many_copies_go_at_the_links_speed(
    device: Device, arena: Arena, figure: Callable[..., None]
) -> None:
    """The whole of an engine's weights, pinned beforehand, against one copy of a block,
    and against what vLLM does: memory pinned anew for each, one copy after another."""
    import torch

    copies = transfer.copies_of(device)
    link = transfer.measure(device, copies, arena)
    weights = torch.empty(WEIGHT_BYTES, dtype=torch.uint8, device=device.name)
    began = time.perf_counter()
    lease = arena.take(WEIGHT_BYTES)
    pinned_s = time.perf_counter() - began
    rates = {}
    for to_host in (True, False):
        device.synchronize()
        began = time.perf_counter()
        at = weights.data_ptr()
        for address, length in lease.pieces(0, WEIGHT_BYTES):
            ends = (address, at) if to_host else (at, address)
            copies.start(*ends, length, to_host=to_host)
            at += length
        copies.wait()
        rates[to_host] = WEIGHT_BYTES / (time.perf_counter() - began)
    pageable = torch.empty(WEIGHT_BYTES, dtype=torch.uint8)
    pageable.copy_(weights)
    began = time.perf_counter()
    pageable.copy_(weights)
    pageable_s = time.perf_counter() - began
    figure(
        link_to_host_gb_per_s=link.to_host / 1e9,
        link_to_device_gb_per_s=link.to_device / 1e9,
        to_host_gb_per_s=rates[True] / 1e9,
        to_device_gb_per_s=rates[False] / 1e9,
        pageable_to_host_gb_per_s=WEIGHT_BYTES / pageable_s / 1e9,
        pinning_gb_per_s=WEIGHT_BYTES / pinned_s / 1e9,
    )
    assert rates[True] > 0.7 * link.to_host
    assert rates[False] > 0.7 * link.to_device


@pytest.fixture
def vmm(device: Device) -> Any:
    import torch

    from tests.gpu.vmm import Vmm

    if device.type != "cuda":
        pytest.skip("the memory behind addresses is CUDA's here")
    torch.zeros(1, device=device.name)
    return Vmm(device.index)


def test_a_sleepers_memory_is_the_devices_again(
    device: Device, vmm: Any, arena: Arena, figure: Callable[..., None]
) -> None:
    """Two engines' weights in real memory: one sleeps and wakes, with what vLLM's
    allocator would call, and the other is untouched."""
    copies = transfer.copies_of(device)
    mover = Mover(
        Mapper(
            vmm.create_and_map,
            vmm.unmap_and_release,
            device.free_bytes,
            device.synchronize,
            device.empty_cache,
        ),
        arena,
        copies,
    )
    mover.link = transfer.measure(device, copies, arena)
    engines = [holdings.Holdings(), holdings.Holdings()]
    handles = []
    pattern = arena.take(BLOCK_BYTES)
    (block,) = pattern.blocks
    try:
        for number, held in enumerate(engines):
            for index in range(NUM_ALLOCATIONS):
                handle = vmm.reserve(ALLOCATION_BYTES)
                handles.append(handle)
                vmm.create_and_map(handle)
                held.allocations[handle[2]] = Record(handle, "weights")
                ctypes.memset(block.address, 16 * number + index + 1, BLOCK_BYTES)
                for offset in range(0, ALLOCATION_BYTES, BLOCK_BYTES):
                    copies.start(
                        handle[2] + offset, block.address, BLOCK_BYTES, to_host=False
                    )
                copies.wait()
        before = device.memory()[0]
        asleep = mover.suspend(engines[0], ("weights",))
        freed = before - device.memory()[0]
        awake = mover.resume(engines[0], lambda tag: True)
        again = mover.suspend(engines[0], ("weights",))
        mover.resume(engines[0], lambda tag: True)
        for number, held in enumerate(engines):
            for index, address in enumerate(held.allocations):
                copies.start(block.address, address, BLOCK_BYTES, to_host=True)
                copies.wait()
                seen = ctypes.string_at(block.address, BLOCK_BYTES)
                assert seen == bytes([16 * number + index + 1]) * BLOCK_BYTES
    finally:
        arena.give_back(pattern)
        device.synchronize()
        for handle in handles:
            vmm.give_back(handle)
    figure(
        moved_gib=asleep.num_bytes / GIB,
        first_to_host_gb_per_s=asleep.num_bytes / asleep.seconds / 1e9,
        to_host_gb_per_s=again.num_bytes / again.seconds / 1e9,
        to_device_gb_per_s=awake.num_bytes / awake.seconds / 1e9,
        to_host_of_link=again.num_bytes / again.seconds / mover.link.to_host,
        to_device_of_link=awake.num_bytes / awake.seconds / mover.link.to_device,
    )
    assert asleep.num_bytes == WEIGHT_BYTES
    assert freed > 0.95 * WEIGHT_BYTES


def run_members(num_ranks: int, *scenarios: str) -> list[dict[str, Any]]:
    """Each process's results; all are gone when this returns."""
    _, texts = members.run(
        "tests.gpu.nccl_member", *scenarios, num_ranks=num_ranks, timeout_s=SCENARIOS_S
    )
    results = []
    for text in texts:
        lines = [x for x in text.splitlines() if x.startswith("RESULTS ")]
        assert lines, text[-4000:]
        results.append(json.loads(lines[0].removeprefix("RESULTS ")))
    return results


def test_a_world_is_formed_and_closed_again_and_again(
    num_devices: int, figure: Callable[..., None]
) -> None:
    """On one device a world has one rank: its communicator is real all the same."""
    num_ranks = min(2, num_devices)
    results = run_members(num_ranks, "reform", "side_by_side")
    total = sum(range(num_ranks))
    figure(
        num_ranks=num_ranks,
        first_s=max(each["reform"]["first_s"] for each in results),
        next_s=max(each["reform"]["next_s"] for each in results),
        held_mib=max(each["reform"]["held_bytes"] for each in results) / 2**20,
        grown_mib=max(each["reform"]["grown_bytes"] for each in results) / 2**20,
    )
    for each in results:
        assert set(each["reform"]["sums"]) == {total}
        assert set(each["side_by_side"]["sums"]) == {total}
        assert each["reform"]["grown_bytes"] < MAX_GROWN_BYTES


def test_a_hung_group_is_aborted_and_the_next_one_works(
    num_devices: int, figure: Callable[..., None]
) -> None:
    if num_devices < 2:
        pytest.skip("needs two devices: a world of one rank waits for nobody")
    results = run_members(2, "hung")
    figure(out_s=results[0]["hung"]["out_s"], error=results[0]["hung"]["error"])
    assert results[0]["hung"]["out_s"] < 30
    assert [each["hung"]["sum"] for each in results] == [1, 1]
