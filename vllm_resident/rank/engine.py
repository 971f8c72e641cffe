"""Build, step and release one vLLM engine in this process, inside an entered world.

The only module that constructs an `LLMEngine`. It passes vLLM's own engine arguments
on, gives the executor its rendezvous from the world, and at the end gives back
everything and proves it. It knows nothing of commands, plans or other ranks.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.uniproc_executor import (
    ExecutorWithExternalLauncher,
    ExternalRendezvous,
)

from vllm_resident.errors import CommandRejected, ReleaseIncomplete
from vllm_resident.rank import checkpoint
from vllm_resident.rank.device import Device
from vllm_resident.rank.world import World

OnPhase = Callable[[str], None]

BACKEND = "external_launcher"
_SET_NUM_THREADS = torch.set_num_threads
# Those built and not yet released in this process.
_engines: set[Engine] = set()
# Variables that vLLM sets for one engine and takes for the user's own in the next
# (0.32.0: platforms/cpu.py, distributed/eplb/eplb_utils.py).
_ENVIRONMENT = {
    name: os.environ.get(name)
    for name in ("LOCAL_WORLD_SIZE", "NCCL_MAX_CTAS", "VLLM_SSM_CONV_STATE_LAYOUT")
}


def warm_up(device: Device) -> None:
    """Do what vLLM leaves to the first engine of a process though it is the same for
    all (0.32.0, v1/worker/worker_base.py, init_worker). Blocks about a second; call it
    once, before the heap is frozen."""
    load_general_plugins()
    current_platform.register_triton_kernel_overrides()
    importlib.import_module(device.worker_module)


def engine_arg_names() -> list[str]:
    """The names of vLLM's engine arguments in this version."""
    return sorted(field.name for field in fields(EngineArgs) if field.init)


def configure(model: str, engine_args: dict[str, Any]) -> VllmConfig:
    """vLLM's whole configuration for `model`; reads its config files, no weights.

    Raises `CommandRejected` with vLLM's own words where it refuses. Blocks up to
    seconds (an architecture not seen on this machine before: tens of seconds).
    """
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise CommandRejected(f"model folder {model} is not there")
    for folder in {model, str(engine_args.get("tokenizer") or model)}:
        checkpoint.forget_if_changed(folder)
    args = {"disable_log_stats": True, **engine_args}
    # Variables such as VLLM_CPU_KVCACHE_SPACE may differ from one engine to the next;
    # vLLM caches them at the end of a build.
    envs.disable_envs_cache()
    try:
        return EngineArgs(
            model=model, distributed_executor_backend=BACKEND, **args
        ).create_engine_config(UsageContext.LLM_CLASS)
    # Whatever vLLM, transformers or pydantic raise about arguments and config files:
    # nothing was built, so it is the caller's to mend.
    except Exception as error:
        raise CommandRejected(
            f"vLLM refuses this engine: {type(error).__name__}: {error}"
        ) from error


class ResidentExecutor(ExecutorWithExternalLauncher):
    """vLLM's external-launcher executor that meets its peers in a world, and marks the
    phases of a build."""

    def __init__(self, vllm_config: VllmConfig, *, world: World, on_phase: OnPhase):
        self._on_phase = on_phase
        super().__init__(vllm_config, ExternalRendezvous(world.rank, world.local_rank))

    def _init_executor(self) -> None:
        self._on_phase("load_model")
        super()._init_executor()

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        self._on_phase("kv_cache")
        super().initialize_from_config(kv_cache_configs)

    def compile_or_warm_up_model(self) -> None:
        self._on_phase("warm_up")
        super().compile_or_warm_up_model()
        self._on_phase("schedule")


class Engine:
    """One `LLMEngine` of a world, on this rank.

    Make it with `Engine.build`. Main thread only. `release` may be called twice.
    """

    def __init__(self, llm: LLMEngine, world: World, device: Device) -> None:
        self.llm = llm
        self.world = world
        self._device = device
        self._model = weakref.ref(llm.model_executor.driver_worker.get_model())
        self.released = False
        _engines.add(self)

    @classmethod
    def build(
        cls, config: VllmConfig, world: World, device: Device, on_phase: OnPhase
    ) -> Engine:
        """Build the engine collectively with the world's other ranks; blocks.

        `on_phase(name)` is called as each phase begins. An error leaves a half-built
        engine behind: give it to `abandon`.
        """
        world.enter()
        on_phase("tokenizer")
        with _no_collections():
            llm = LLMEngine(
                config,
                partial(ResidentExecutor, world=world, on_phase=on_phase),
                log_stats=False,
                usage_context=UsageContext.LLM_CLASS,
            )
        # Shutting the core down is `release`'s; vLLM's finalizer would do it again.
        llm.engine_core._finalizer.detach()
        return cls(llm, world, device)

    @property
    def core(self) -> EngineCore:
        return self.llm.engine_core.engine_core

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: requests, or batches still in flight."""
        return self.core.scheduler.has_requests() or bool(self.core.batch_queue)

    def step(self) -> list[RequestOutput]:
        """One step through the front half: schedule, run, detokenize. Collective."""
        self.world.enter()
        return self.llm.step()

    def release(self) -> None:
        """Destroy the engine and its world and give everything back.

        Raises `ReleaseIncomplete` if the model is still reachable afterwards.
        """
        if self.released:
            return
        self.released = True
        _engines.discard(self)
        self.world.enter()
        llm, core = self.llm, self.core
        try:
            core.shutdown()
            llm._finalizer()
        finally:
            del self.llm, llm, core
            self.world.close()
            _restore_globals()
            _collect(self._device)
        if (model := self._model()) is not None:
            holders = [type(each).__name__ for each in gc.get_referrers(model)]
            raise ReleaseIncomplete(
                f"the model of {self.world.identity} is still held by {holders[:8]}",
                phase="release",
            )


def abandon(error: BaseException | None, world: World, device: Device) -> None:
    """Give back what a build that ended in `error` left: the half-built engine, which
    only the locals of the error's frames still hold, and the world."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    try:
        world.close()
    finally:
        _restore_globals()
        _collect(device)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Building makes 100,000 objects that stay: looking through them again and again
    while it does finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _restore_globals() -> None:
    """Undo what a build does to the process outside its world."""
    envs.disable_envs_cache()
    torch.set_num_threads = _SET_NUM_THREADS
    for name, value in _ENVIRONMENT.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _collect(device: Device) -> None:
    """Free what only cycles hold, then give free memory back to the device. What is
    left when no engine is are modules and caches that stay: with the heap of the
    imports (`boot`) they are frozen, so that the next time looks at engines alone."""
    gc.collect()
    if not _engines:
        gc.freeze()
    device.empty_cache()


class PhaseClock:
    """Seconds spent in each phase, in order; a phase ends where the next begins."""

    def __init__(self, on_phase: OnPhase) -> None:
        self._on_phase = on_phase
        self._current = ""
        self._since = time.monotonic()
        self.phases: dict[str, float] = {}

    @property
    def current(self) -> str:
        return self._current

    def start(self, phase: str) -> None:
        self.stop()
        self._current = phase
        self._on_phase(phase)

    def stop(self) -> None:
        now = time.monotonic()
        if self._current:
            spent = self.phases.get(self._current, 0.0)
            self.phases[self._current] = spent + now - self._since
        self._since = now
