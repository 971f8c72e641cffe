"""What one engine has in memory, given back while it sleeps and restored as it wakes.

vLLM's `SleepModeBackend` (v1/worker/gpu_worker.py, 0.32.0), one for each engine. On CPU
vLLM has none: there the memory is given back page by page, where it is. On the others
this is vLLM's own, kept to the allocations of one engine, since vLLM's allocator is one
per process. Knows nothing of schedulers, worlds or commands.
"""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
from vllm.model_executor.model_loader import get_model, get_model_loader

from vllm_resident.rank import pages
from vllm_resident.rank.device import Device

KV_CACHE = "kv_cache"
WEIGHTS = "weights"


def can_read_again(config: VllmConfig) -> bool:
    """Whether weights that were dropped can be had again: vLLM's loaders of files can,
    those of made-up weights cannot. Adapters (LoRA) are of no loader, and where memory
    is a device's it is dropped with the weights."""
    if config.lora_config is not None and config.device_config.device_type != "cpu":
        return False
    return hasattr(get_model_loader(config.load_config), "get_all_weights")


class ResidentMemory(SleepModeBackend):
    """One engine's weights and KV cache on this rank.

    `suspend`, `resume` and `discard` are vLLM's, with its tags. `level` is that of the
    sleep, 0 awake; `num_weight_bytes` and `num_kv_cache_bytes` are what it has awake.
    """

    num_weight_bytes: int
    num_kv_cache_bytes: int

    def __init__(self, worker: Any) -> None:
        super().__init__()
        self._worker = worker
        self.level = 0

    def held(self) -> dict[str, int]:
        """Bytes by tag that should be given back at this level and are not."""
        return {}

    def num_freed_bytes(self) -> int:
        """By how much the device's memory must have fallen in the last `suspend`; what
        `held` would tell of need not be counted."""
        raise NotImplementedError

    @classmethod
    def preserves_communicators(cls) -> bool:
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        return True


# ------------------------------------------------------------------------- CPU


def _nothing(pointer: int) -> None:
    pass


@dataclass
class _Packed:
    """A layer's weight as its matrix multiplication wants it: oneDNN's copy behind a
    handler, or a tensor (0.32.0, model_executor/layers/utils.py). It is in the closure
    of `layer.cpu_linear`; compiled code holds the tensors in there too, so they stay
    and what they say is exchanged."""

    layer: torch.nn.Module
    linear: Callable[..., torch.Tensor]

    @property
    def handlers(self) -> list[CPUDNNLGEMMHandler]:
        return [
            each for each in _closure(self.linear) if type(each) is CPUDNNLGEMMHandler
        ]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [each for each in _closure(self.linear) if type(each) is torch.Tensor]

    @property
    def is_anything(self) -> bool:
        return bool(self.handlers or self.tensors)

    def num_handler_bytes(self) -> int:
        size = self.layer.weight.element_size()
        return sum(handler.n * handler.k * size for handler in self.handlers)

    def drop(self) -> None:
        """Free oneDNN's copies; the tensors' pages are freed with the others."""
        for handler in self.handlers:
            handler.dtor(handler.handler_tensor.item())
            # The engine may end while it sleeps.
            handler.dtor = _nothing
            handler.handler_tensor.zero_()

    def refill(self, made: _Packed) -> None:
        """Take over what `made` holds of the same layer's weight, made anew."""
        for handler, new in zip(self.handlers, made.handlers, strict=True):
            handler.handler_tensor.copy_(new.handler_tensor)
            handler.dtor, new.handler_tensor = new.dtor, None
        for tensor, new in zip(self.tensors, made.tensors, strict=True):
            tensor.copy_(new)


def _closure(function: Callable[..., Any]) -> list[Any]:
    if not inspect.isfunction(function):
        return []
    return [cell.cell_contents for cell in function.__closure__ or ()]


