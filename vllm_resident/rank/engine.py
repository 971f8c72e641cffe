"""Build, step, put to sleep and release one vLLM engine, inside an entered world.

The only module that constructs an `LLMEngine`. It passes vLLM's own engine arguments
on, gives the executor its rendezvous from the world, and at the end gives back
everything and proves it. It knows nothing of commands, plans or other ranks.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

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
from vllm_resident.messages import EngineMemory
from vllm_resident.rank import (
    allocator,
    ambient,
    budget,
    checkpoint,
    holdings,
    layers,
    ledger,
    refusal,
    sleep,
    turns,
)
from vllm_resident.rank.device import Device
from vllm_resident.rank.transfer import Moved
from vllm_resident.rank.world import World

OnPhase = Callable[[str], None]

BACKEND = "external_launcher"
# vLLM's engine argument by which a sleeping engine's NCCL communicators give their
# memory back (0.32.0; 0.23.0 has none such).
SUSPENDS = "enable_nccl_comm_suspend"
# Those built and not yet released in this process.
_engines: set[Engine] = set()
# Of the times that no engine is left, in how many a collection looks at the whole heap:
# some tenths of a second.
THOROUGH_EVERY = 16
_freezes = itertools.count(1)


def warm_up(device: Device) -> None:
    """Do what vLLM leaves to the first engine of a process though it is the same for
    all (0.32.0, v1/worker/worker_base.py, init_worker), and make its allocator fit for
    several. Blocks about a second; call it once, before the heap is frozen."""
    load_general_plugins()
    # 0.23.0 has none.
    if hasattr(current_platform, "register_triton_kernel_overrides"):
        current_platform.register_triton_kernel_overrides()
    importlib.import_module(device.worker_module)
    allocator.install(device)


def engine_arg_names() -> list[str]:
    """The names of vLLM's engine arguments in this version."""
    return sorted(field.name for field in fields(EngineArgs) if field.init)


@dataclass(frozen=True)
class Prepared:
    """What vLLM made of an engine's arguments: its configuration, the environment
    variables that it set with it, and what the engine will need on one rank, as far as
    files and arguments tell."""

    config: VllmConfig
    variables: ambient.Variables
    memory: EngineMemory
    # As the arguments have it; `config`'s is of the device it is built on.
    utilization: float


def configure(model: str, engine_args: dict[str, Any]) -> Prepared:
    """vLLM's whole configuration for `model`; reads its config files, no weights.

    Raises `CommandRejected` with vLLM's own words where it refuses. Blocks up to
    seconds (an architecture not seen on this machine before: tens of seconds).
    """
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise CommandRejected(f"model folder {model} is not there")
    for folder in {model, str(engine_args.get("tokenizer") or model)}:
        checkpoint.forget_if_changed(folder)
    args = {"disable_log_stats": True, **engine_args}
    if current_platform.device_type != "cpu":
        # Decides where weights are allocated; on CPU vLLM refuses it.
        args.setdefault("enable_sleep_mode", True)
    if current_platform.device_type == "cuda" and SUSPENDS in engine_arg_names():
        # Where NCCL is older than 2.29.7 vLLM warns and leaves the memory as it is.
        args.setdefault(SUSPENDS, True)
    outside = ambient.variables()
    try:
        config = EngineArgs(
            model=model, distributed_executor_backend=BACKEND, **args
        ).create_engine_config(UsageContext.LLM_CLASS)
        return Prepared(
            config,
            ambient.variables(),
            _expected_memory(config),
            config.cache_config.gpu_memory_utilization,
        )
    # Whatever vLLM, transformers or pydantic raise about arguments and config files:
    # nothing was built, so it is the caller's to mend.
    except Exception as error:
        raise CommandRejected(
            f"vLLM refuses this engine: {refusal.in_words(error)}"
        ) from error
    finally:
        ambient.set_variables(outside)


def _expected_memory(config: VllmConfig) -> EngineMemory:
    parallel = config.parallel_config
    num_parts = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    weights = checkpoint.num_weight_bytes(config.model_config.model) // num_parts
    kv_cache = config.cache_config.kv_cache_memory_bytes or 0
    return EngineMemory(device_bytes=weights + kv_cache, weight_bytes=weights)


