"""One engine's allocations on a device, put to sleep, woken and let go of.

How a device's memory is put behind an address and taken away, how it is copied and in
what host memory it is kept come from outside (`Mapper`, `transfer`, `arena`): here is
the order in which that is done, and what is so when it fails half-way. Knows nothing of
vLLM's classes but the records they keep of an allocation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from vllm_resident.rank.arena import Arena, Lease
from vllm_resident.rank.holdings import Allocations, Holdings
from vllm_resident.rank.transfer import Copies, Link, Moved

log = logging.getLogger(__name__)

# vllm-ascend's: never given back.
_PERSISTENT = "sleep_persistent"
# The device must have so much beside what is about to be mapped for a moment.
_RESERVE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Mapper:
    """How a device's memory is put behind an address and taken away, by vLLM's
    handles; `free_bytes` is what the device has left, `settle` waits for all its work
    and `empty_cache` gives back what torch keeps. `aside(pool)` is a context in which
    torch allocates elsewhere though it was told to use the pool; None where that cannot
    be had."""

    create_and_map: Callable[[Any], None]
    unmap_and_release: Callable[[Any], None]
    free_bytes: Callable[[], int]
    settle: Callable[[], None]
    empty_cache: Callable[[], None]
    reserve_bytes: int = _RESERVE_BYTES
    aside: Callable[[Any], AbstractContextManager[None]] | None = None


class Mover:
    """Puts the allocations of `Holdings` to sleep and back. Main thread only."""

    def __init__(self, mapper: Mapper, arena: Arena, copies: Copies) -> None:
        self.mapper = mapper
        self._copies = copies
        self.arena = arena
        self.link = Link()
        # Of engines that are gone: they sleep, and nothing of the device is free to
        # map them to once more (see `bury`).
        self._unburied: list[Holdings] = []
        # Allocators of pools in which something still lives.
        self._kept: list[Any] = []

    def refusal(self, held: Holdings, tags: Iterable[str]) -> str:
        """Why allocations with these tags cannot be stored; empty where they can."""
        wanted = [
            sum(data.handle[1] for data in every.values())
            for every in _by_tag(held, tags).values()
        ]
        return self.arena.refusal(*wanted)

    def suspend(self, held: Holdings, stored_tags: Iterable[str]) -> Moved:
        """Give back the device's memory of every allocation; those with `stored_tags`
        are copied to the host first. What sleeps already stays as it is.

        Raises `CommandRejected` where the arena has no room, and what copying raises:
        nothing has been given back then.
        """
        self.mapper.settle()
        began = time.perf_counter()
        leases: dict[str, tuple[Lease, dict[int, int]]] = {}
        num_bytes = 0
        try:
            for tag, every in _by_tag(held, stored_tags).items():
                if tag in held.stored:
                    raise RuntimeError(f"some of {tag} sleeps and some does not")
                size = sum(data.handle[1] for data in every.values())
                leases[tag] = (self.arena.take(size), {})
                self._store(every, *leases[tag])
                num_bytes += size
            self._copies.wait()
        # Given back and raised again, Ctrl-C too.
        except BaseException:
            with suppress(RuntimeError):
                self._copies.wait()
            for lease, _ in leases.values():
                self.arena.give_back(lease)
            raise
        seconds = time.perf_counter() - began
        held.stored.update(leases)
        self._unmap(held.allocations.values())
        return _moved(num_bytes, seconds, self.link.to_host)

    def _store(
        self, every: dict[int, Any], lease: Lease, offsets: dict[int, int]
    ) -> None:
        offset = 0
        for address, data in every.items():
            offsets[address] = offset
            done = 0
            for target, length in lease.pieces(offset, data.handle[1]):
                self._copies.start(target, address + done, length, to_host=True)
                done += length
            offset += done

    def discard(self, held: Holdings, tags: Iterable[str]) -> None:
        """Give back the memory of allocations with `tags`, contents and all."""
        self.mapper.settle()
        tags = tuple(tags)
        self._unmap(data for data in held.allocations.values() if data.tag in tags)

    def forget(self, held: Holdings, tag: str) -> None:
        """Drop what of `tag` is in host memory; no-op where nothing is."""
        if stored := held.stored.pop(tag, None):
            self.arena.give_back(stored[0])

    def resume(self, held: Holdings, is_wanted: Callable[[str], bool]) -> Moved:
        """Map allocations whose tag is wanted again, with what was stored of them.

        Raises what mapping raises, such as out of memory: what was mapped by then is
        awake, the rest sleeps.
        """
        self.mapper.empty_cache()
        began = time.perf_counter()
        num_bytes = 0
        try:
            for address, data in held.allocations.items():
                if _sleeps(data) and is_wanted(data.tag):
                    self.mapper.create_and_map(data.handle)
                    data.is_asleep = False
                    num_bytes += self._restore(held, address, data)
        finally:
            self._copies.wait()
        seconds = time.perf_counter() - began
        for tag in [tag for tag, (_, left) in held.stored.items() if not left]:
            self.forget(held, tag)
        return _moved(num_bytes, seconds, self.link.to_device)

    def _restore(self, held: Holdings, address: int, data: Any) -> int:
        """Start copying back what is stored of an allocation; returns its bytes."""
        lease, offsets = held.stored.get(data.tag, (None, {}))
        if lease is None or address not in offsets:
            return 0
        done = 0
        for source, length in lease.pieces(offsets.pop(address), data.handle[1]):
            self._copies.start(address + done, source, length, to_host=False)
            done += length
        return done

    def _unmap(self, every: Iterable[Any]) -> None:
        for data in every:
            if not _sleeps(data) and data.tag != _PERSISTENT:
                # Before, not after: what failed halfway is not to be tried again.
                data.is_asleep = True
                self.mapper.unmap_and_release(data.handle)
        self.mapper.empty_cache()

    def free(
        self, table: Allocations, address: int, forget: Callable[[int], Any]
    ) -> Any:
        """Make an allocation fit for being freed by C, which is given the handle that
        is returned. `forget` is vLLM's half: it takes it out of the table.

        C unmaps it first, which for memory that is not mapped breaks the next
        allocation on CUDA and ends the process on an NPU (csrc/cumem_allocator.cpp,
        csrc/camem_allocator.cpp, my_free). So what sleeps is mapped for the moment;
        and so is what vLLM itself has unmapped and forgotten because it was unused,
        which torch comes to free only when the pool goes.
        """
        if address not in table:
            handle = table.taken_out.pop(address)
            self.mapper.create_and_map(handle)
            return handle
        data = table[address]
        if _sleeps(data):
            self.mapper.create_and_map(data.handle)
            data.is_asleep = False
        return forget(address)

    def bury(self, held: Holdings) -> None:
        """Let go of the pools of an engine that is gone, when no tensor is left.

        One that slept is freed allocation by allocation, each mapped for a moment. If
        the device has no room for the largest, its addresses (no memory of the device)
        are kept until it has: this is tried again with each that follows.
        """
        for tag in list(held.stored):
            self.forget(held, tag)
        self._unburied.append(held)
        self._unburied = [each for each in self._unburied if not self._bury(each)]

    def _bury(self, held: Holdings) -> bool:
        asleep = [each.handle[1] for each in held.allocations.values() if _sleeps(each)]
        free_bytes = self.mapper.free_bytes() - self.mapper.reserve_bytes
        if asleep and max(asleep) > free_bytes:
            log.info("event=addresses_kept num=%d bytes=%d", len(asleep), sum(asleep))
            return False
        pools = held.pools.take_all()
        # A pool calls its allocator when it goes: in this order (vLLM 0.32.0,
        # release_pools).
        allocators = [allocator for _, allocator in pools]
        pools.clear()
        self.mapper.empty_cache()
        if held.allocations:
            self._kept.extend(allocators)
        return True


def _sleeps(data: Any) -> bool:
    # Only 0.32.0's records have it from the start.
    return getattr(data, "is_asleep", False)


def _by_tag(held: Holdings, tags: Iterable[str]) -> dict[str, dict[int, Any]]:
    """What is mapped of each of `tags`, by address; nothing of tags that have none."""
    tags = tuple(tags)
    found: dict[str, dict[int, Any]] = {}
    for address, data in held.allocations.items():
        if data.tag in tags and not _sleeps(data):
            found.setdefault(data.tag, {})[address] = data
    return found


def _moved(num_bytes: int, seconds: float, link: float) -> Moved:
    return Moved(num_bytes, seconds, link) if num_bytes else Moved()