class CpuMemory(ResidentMemory):
    """On CPU the device's memory is the host's: at level 1 the weights stay where they
    are and only the pages of the KV cache go; at level 2 those of the weights as well.
    """

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        model = worker.get_model()
        self._packed = _packed_of(model)
        buffers = _storages(model.buffers())
        tensors = (packed.tensors for packed in self._packed.values())
        weights = _storages(chain(model.parameters(), *tensors))
        # No loader brings buffers back.
        self._weights = [weights[at] for at in weights.keys() - buffers.keys()]
        self._kv_cache = list(_storages(_flat(worker.model_runner.kv_caches)).values())
        self._num_packed_bytes = sum(
            packed.num_handler_bytes() for packed in self._packed.values()
        )
        self.num_kv_cache_bytes = sum(size for _, size in self._kv_cache)
        self.num_weight_bytes = self._num_packed_bytes + sum(
            size for _, size in {**buffers, **weights}.values()
        )

    def suspend(self, level: int = 1) -> None:
        self.discard((KV_CACHE, WEIGHTS) if level == 2 else (KV_CACHE,))
        self.level = level
        self._state = "SUSPENDED"

    def discard(self, tags: tuple[str, ...]) -> None:
        if KV_CACHE in tags:
            pages.give_back(_ranges(self._kv_cache))
        if WEIGHTS in tags:
            with torch.inference_mode():
                for packed in self._packed.values():
                    packed.drop()
            pages.give_back(_ranges(self._weights))

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        if self.level == 2 and (tags is None or WEIGHTS in tags):
            self._read_weights()
        if tags is None or KV_CACHE in tags:
            # Its pages come one by one as they are written.
            self.level = 0
            self._state = "RUNNING"

    def held(self) -> dict[str, int]:
        held = {}
        if self.level >= 1:
            held["KV cache"] = pages.num_resident_bytes(_ranges(self._kv_cache))
        if self.level == 2:
            held["weights"] = pages.num_resident_bytes(_ranges(self._weights))
        return {name: size for name, size in held.items() if size}

    def num_freed_bytes(self) -> int:
        # What oneDNN allocates, no page of it is known here.
        return self._num_packed_bytes if self.level == 2 else 0

    def _read_weights(self) -> None:
        """Load the model once more and take its weights over.

        Not vLLM's `reload_weights`, which goes through the layers that are there: on
        CPU it leaves some packed as before and some not packed at all (a tied lm_head,
        the experts of a mixture; 0.32.0). A load like the first makes the same.
        """
        config = _aside(self._worker.vllm_config)
        with set_current_vllm_config(config):
            made = get_model(vllm_config=config)
        weights = dict(made.named_parameters(remove_duplicate=False))
        packed = _packed_of(made)
        with torch.inference_mode():
            for name, weight in self._worker.get_model().named_parameters():
                weight.data.copy_(weights[_plain(name)].data)
            for name, mine in self._packed.items():
                mine.refill(packed[name])
            # Cycles keep the rest of it for a while.
            for weight in weights.values():
                weight.data = torch.empty(0)
        del made, weights, packed
        gc.collect()


def _packed_of(model: torch.nn.Module) -> dict[str, _Packed]:
    """The packed weights of a model by the name of their layer."""
    packed = {
        _plain(name): _Packed(layer, vars(layer).get("cpu_linear"))
        for name, layer in model.named_modules()
    }
    return {name: each for name, each in packed.items() if each.is_anything}


def _plain(name: str) -> str:
    """The name as it was before adapters (LoRA) were put round the layers."""
    return name.replace(".base_layer", "")


def _aside(config: VllmConfig) -> VllmConfig:
    """For a model that never runs: it may not enter itself among the layers of the
    other one, which are found by name, nor prepare to be compiled."""
    config = copy.copy(config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config.compilation_config.mode = CompilationMode.NONE
    return config


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, tuple[int, int]]:
    """(address, bytes) of the tensors' memory by address, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {
        each.data_ptr(): (each.data_ptr(), each.nbytes())
        for each in storages
        if each.nbytes()
    }


def _flat(tensors: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Some models have several tensors for the cache of one layer."""
    for each in tensors:
        if isinstance(each, torch.Tensor):
            yield each
        else:
            yield from _flat(each)


