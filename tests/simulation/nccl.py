"""SIMULATION of the NCCL library as vLLM calls it (`PyNcclCommunicator`), on CPU.

`install(store)` puts it in the place of the shared library and of CUDA's streams. Its
communicators are those of `backend`: they cost as much, are collective, can break, and
are counted among them. vLLM's own class goes round it, unchanged; a device communicator
that uses it as CUDA's does is `DEVICE_COMMUNICATOR`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.device_communicators.base_device_communicator import (
    DeviceCommunicatorBase,
)

from tests.simulation.backend import SimulatedGroup, SimulatedWork
from vllm_resident.rank import nccl

DEVICE_COMMUNICATOR = "tests.simulation.nccl.SimulatedCommunicator"
_TIMEOUT = timedelta(seconds=60)
_FLOAT32 = pynccl.ncclDataTypeEnum.ncclFloat32


@dataclass
class Counts:
    """In this process: communicators made, and collectives begun beside the main
    stream."""

    made: int = 0
    beside: int = 0


counts = Counts()
_groups: dict[int, SimulatedGroup] = {}


class SimulatedStream:
    """One beside the main stream, number 0: knows the last operation begun on it."""

    _numbers = itertools.count(1)
    by_number: ClassVar[dict[int, SimulatedStream]] = {}

    def __init__(self, _value: torch.Tensor) -> None:
        self.cuda_stream = next(self._numbers)
        self.by_number[self.cuda_stream] = self
        self.last: SimulatedWork | None = None

    def synchronize(self) -> None:
        assert self.last is not None
        self.last.wait()

    def query(self) -> bool:
        assert self.last is not None
        return self.last.is_completed()

    def record_event(self) -> SimulatedStream:
        del self.by_number[self.cuda_stream]  # nothing more is begun on it
        return self


class SimulatedLibrary:
    """What vLLM asks of `NCCLLibrary`."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def ncclGetVersion(self) -> str:  # noqa: N802 (vLLM's)
        return "simulated"

    def ncclGetRawVersion(self) -> int:  # noqa: N802
        return 22907

    def has_symbol(self, _name: str) -> bool:
        return True

    def ncclGetUniqueId(self) -> pynccl.ncclUniqueId:  # noqa: N802
        unique = pynccl.ncclUniqueId()
        for place, byte in enumerate(os.urandom(16)):
            unique.internal[place] = byte
        return unique

    def ncclCommInitRank(  # noqa: N802
        self, size: int, unique: pynccl.ncclUniqueId, rank: int
    ) -> int:
        prefix = bytes(each & 0xFF for each in unique.internal[:16]).hex()
        store = dist.PrefixStore(prefix, self._store)
        counts.made += 1
        _groups[counts.made] = SimulatedGroup(
            "simulated_nccl", store, rank, size, _TIMEOUT
        )
        return counts.made

    def ncclAllReduce(  # noqa: N802
        self,
        source: Any,
        target: Any,
        num: int,
        dtype: int,
        _operation: int,
        number: int,
        stream: Any,
    ) -> None:
        assert dtype == _FLOAT32
        result = _tensor(target, num).copy_(_tensor(source, num))
        work = _groups[number].allreduce([result])
        if (side := SimulatedStream.by_number.get(stream.value)) is not None:
            side.last = work
            counts.beside += 1
        else:
            # The caller may free its tensors now, as it may in a stream's order.
            work.wait()

    def ncclCommSuspend(self, number: int, _flags: int) -> None:  # noqa: N802
        assert number in _groups

    def ncclCommAbort(self, number: int) -> None:  # noqa: N802
        _groups.pop(number).abort()


class SimulatedCommunicator(DeviceCommunicatorBase):
    """As vLLM's `CudaCommunicator`, as far as NCCL is concerned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pynccl_comm: pynccl.PyNcclCommunicator | None = None
        if self.world_size > 1:
            self.pynccl_comm = pynccl.PyNcclCommunicator(self.cpu_group, self.device)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        assert self.pynccl_comm is not None
        return self.pynccl_comm.all_reduce(input_)

    def destroy(self) -> None:
        if self.pynccl_comm is not None:
            self.pynccl_comm.destroy()
            self.pynccl_comm = None


def install(store: dist.Store) -> None:
    """Once per process, before vLLM makes its groups; `store` reaches all of them."""
    main = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    pynccl.NCCLLibrary = lambda _path=None: SimulatedLibrary(store)
    pynccl.current_stream = lambda: main
    nccl.side_stream = SimulatedStream


def num_open() -> int:
    """The communicators of this process that nobody has aborted."""
    return len(_groups)


def break_one(communicator: nccl.NcclCommunicator) -> None:
    """Let this member's collectives on it fail, as over a broken link."""
    _groups[communicator._own.comm]._aborted.set()


def _tensor(pointer: Any, num: int) -> torch.Tensor:
    floats = (ctypes.c_float * num).from_address(pointer.value)
    return torch.frombuffer(floats, dtype=torch.float32)
