"""Turns for the engines that serve, taken in the middle of building another.

A build holds the main thread for as long as it reads weights. There are places in it
where nothing is half done: before a module or a parameter is registered (torch's own
hooks), before a tensor of the checkpoint is read (patches/, turns-while-loading). At
these the thread may do something else for a moment. This module knows the places, and
what of the build must be put aside for that moment; not what is done in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules import module as torch_module
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.vllm import get_cached_compilation_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_resident.rank import allocator
from vllm_resident.rank.device import Device

# So much of the build at least lies between two turns: each costs some microseconds
# even where nobody wants one.
BETWEEN_S = 0.002

_DEFAULT_DTYPE = torch.get_default_dtype()


@contextmanager
def offered(take_turn: Callable[[], None]) -> Iterator[None]:
    """While the block builds, call `take_turn` where it may be interrupted.

    On the thread that builds; not called again from within itself. An error it raises
    ends the build with it.
    """
    offer = _Offer(take_turn)
    with ExitStack() as hooks:
        for register in (
            torch_module.register_module_module_registration_hook,
            torch_module.register_module_parameter_registration_hook,
        ):
            hooks.callback(register(offer.on_registration).remove)
        DefaultModelLoader.before_tensor = staticmethod(offer)
        try:
            yield
        finally:
            DefaultModelLoader.before_tensor = None


class _Offer:
    """Passes a call on when the last was long enough ago."""

    def __init__(self, take_turn: Callable[[], None]) -> None:
        self._take_turn = take_turn
        self._is_busy = False
        self._next = 0.0

    def __call__(self) -> None:
        if self._is_busy or time.monotonic() < self._next:
            return
        self._is_busy = True
        try:
            self._take_turn()
        finally:
            self._is_busy = False
            self._next = time.monotonic() + BETWEEN_S

    def on_registration(self, *_: object) -> None:
        self()


def may_step(device: Device) -> bool:
    """Whether all that a build sets can be put `aside` right now."""
    return allocator.can_step_aside(device)


@contextmanager
def aside(config: VllmConfig, device: Device) -> Iterator[None]:
    """Put aside what a build sets for the process while it loads a model, for the
    engine of `config` to step as it does otherwise: default dtype and device, vLLM's
    current configuration (0.32.0, model_loader/base_loader.py), and the pool that is
    allocated in (v1/worker/gpu_worker.py). Only where it `may_step`."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(_DEFAULT_DTYPE)
    try:
        with (
            allocator.aside(device),
            torch.device("cpu"),
            set_current_vllm_config(config),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        # It was filled from that configuration.
        get_cached_compilation_config.cache_clear()
