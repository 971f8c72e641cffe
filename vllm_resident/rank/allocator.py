"""vLLM's allocator for sleep mode, made fit for several engines in one process.

As vLLM has it (0.32.0, device_allocator/cumem.py; 0.23.0 and vllm-ascend 0.23.0.post1
alike), a second engine's load fails an assertion, sleep and wake-up take every engine's
memory, and an engine that ends takes the others' pools with it. The one installed here
sees the current engine's `holdings` alone, keeps what sleeps in an arena of pinned
memory, and lets pools go when nothing is in them any more. Which engine is current, and
when one sleeps, is decided elsewhere.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vllm_resident.errors import CommandRejected
from vllm_resident.rank import holdings, transfer
from vllm_resident.rank.arena import Arena, Lease
from vllm_resident.rank.device import Device, pinnable_bytes
from vllm_resident.rank.holdings import Holdings
from vllm_resident.rank.transfer import Copies, Link, Moved

log = logging.getLogger(__name__)

# vLLM's: any wake-up but of these alone brings the others back (0.32.0).
DEFERRABLE_TAGS = ("weights", "kv_cache")
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
        self, table: holdings.Allocations, address: int, forget: Callable[[int], Any]
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


class _Resident:
    """Mixed into vLLM's allocator class, before it."""

    mover: Mover

    def __init__(self) -> None:
        # What has been copied since somebody last asked.
        self._moved = Moved()
        # Those that torch allocates in at the moment.
        self._active: list[Any] = []
        self._table = holdings.Allocations()
        super().__init__()

    @property
    def pointer_to_data(self) -> holdings.Allocations:
        return self._table

    @pointer_to_data.setter
    def pointer_to_data(self, own: object) -> None:
        """vLLM's constructor puts a table of its own there; so below."""

    @property
    def allocator_and_pools(self) -> holdings.Pools:
        return holdings.current.pools

    @allocator_and_pools.setter
    def allocator_and_pools(self, own: object) -> None:
        pass

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        tags = self.default_tag if offload_tags is None else offload_tags
        tags = (tags,) if isinstance(tags, str) else tags
        self._moved += self.mover.suspend(holdings.current, tags)

    def discard(self, tags: tuple[str, ...] | str) -> None:
        tags = (tags,) if isinstance(tags, str) else tags
        self.mover.discard(holdings.current, tags)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._moved += self.mover.resume(
            holdings.current,
            lambda tag: tags is None or tag in tags or tag not in DEFERRABLE_TAGS,
        )

    @contextmanager
    def use_memory_pool(self, tag: str | None = None) -> Iterator[None]:
        with super().use_memory_pool(tag):
            pools = self.allocator_and_pools[tag or self.default_tag]
            newest = pools[-1] if isinstance(pools, list) else pools
            self._active.append(newest[0])
            try:
                yield
            finally:
                self._active.pop()

    @property
    def can_step_aside(self) -> bool:
        return not self._active or self.mover.mapper.aside is not None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Have torch allocate as if no pool were in use: for an engine that takes a
        step in the middle of another's build."""
        assert self.can_step_aside
        tag, self.current_tag = getattr(self, "current_tag", ""), self.default_tag
        active, self._active = self._active, []
        try:
            with ExitStack() as stack:
                for pool in reversed(active):
                    stack.enter_context(self.mover.mapper.aside(pool))
                yield
        finally:
            self._active, self.current_tag = active, tag

    def take_moved(self) -> Moved:
        """What was copied since this was last called."""
        moved, self._moved = self._moved, Moved()
        return moved

    def release_pools(self) -> None:
        """Nothing: an engine's shutdown calls it while its tensors live, and at exit
        the process ends anyway. See `Mover.bury`."""


class _ResidentCuMem(_Resident):
    def _python_free_callback(self, ptr: int) -> Any:
        forget = super()._python_free_callback
        return self.mover.free(self._table, ptr, forget)


class _ResidentCaMem(_Resident):
    def __init__(self) -> None:
        super().__init__()
        # C keeps what it is handed without a reference: bound methods made for the
        # call would be gone (as vLLM's were, vllm-project/vllm#22724).
        self.python_malloc_callback = super().python_malloc_callback
        self.python_free_callback = self._free

    def _free(self, ptr: int) -> Any:
        forget = super().python_free_callback
        return self.mover.free(self._table, ptr, forget)


