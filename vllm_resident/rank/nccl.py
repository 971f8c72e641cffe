"""vLLM's own NCCL communicators, so that `groups` can keep them as it keeps torch's.

Beside torch's group vLLM makes one over each group of several ranks whose data is on
CUDA devices (0.32.0, distributed/device_communicators/pynccl.py), and puts it into an
object of its own. Here it is told apart from that object: it can outlive it and be put
into another. To `process_groups` it looks like a process group, as far as that asks.
"""

from __future__ import annotations

import copy
import threading
import weakref
from datetime import timedelta
from typing import Any

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

# In the place of a backend of torch's.
BACKEND = "vllm-nccl"

# vLLM's own; `hooks` puts others in their place.
_make = PyNcclCommunicator.__init__
_destroy = PyNcclCommunicator.destroy

# By the object that each is in, which must not be held by it in turn.
_by_owner: weakref.WeakKeyDictionary[PyNcclCommunicator, NcclCommunicator] = (
    weakref.WeakKeyDictionary()
)


def of_coordinator(group: Any) -> PyNcclCommunicator | None:
    """The one that vLLM made for a group coordinator, if it did."""
    communicator = getattr(group, "device_communicator", None)
    found: PyNcclCommunicator | None = getattr(communicator, "pynccl_comm", None)
    return found


def make(owner: PyNcclCommunicator, *args: Any) -> NcclCommunicator | None:
    """In the place of vLLM's `__init__`; what is in the object then, if anything is."""
    _make(owner, *args)
    return NcclCommunicator(owner) if owner.available else None


def destroy(owner: PyNcclCommunicator) -> None:
    """In the place of vLLM's `destroy`; any thread, more than once. Waits up to 5 s for
    CUDA graphs that have it in them to go."""
    if (communicator := _by_owner.get(owner)) is not None:
        communicator.abort()
    owner.available, owner.disabled = False, True


class NcclCommunicator:
    """One that exists: in an object of vLLM's, its owner, or kept by itself."""

    def __init__(self, owner: PyNcclCommunicator) -> None:
        # An owner of its own, without the group, which is none of its business.
        self._own = copy.copy(owner)
        self._own.group = None
        self._is_over = False
        # Between the thread that aborts and the main one.
        self._lock = threading.Lock()
        self.is_kept = False
        _by_owner[owner] = self

    def detach(self, owner: PyNcclCommunicator) -> bool:
        """Take it out of its owner, which is as after `destroy`; False if it is not
        there to be kept: its memory is suspended, or it was aborted."""
        with self._lock:
            if self._is_over or getattr(owner, "_suspended", False):
                return False
            owner.available, owner.disabled = False, True
            _by_owner.pop(owner, None)
            self.is_kept = True
        return True

    def attach(self, owner: PyNcclCommunicator, group: Any) -> None:
        """Put it into an object whose `__init__` was not run, over such a group."""
        with self._lock:
            vars(owner).update(vars(self._own))
            owner.group = group
            self.is_kept = False
            _by_owner[owner] = self

    # ------------------------------------------------------- like a process group

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(self._own.device.type)]

    def _get_backend(self, _device: torch.device) -> NcclCommunicator:
        return self

    def _get_sequence_number_for_group(self) -> int:
        return 1  # its making ends with a collective

    def allreduce(self, tensors: list[torch.Tensor]) -> _Work:
        """On a stream of its own: one that does not end holds up no other."""
        (value,) = tensors
        stream = side_stream(value)
        self._own.all_reduce(value, value, stream=stream)
        return _Work(stream.record_event())

    def abort(self) -> None:
        """End it, once; any thread."""
        with self._lock:
            is_over, self._is_over = self._is_over, True
        if not is_over:
            _destroy(self._own)


class _Work:
    """What torch's `Work` says, of a collective that ends at this event."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def is_completed(self) -> bool:
        return bool(self._event.query())

    def wait(self, _timeout: timedelta = timedelta(0)) -> bool:
        self._event.synchronize()
        return True


def side_stream(value: torch.Tensor) -> Any:
    """A new stream that has seen what made `value`, which it may be used on."""
    stream = torch.cuda.Stream(value.device)
    stream.wait_stream(torch.cuda.current_stream(value.device))
    value.record_stream(stream)
    return stream