class ResidentExecutor(ExecutorWithExternalLauncher):
    """vLLM's external-launcher executor that meets its peers in a world, marks the
    phases of a build, and offers turns while it loads the model."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        world: World,
        on_phase: OnPhase,
        take_turn: Callable[[], None],
    ) -> None:
        self._on_phase = on_phase
        self._take_turn = take_turn
        super().__init__(vllm_config, ExternalRendezvous(world.rank, world.local_rank))

    def _init_executor(self) -> None:
        self._on_phase("load_model")
        with turns.offered(self._take_turn):
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

    def __init__(
        self,
        llm: LLMEngine,
        world: World,
        device: Device,
        backend: sleep.ResidentMemory,
        *,
        can_read_again: bool,
    ) -> None:
        self.llm = llm
        self.world = world
        self._device = device
        self._backend = backend
        self._can_read_again = can_read_again
        self._held = holdings.current
        model = llm.model_executor.driver_worker.get_model()
        ledger.count_model(weakref.ref(model))
        self._layers = layers.Watch(model)
        self.released = False
        _engines.add(self)

    @classmethod
    def build(
        cls,
        prepared: Prepared,
        world: World,
        device: Device,
        on_phase: OnPhase,
        take_turn: Callable[[], None] = lambda: None,
    ) -> Engine:
        """Build the engine collectively with the world's other ranks; blocks.

        `on_phase(name)` is called as each phase begins, `take_turn()` every few
        milliseconds while the model is loaded, with the world entered: it may enter
        others, and let their engines step inside `turns.aside`. An error, of these
        functions too, leaves a half-built engine behind: give it to `abandon`.
        """
        world.enter()
        world.set_variables(prepared.variables)
        _fit(prepared, device)
        on_phase("tokenizer")
        with _no_collections():
            llm = LLMEngine(
                prepared.config,
                partial(
                    ResidentExecutor,
                    world=world,
                    on_phase=on_phase,
                    take_turn=take_turn,
                ),
                log_stats=False,
                usage_context=UsageContext.LLM_CLASS,
            )
        # Shutting the core down is `release`'s; vLLM's finalizer would do it again.
        if finalizer := getattr(llm.engine_core, "_finalizer", None):
            finalizer.detach()
        world.settle()
        worker = llm.model_executor.driver_worker.worker
        return cls(
            llm,
            world,
            device,
            sleep.engine_memory(worker, device),
            can_read_again=sleep.can_read_again(prepared.config),
        )

    @property
    def config(self) -> VllmConfig:
        return self.llm.vllm_config

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

    @property
    def sleep_level(self) -> int:
        """0 while it is awake; 1 or 2 while it sleeps."""
        return self._backend.level

    def memory(self) -> EngineMemory:
        """What it has on this rank now."""
        weights = self._backend.num_weight_bytes
        kv_cache = self._backend.num_kv_cache_bytes
        return EngineMemory(
            device_bytes=weights + kv_cache if self.sleep_level == 0 else 0,
            host_bytes=weights if self.sleep_level == 1 else 0,
            weight_bytes=weights,
        )

    def check_sleep(self, level: int) -> None:
        """Raise `CommandRejected` where `sleep(level)` would, and change nothing."""
        if level not in (1, 2):
            raise CommandRejected(f"sleep level {level}: there are 1 and 2")
        if level < self.sleep_level:
            raise CommandRejected(
                f"it sleeps at level {self.sleep_level}, its weights are gone: wake it "
                f"up before putting it to level {level}"
            )
        if level == 2 and not self._can_read_again:
            raise CommandRejected(
                "its weights did not come from a checkpoint that can be read again: "
                "it can sleep at level 1 only"
            )
        if level != self.sleep_level and (refusal := self._backend.refusal(level)):
            raise CommandRejected(refusal)

    def sleep(self, level: int, on_phase: OnPhase) -> Moved:
        """Give its memory back, on this rank; returns what was copied to the host.

        It must have no work left. Level 1 keeps the weights in host memory, level 2
        nothing but the engine itself; from 1 it may go on to 2. No-op at the level it
        has already. `on_phase` hears `free_kv_cache`, then `free_weights`. Raises
        `CommandRejected` where that cannot be (nothing is changed then) and
        `ReleaseIncomplete` if memory was not given back: release the engine then.
        """
        self.check_sleep(level)
        if level == self.sleep_level:
            return Moved()
        if self.has_work:
            raise CommandRejected("it has requests: abort them before it sleeps")
        self.world.enter()
        was_awake = self.sleep_level == 0
        if was_awake:
            on_phase("free_kv_cache")
            # What the caches know of is about to go, prefixes and images included.
            self.core.pause_scheduler("abort", clear_cache=True)
            self._backend.discard((sleep.KV_CACHE,))
        on_phase("free_weights")
        before = self._device.memory()[0]
        self._backend.suspend(level)
        if level == 2:
            self._device.empty_cache()
        self._prove_asleep(before)
        return self._backend.moved

    def _prove_asleep(self, before: int) -> None:
        """Raise `ReleaseIncomplete` unless the memory is back, of which the device had
        `before` bytes in use."""
        name = f"{self.world.identity} asleep at level {self.sleep_level}"
        if held := self._backend.held():
            raise ReleaseIncomplete(f"{name} still holds {held}", phase="free_weights")
        after = self._device.memory()[0]
        freed = self._backend.num_freed_bytes()
        ledger.require_fall(before, after, freed, name, "free_weights")

    def wake_up(self, on_phase: OnPhase) -> Moved:
        """Have its memory again and be ready to step; returns what was brought back,
        from the host or its files. No-op for an engine that is awake.

        Blocks while weights are read (level 2). `on_phase` hears `read_weights`,
        `restore_kv_cache`, `resume`. An error leaves it unfit: release it.
        """
        if (level := self.sleep_level) == 0:
            return Moved()
        self.world.enter()
        on_phase("read_weights")
        self._backend.resume([sleep.WEIGHTS])
        moved = self._backend.moved
        on_phase("restore_kv_cache")
        self._backend.resume([sleep.KV_CACHE])
        moved += self._backend.moved
        on_phase("resume")
        self.core.resume_scheduler()
        if level == 2:
            # What reading left over.
            self._device.empty_cache()
            # Not copied but read: no rate of the link's.
            moved = Moved(moved.num_bytes + self._backend.num_weight_bytes)
        return moved

    def release(self, *, orderly: bool = False) -> None:
        """Destroy the engine and its world and give everything back; `orderly` where
        its other ranks do so now and nothing is in flight (`World.close`).

        Raises `ReleaseIncomplete` if a part of the model is still reachable afterwards,
        or the memory that it had is not back.
        """
        if self.released:
            return
        self.released = True
        _engines.discard(self)
        self.world.enter()
        before, held = self._device.memory()[0], self._num_held_bytes()
        llm, core = self.llm, self.core
        try:
            core.shutdown()
        # Raised again: after it, nothing of the world may be used again.
        except BaseException:
            orderly = False
            raise
        finally:
            del self.llm, self._backend, llm, core
            self._layers.forget_calls()
            self.world.close(orderly=orderly)
            _collect(self._device)
            _give_back(self._device, self._held)
        if complaint := self._layers.complaint():
            raise ReleaseIncomplete(
                f"of {self.world.identity} {complaint}", phase="release"
            )
        _freeze_what_stays()
        after = self._device.memory()[0]
        ledger.require_fall(before, after, held, self.world.identity, "release")

    def _num_held_bytes(self) -> int:
        """Of the device's memory now, at least."""
        if self._device.type != "cpu":
            return self.memory().device_bytes
        # Which of the KV cache's pages there are depends on what was asked.
        return self._backend.num_weight_bytes if self.sleep_level < 2 else 0