def _ranges(storages: list[tuple[int, int]]) -> list[pages.Range]:
    return [pages.inside(*storage) for storage in storages]


# ------------------------------------------------------------------ CUDA and NPU

_ALLOCATORS = {
    "cuda": ("vllm.device_allocator.cumem", "CuMemAllocator"),
    "npu": ("vllm_ascend.device_allocator.camem", "CaMemAllocator"),
}


def _allocations(device: Device) -> tuple[Any, dict[int, Any]]:
    module, name = _ALLOCATORS[device.type]
    allocator = getattr(importlib.import_module(module), name).get_instance()
    return allocator, allocator.pointer_to_data


class DeviceMemory(ResidentMemory):
    """vLLM's own sleep mode (`enable_sleep_mode`), of one engine among several.

    The allocator's functions walk all allocations of the process, so they are shown
    this engine's alone: those made since `others` were (0.32.0, cumem.py).
    """

    def __init__(self, worker: Any, device: Device, others: frozenset[int]) -> None:
        super().__init__(worker)
        self._device = device
        self._mine = _allocations(device)[1].keys() - others
        self.num_kv_cache_bytes = self._num_bytes((KV_CACHE,))
        self.num_weight_bytes = self._num_bytes((WEIGHTS,))
        self._num_freed_bytes = 0

    def suspend(self, level: int = 1) -> None:
        self._num_freed_bytes = 0 if self.level else self.num_weight_bytes
        with self._alone() as allocations:
            if self.level == 0:
                # Of use if level 2 comes later: asleep, they could not be read.
                self._worker._sleep_saved_buffers = {
                    name: buffer.cpu().clone()
                    for name, buffer in self._worker.get_model().named_buffers()
                }
                self._worker.sleep(level)
            elif level == 2:
                for data in allocations.values():
                    if data.tag == WEIGHTS:
                        data.cpu_backup_tensor = None
        self.level = level
        self._state = "SUSPENDED"

    def discard(self, tags: tuple[str, ...]) -> None:
        with self._alone():
            self._worker.discard(tags)

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        with self._alone():
            self._worker.wake_up(tags)
        if self.level == 2 and (tags is None or WEIGHTS in tags):
            self._worker.reload_weights()
        if tags is None or KV_CACHE in tags:
            self.level = 0
            self._state = "RUNNING"

    def num_freed_bytes(self) -> int:
        return self._num_freed_bytes

    def _num_bytes(self, tags: tuple[str, ...]) -> int:
        allocations = _allocations(self._device)[1]
        mine = (data for ptr, data in allocations.items() if ptr in self._mine)
        return sum(data.handle[1] for data in mine if data.tag in tags)

    @contextmanager
    def _alone(self) -> Iterator[dict[int, Any]]:
        # What the allocator's own collection would free may be another engine's.
        gc.collect()
        self._device.empty_cache()
        allocator, everyone = _allocations(self._device)
        mine = {ptr: data for ptr, data in everyone.items() if ptr in self._mine}
        allocator.pointer_to_data = dict(mine)
        try:
            yield mine
        finally:
            for ptr in mine.keys() - allocator.pointer_to_data.keys():
                del everyone[ptr]
            allocator.pointer_to_data = everyone


def allocations_of_others(device: Device) -> frozenset[int]:
    """What is allocated before an engine is built, for `engine_memory` after it."""
    return frozenset() if device.type == "cpu" else frozenset(_allocations(device)[1])


def engine_memory(
    worker: Any, device: Device, others: frozenset[int]
) -> ResidentMemory:
    """The memory of an engine just built, by its worker."""
    if device.type == "cpu":
        return CpuMemory(worker)
    return DeviceMemory(worker, device, others)