# Where the allocator of a device type is, what says that it can be used, what is mixed
# into it.
_ALLOCATORS: dict[str, tuple[str, str, str, type[_Resident]]] = {
    "cuda": (
        "vllm.device_allocator.cumem",
        "CuMemAllocator",
        "cumem_available",
        _ResidentCuMem,
    ),
    "npu": (
        "vllm_ascend.device_allocator.camem",
        "CaMemAllocator",
        "camem_available",
        _ResidentCaMem,
    ),
}


def resident(device_type: str, base: type, mover: Mover) -> Any:
    """An allocator of vLLM's class `base` that works by `mover`. One a process: make
    it vLLM's own before vLLM makes one."""
    mixin = _ALLOCATORS[device_type][-1]
    return type(f"Resident{base.__name__}", (mixin, base), {"mover": mover})()


def install(device: Device) -> None:
    """Make vLLM use a resident allocator in this process; call it once, before any
    engine. No-op on CPU, and where vLLM has no such allocator (then it refuses
    `enable_sleep_mode` itself). Pins a block of memory and measures the link."""
    if device.type not in _ALLOCATORS:
        return
    module_name, class_name, flag, _ = _ALLOCATORS[device.type]
    module = importlib.import_module(module_name)
    if not getattr(module, flag):
        return
    base = getattr(module, class_name)
    if base.instance is not None:
        raise RuntimeError(f"{class_name} has been used in this process already")
    mapper = Mapper(
        module.create_and_map,
        module.unmap_and_release,
        device.free_bytes,
        device.synchronize,
        device.empty_cache,
        aside=_aside_on_cuda(device.index) if device.type == "cuda" else None,
    )
    arena = Arena(transfer.pinned_block, pinnable_bytes())
    copies = transfer.copies_of(device)
    mover = Mover(mapper, arena, copies)
    mover.link = transfer.measure(device, copies, arena)
    base.instance = resident(device.type, base, mover)
    log.info(
        "event=link_measured to_host_bytes_per_s=%.3g to_device_bytes_per_s=%.3g",
        mover.link.to_host,
        mover.link.to_device,
    )


def _aside_on_cuda(
    index: int,
) -> Callable[[Any], AbstractContextManager[None]]:
    """What torch.cuda.use_mem_pool does at its end and its beginning (torch 2.13,
    cuda/memory.py), the other way round. Beginning counts one user more."""
    from torch import _C

    @contextmanager
    def aside(pool: Any) -> Iterator[None]:
        _C._cuda_endAllocateToPool(index, pool.id)
        try:
            yield
        finally:
            _C._cuda_beginAllocateCurrentThreadToPool(index, pool.id)
            _C._cuda_releasePool(index, pool.id)

    return aside


def can_step_aside(device: Device) -> bool:
    """Whether another engine may step now, in the middle of a build: not on an NPU
    while what is allocated goes to the pools of the engine that is built."""
    instance = _find(device)
    return instance is None or instance.can_step_aside


@contextmanager
def aside(device: Device) -> Iterator[None]:
    """Let that engine allocate for itself."""
    with ExitStack() as stack:
        if (instance := _find(device)) is not None:
            stack.enter_context(instance.aside())
        yield


def installed(device: Device) -> Any:
    """The resident allocator. Raises `CommandRejected` where there is none."""
    if (instance := _find(device)) is not None:
        return instance
    raise CommandRejected(
        f"vLLM has no allocator for sleep mode here ({device.type}): load the engine "
        f"with enable_sleep_mode=False, and unload it instead of putting it to sleep"
    )


def trim(device: Device) -> None:
    """Unpin the host memory that no sleeper is in; no-op on CPU."""
    if (instance := _find(device)) is not None:
        instance.mover.arena.trim()
        transfer.release_pinned()


def _find(device: Device) -> _Resident | None:
    if device.type not in _ALLOCATORS:
        return None
    module_name, class_name, *_ = _ALLOCATORS[device.type]
    instance = getattr(importlib.import_module(module_name), class_name).instance
    return instance if isinstance(instance, _Resident) else None


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
