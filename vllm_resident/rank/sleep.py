"""What one engine has in memory, given back while it sleeps and restored as it wakes.

vLLM's `SleepModeBackend` (v1/worker/gpu_worker.py, 0.32.0), one for each engine. On CPU
vLLM has none: there the memory is given back page by page, where it is. On the others
this is vLLM's own, kept to the allocations of one engine by `allocator`. Knows nothing
of schedulers, worlds or commands.
"""

from __future__ import annotations

import copy
import gc
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model, get_model_loader

from vllm_resident.rank import allocator, holdings, pages
from vllm_resident.rank.device import Device
from vllm_resident.rank.transfer import Moved
from vllm_resident.rank.versions import SleepModeBackend

KV_CACHE = "kv_cache"
WEIGHTS = "weights"
# What vLLM keeps at every level beside weights (0.32.0, sleep_mode_backend.py).
_KEPT = ("runtime", "cudagraph")


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
        # By the last `suspend` or `resume`.
        self.moved = Moved()

    def refusal(self, level: int) -> str:  # noqa: ARG002
        """Why it cannot sleep at `level` now; empty where it can."""
        return ""

    def held(self) -> dict[str, int]:
        """Bytes by tag that should be given back at this level and are not."""
        return {}

    @abstractmethod
    def num_freed_bytes(self) -> int:
        """By how much the device's memory must have fallen in the last `suspend`; what
        `held` would tell of need not be counted."""

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


class DeviceMemory(ResidentMemory):
    """vLLM's own sleep mode (`enable_sleep_mode`), of one engine among several: its
    worker's functions do what they do, on the allocator that is `allocator`'s.

    What else is in the allocator beside weights and KV cache (0.32.0: graphs, runtime
    state) stays in host memory at every level.
    """

    def __init__(self, worker: Any, device: Device) -> None:
        super().__init__(worker)
        self._device = device
        self._held = holdings.current
        self.num_kv_cache_bytes = self._held.num_bytes(KV_CACHE)
        self.num_weight_bytes = self._held.num_bytes(WEIGHTS)
        self._num_freed_bytes = 0

    def refusal(self, level: int) -> str:
        if not self._held.allocations:
            return "it was loaded with enable_sleep_mode=False: unload it instead"
        if level == 2 and not hasattr(self._worker, "reload_weights"):
            # vllm-ascend 0.23.0.post1; and it reads them only in another format.
            return "the worker of this device cannot read weights again: use level 1"
        # What sleeps already takes no more.
        stored = (WEIGHTS, *_KEPT) if level == 1 else _KEPT
        mover = allocator.installed(self._device).mover
        return mover.refusal(self._held, stored)

    def suspend(self, level: int = 1) -> None:
        self._num_freed_bytes = 0 if self.level else self.num_weight_bytes
        installed = allocator.installed(self._device)
        if self.level == 0 and self._device.type == "npu":
            installed.sleep((WEIGHTS, *_KEPT))
        elif self.level == 0:
            # Of use if level 2 comes later: asleep, they could not be read.
            self._worker._sleep_saved_buffers = {
                name: buffer.cpu().clone()
                for name, buffer in self._worker.get_model().named_buffers()
            }
            self._worker.sleep(level)
        elif level == 2:
            installed.mover.forget(self._held, WEIGHTS)
        self.moved = installed.take_moved()
        self.level = level
        self._state = "SUSPENDED"

    def discard(self, tags: tuple[str, ...]) -> None:
        # The worker tells KV connectors, where it knows of discarding (not in 0.23.0).
        by = self._worker if hasattr(self._worker, "discard") else None
        (by or allocator.installed(self._device)).discard(tags)

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        installed = allocator.installed(self._device)
        if self._device.type == "npu":
            # vllm-ascend's worker prepares for weights that come from a trainer next:
            # it turns some round, and refuses others' format (worker.py, wake_up).
            installed.wake_up(tags)
            self._device.synchronize()
        else:
            self._worker.wake_up(tags)
        self.moved = installed.take_moved()
        if self.level == 2 and (tags is None or WEIGHTS in tags):
            self._worker.reload_weights()
        if tags is None or KV_CACHE in tags:
            self.level = 0
            self._state = "RUNNING"

    def num_freed_bytes(self) -> int:
        return self._num_freed_bytes


def release(device: Device, held: holdings.Holdings) -> None:
    """Give the device back what an engine that is gone had in vLLM's allocator; no-op
    on CPU."""
    if device.type != "cpu" and held.pools:
        allocator.installed(device).mover.bury(held)


def engine_memory(worker: Any, device: Device) -> ResidentMemory:
    """The memory of an engine just built, by its worker, while its world is entered."""
    return CpuMemory(worker) if device.type == "cpu" else DeviceMemory(worker, device)
