"""The little that differs between cpu, cuda and npu; nothing else asks which it is.

`detect` and `core_set` run before torch is imported (thread pools read the process's
affinity once, at import); the methods of `Device` import torch when they are called.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from vllm_resident.rank.communicators import DEFAULT_BUDGET, Budget

# Read at import, which comes before `bind_cores`.
_ALLOWED_CORES = sorted(os.sched_getaffinity(0))

# glibc's; other libraries of C have none. Looked up once: each look-up leaves a cycle.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
# Where vLLM's worker for the device is (0.32.0, platforms/; vllm-ascend 0.23.0).
_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker",
    "cuda": "vllm.v1.worker.gpu_worker",
    "npu": "vllm_ascend.worker.worker",
}


# By device type, what must be so in the environment before torch is imported. NCCL: a
# collective that fails or runs into its time-out ends its communicator (2), not the
# process, in which other engines live; torch's own default (3) and the one that
# torchrun gives its workers (1, elastic/agent/server/local_elastic_agent.py) end that.
# What is stuck beyond it the control thread ends, by its own deadlines.
_ENVIRONMENT = {"cuda": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}}


@dataclass(frozen=True)
class Device:
    """The device one rank owns. `type` is torch's name, `index` the local rank."""

    type: str
    index: int

    @property
    def name(self) -> str:
        return "cpu" if self.type == "cpu" else f"{self.type}:{self.index}"

    @property
    def backend(self) -> str:
        """The torch.distributed backend of this device type."""
        return _BACKENDS[self.type]

    @property
    def worker_module(self) -> str:
        """The module vLLM's worker for this device type is in."""
        return _WORKERS[self.type]

    @property
    def communicator_budget(self) -> Budget:
        """What a rank keeps of closed worlds if nobody says. On CPU nothing: gloo's
        take milliseconds to make, and hold descriptors and threads."""
        return Budget() if self.type == "cpu" else DEFAULT_BUDGET

    def bound(self) -> Any:
        """As a `torch.device` to bind a world's groups to; None on CPU."""
        if self.type == "cpu":
            return None
        import torch

        return torch.device(self.type, self.index)

    def activate(self) -> None:
        """Make this the current device of the process; call once, after torch."""
        if self.type != "cpu":
            self._module().set_device(self.index)

    def memory(self) -> tuple[int, int]:
        """(used, total) bytes: of the device, or this process's resident set and the
        machine's memory on CPU. Cheap enough for every heartbeat."""
        if self.type == "cpu":
            return _resident_bytes(), _machine_bytes()
        free, total = self._module().mem_get_info(self.index)
        return total - free, total

    def free_bytes(self) -> int:
        """What the device has left now."""
        used, total = self.memory()
        return total - used

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.type != "cpu":
            self._module().synchronize()

    def empty_cache(self) -> None:
        """Give freed memory back to the device (to the kernel on CPU, where the
        allocator otherwise keeps it and resident memory creeps over many loads)."""
        if self.type != "cpu":
            self._module().empty_cache()
        elif _malloc_trim is not None:
            _malloc_trim(0)

    def _module(self):  # type: ignore[no-untyped-def]
        import torch

        return getattr(torch, self.type)


def detect(local_rank: int) -> Device:
    """The device of this rank, told without importing torch."""
    if Path("/dev/davinci_manager").exists():
        return Device("npu", local_rank)
    cpu_build = importlib.metadata.version("torch").endswith("+cpu")
    if not cpu_build and Path("/dev/nvidiactl").exists():
        return Device("cuda", local_rank)
    return Device("cpu", local_rank)


def core_set(local_rank: int, local_world_size: int) -> list[int]:
    """The cores of one of `local_world_size` ranks: an even, contiguous share of those
    this process may use. With more ranks than cores, ranks share cores in turn."""
    cores = _ALLOWED_CORES
    if local_world_size > len(cores):
        return [cores[local_rank % len(cores)]]
    first = local_rank * len(cores) // local_world_size
    last = (local_rank + 1) * len(cores) // local_world_size
    return cores[first:last]


def bind_cores(cores: list[int]) -> None:
    """Keep this process and its OpenMP threads on `cores`; call before torch.

    Two CPU ranks that spin on each other's cores run hundreds of times slower than
    ranks with cores of their own, and torchrun's OMP_NUM_THREADS=1 would leave the
    others of a larger share idle.
    """
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))


def roam() -> None:
    """Let the calling thread run on any core the process was started with.

    For threads that move messages: on the rank's own core they would wait for the very
    computation that waits for their message.
    """
    os.sched_setaffinity(0, _ALLOWED_CORES)


@contextmanager
def roaming() -> Iterator[None]:
    """The same for a while, for processes that are started meanwhile."""
    cores = os.sched_getaffinity(0)
    roam()
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def messaging_context() -> zmq.Context[Any]:
    """A ZMQ context whose I/O thread roams, for the same reason."""
    context: zmq.Context[Any] = zmq.Context()
    for core in _ALLOWED_CORES:
        context.set(zmq.THREAD_AFFINITY_CPU_ADD, core)
    return context


def pinnable_bytes() -> int:
    """How much host memory this rank may pin for engines that sleep: its share of half
    of what the machine, or the container, has."""
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_machine_bytes(), _container_bytes()) // 2 // num_ranks


def prepare_process(local_rank: int, local_world_size: int) -> Device:
    """Detect the device and set what must be set before torch and vLLM are imported."""
    device = detect(local_rank)
    if device.type == "cpu":
        bind_cores(core_set(local_rank, local_world_size))
    # External launchers need the engine core in this process (vllm 0.32.0,
    # v1/executor/uniproc_executor.py asserts it).
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update(_ENVIRONMENT.get(device.type, {}))
    return device


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> int:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no limit is the word "max"
        return _machine_bytes()


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
