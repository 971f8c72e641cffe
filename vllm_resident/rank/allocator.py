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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from vllm_resident.errors import CommandRejected
from vllm_resident.rank import holdings, transfer
from vllm_resident.rank.arena import Arena
from vllm_resident.rank.device import Device, pinnable_bytes
from vllm_resident.rank.mover import Mapper, Mover
from vllm_resident.rank.transfer import Moved

log = logging.getLogger(__name__)

# vLLM's: any wake-up but of these alone brings the others back (0.32.0).
DEFERRABLE_TAGS = ("weights", "kv_cache")


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