def abandon(error: BaseException | None, world: World, device: Device) -> None:
    """Give back what a build that ended in `error` left: the half-built engine, which
    only the locals of the error's frames still hold, and the world."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    held = holdings.Holdings()
    if not world.closed:
        world.enter()
        held = holdings.current
    try:
        world.close()
    finally:
        _collect(device)
        _give_back(device, held)
    _freeze_what_stays()


def _fit(prepared: Prepared, device: Device) -> None:
    """Let the engine have its share of what the device has left; on CPU vLLM's own
    check is of what is free."""
    if device.type == "cpu":
        return
    device.empty_cache()
    used, total = device.memory()
    prepared.config.cache_config.gpu_memory_utilization = budget.utilization(
        prepared.utilization, prepared.memory, total - used, total
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Building makes 100,000 objects that stay: looking through them again and again
    while it does finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _collect(device: Device) -> None:
    """Free what only cycles hold, then give free memory back to the device."""
    gc.collect()
    device.empty_cache()


def _freeze_what_stays() -> None:
    """What is left when no engine is are modules and caches that stay: with the heap of
    the imports (`boot`) they are frozen, so that the next collection looks at engines
    alone. Now and then at all: what became garbage after it was frozen is found by no
    other."""
    if _engines:
        return
    if next(_freezes) % THOROUGH_EVERY == 0:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def _give_back(device: Device, held: holdings.Holdings) -> None:
    """Let go of what held a gone engine's memory; with the last engine, of the host
    memory that was pinned for sleepers."""
    sleep.release(device, held)
    if not _engines:
        allocator.trim(device)


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
