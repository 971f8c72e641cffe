"""SIMULATION of a device's collective library as a torch.distributed backend, on CPU.

`install("hccl")` registers one under that name, and `install("simulated_nccl")` a
look-alike of NCCL, whose own name torch keeps for itself (they differ in how they are
aborted): the data goes over loopback
sockets, but making a communicator costs what it is told to, in seconds and in memory,
one after the other in a process and only once all members have come; a peer that is
gone or hangs is not noticed until the time-out or an `abort`, as on a device; and what
is open is counted. It is nobody's default: a test installs it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# JSON of `Settings`, for processes that a test does not start itself.
VARIABLE = "VLLM_RESIDENT_TEST_SIMULATION"
_HEADER = struct.Struct("<QIQ")
_POLL_S = 0.2

log = logging.getLogger("tests.simulation")


@dataclass
class Settings:
    """What a communicator costs, and what is to go wrong: `fault` ("die" or "hang")
    happens inside the collective number `at`, counted from 1, of this process; just
    before, `on_fault` is called."""

    creation_s: float = 0.33
    num_bytes: int = 0
    fault: str = ""
    at: int = 0
    on_fault: Callable[[], None] = lambda: None


class Aborted(RuntimeError):
    """A collective of the simulation was aborted, or ran into its time-out."""


settings = Settings()
_creating = threading.Lock()
_open: dict[int, str] = {}
_num_made = 0
_num_collectives = 0


def install(name: str, **how: Any) -> None:
    """Register the simulation as torch.distributed's backend `name`, for CPU tensors;
    once per name and process. `how` are `Settings`."""
    global settings
    settings = Settings(**{**json.loads(os.environ.get(VARIABLE, "{}")), **how})
    log.warning("SIMULATED backend %r: no device is there", name)

    def create(options: Any, _backend_options: Any) -> SimulatedGroup:
        return SimulatedGroup(
            name, options.store, options.group_rank, options.group_size, options.timeout
        )

    dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu"])


def num_open() -> int:
    """The communicators of this process that nobody has shut down or aborted."""
    return len(_open)


def num_made() -> int:
    return _num_made


class SimulatedWork(dist.Work):
    """An operation on a communicator's own thread, as on a device's stream."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__()
        self._what = what
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._error: Exception | None = None

    def finish(self, error: Exception | None = None) -> None:
        self._error = error
        self._done.set()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if not self._done.wait(timeout.total_seconds() or self._timeout_s + 1):
            raise Aborted(f"{self._what} did not end in time")
        if self._error is not None:
            raise self._error
        return True


class SimulatedGroup(dist.ProcessGroup):
    """One communicator of the simulation."""

    def __init__(
        self, kind: str, store: Any, rank: int, size: int, timeout: timedelta
    ) -> None:
        super().__init__(rank, size)
        self._kind = f"simulated {kind.removeprefix('simulated_')}"
        self._rank, self._size = rank, size
        self._timeout_s = timeout.total_seconds()
        self._sequence = 0
        self._name = self._description = ""
        self._aborted = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._peers: dict[int, socket.socket] = {}
        self._buffers: dict[int, bytearray] = {}
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        global _num_made
        with _creating:
            since = time.monotonic()
            self._meet(store)
            time.sleep(max(0.0, settings.creation_s - (time.monotonic() - since)))
            self._memory = torch.ones(settings.num_bytes, dtype=torch.uint8)
            _num_made += 1
        _open[id(self)] = self._kind
        self._thread = threading.Thread(
            target=_run, args=(self._work,), name="simulation", daemon=True
        )
        self._thread.start()

    def _meet(self, store: Any) -> None:
        """Connect each member with each: the lower listens, the higher connects."""
        with socket.create_server(("127.0.0.1", 0), backlog=self._size) as server:
            server.settimeout(self._timeout_s)
            store.set(f"simulation/{self._rank}", str(server.getsockname()[1]))
            for peer in range(self._rank):
                port = int(store.get(f"simulation/{peer}"))
                link = socket.create_connection(("127.0.0.1", port), self._timeout_s)
                link.sendall(struct.pack("<I", self._rank))
                self._peers[peer] = link
            for _ in range(self._rank + 1, self._size):
                link, _ = server.accept()
                link.settimeout(self._timeout_s)
                peer = struct.unpack("<I", link.recv(4, socket.MSG_WAITALL))[0]
                self._peers[peer] = link
        for peer, link in self._peers.items():
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._buffers[peer] = bytearray()

    # ------------------------------------------------------------ what torch asks

    def getBackendName(self) -> str:  # noqa: N802 (torch's)
        return self._kind

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, _device: torch.device) -> SimulatedGroup:
        return self

    # torch keeps these in a group's backends, of which this one has none.

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def supports_splitting(self) -> bool:
        return False

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def abort(self) -> None:
        """As NCCL's; HCCL has none of this name."""
        if self._kind.endswith("hccl"):
            raise RuntimeError("simulated hccl does not support abort")
        self._abort()

    def abort_hccl_comm(self, _reason: str) -> None:
        if self._kind.endswith("hccl"):
            self._abort()

    def _abort(self) -> None:
        """Everything in flight fails now, on any thread; may be called twice."""
        self._aborted.set()
        with contextlib.suppress(OSError):
            self._wake.send(b"!")
        self._end()

    def shutdown(self) -> None:
        self._abort()

    def _end(self) -> None:
        if _open.pop(id(self), None) is None:
            return
        self._work.put(None)
        self._thread.join(_POLL_S * 10)
        for link in (*self._peers.values(), self._wake, self._woken):
            link.close()
        self._memory = torch.empty(0)

    # ------------------------------------------------------------ collectives

    def allreduce(self, tensors: Any, opts: Any = None) -> SimulatedWork:
        operation = getattr(opts, "reduceOp", None) or dist.ReduceOp.SUM

        def run(work: SimulatedWork) -> None:
            for tensor in _as_list(tensors):
                tensor.copy_(_reduce(self._all_gather(tensor, work), operation))

        return self._submit("allreduce", run)

    def reduce(self, tensors: Any, opts: Any) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            for tensor in tensors:
                result = _reduce(self._all_gather(tensor, work), opts.reduceOp)
                if self._rank == opts.rootRank:
                    tensor.copy_(result)

        return self._submit("reduce", run)

    def broadcast(self, tensors: Any, opts: Any) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            for tensor in _as_list(tensors):
                tensor.copy_(self._all_gather(tensor, work)[opts.rootRank])

        return self._submit("broadcast", run)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            for each, tensor in zip(outputs, inputs, strict=True):
                for place, found in zip(
                    each, self._all_gather(tensor, work), strict=True
                ):
                    place.copy_(found.reshape(place.shape))

        return self._submit("allgather", run)

    def _allgather_base(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            parts = [each.flatten() for each in self._all_gather(tensor, work)]
            output.copy_(torch.cat(parts).reshape(output.shape))

        return self._submit("allgather", run)

    all_gather_single = _allgather_base

    def _reduce_scatter_base(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> SimulatedWork:
        operation = getattr(opts, "reduceOp", None) or dist.ReduceOp.SUM

        def run(work: SimulatedWork) -> None:
            whole = _reduce(self._all_gather(tensor, work), operation).flatten()
            output.copy_(whole.chunk(self._size)[self._rank].reshape(output.shape))

        return self._submit("reduce_scatter", run)

    reduce_scatter_single = _reduce_scatter_base

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            found = self._all_gather(inputs[0], work)
            if self._rank == opts.rootRank:
                for place, each in zip(outputs[0], found, strict=True):
                    place.copy_(each)

        return self._submit("gather", run)

    def barrier(self, opts: Any = None) -> SimulatedWork:
        nothing = torch.zeros(1)

        def run(work: SimulatedWork) -> None:
            self._all_gather(nothing, work)

        return self._submit("barrier", run)

    def send(self, tensors: Any, peer: int, tag: int = 0) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            for tensor in tensors:
                self._exchange({peer: _bytes(tensor)}, set(), work)

        return self._submit("send", run)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> SimulatedWork:
        def run(work: SimulatedWork) -> None:
            for tensor in tensors:
                found = self._exchange({}, {peer}, work)[peer]
                tensor.copy_(_tensor(found, tensor))

        return self._submit("recv", run)

    # ------------------------------------------------------------ how they are done

    def _submit(self, what: str, run: Callable[[SimulatedWork], None]) -> SimulatedWork:
        work = SimulatedWork(f"{self._kind} {what}", self._timeout_s)
        if self._aborted.is_set():
            work.finish(Aborted(f"{self._kind} communicator is aborted"))
            return work
        self._sequence += 1
        self._work.put((self._carry_out, run, work))
        return work

    def _carry_out(
        self, run: Callable[[SimulatedWork], None], work: SimulatedWork
    ) -> None:
        self._meet_fault()
        run(work)

    def _meet_fault(self) -> None:
        global _num_collectives
        _num_collectives += 1
        if settings.at != _num_collectives:
            return
        settings.on_fault()
        if settings.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.fault == "hang":
            self._aborted.wait()
            raise Aborted(f"{self._kind} hung, then was aborted")

    def _all_gather(
        self, tensor: torch.Tensor, work: SimulatedWork
    ) -> list[torch.Tensor]:
        mine = _bytes(tensor)
        peers = self._peers.keys()
        found = self._exchange(dict.fromkeys(peers, mine), set(peers), work)
        found[self._rank] = mine
        return [_tensor(found[rank], tensor) for rank in range(self._size)]

    def _exchange(
        self, outgoing: dict[int, bytes], expected: set[int], work: SimulatedWork
    ) -> dict[int, bytes]:
        """Send these and receive from those, side by side. A peer that has closed its
        end is as silent as one that hangs: only the time-out or an abort ends it."""
        number = self._sequence
        left = {
            peer: memoryview(_HEADER.pack(number, 0, len(data)) + data)
            for peer, data in outgoing.items()
        }
        found: dict[int, bytes] = {}
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._woken, selectors.EVENT_READ)
            for peer in {*left, *expected}:
                ready.register(
                    self._peers[peer],
                    selectors.EVENT_READ
                    | (selectors.EVENT_WRITE if peer in left else 0),
                    peer,
                )
            while True:
                for peer in expected - found.keys():
                    if (data := self._message(peer)) is not None:
                        found[peer] = data
                if not left and expected == found.keys():
                    return found
                self._check(deadline, work)
                for key, events in ready.select(_POLL_S):
                    if key.data is not None:
                        self._move(ready, key.data, events, left)

    def _check(self, deadline: float, work: SimulatedWork) -> None:
        if self._aborted.is_set():
            raise Aborted(f"{work._what} was aborted")
        if time.monotonic() > deadline:
            # As a device's watchdog does: the communicator is of no use any more.
            self._aborted.set()
            raise Aborted(f"{work._what} did not end in {self._timeout_s:g} s")

    def _move(
        self,
        ready: selectors.BaseSelector,
        peer: int,
        events: int,
        left: dict[int, memoryview],
    ) -> None:
        link = self._peers[peer]
        try:
            if events & selectors.EVENT_WRITE:
                left[peer] = left[peer][link.send(left[peer]) :]
                if not left[peer]:
                    del left[peer]
                    ready.modify(link, selectors.EVENT_READ, peer)
            if events & selectors.EVENT_READ:
                data = link.recv(1 << 20)
                if not data:
                    raise ConnectionResetError
                self._buffers[peer] += data
        except BlockingIOError:
            return
        except OSError:
            ready.unregister(link)

    def _message(self, peer: int) -> bytes | None:
        buffer = self._buffers[peer]
        if len(buffer) < _HEADER.size:
            return None
        _, _, length = _HEADER.unpack_from(buffer)
        end = _HEADER.size + length
        if len(buffer) < end:
            return None
        data = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        return data


def _run(work: queue.SimpleQueue[Any]) -> None:
    while (item := work.get()) is not None:
        carry_out, run, handle = item
        try:
            carry_out(run, handle)
        # It is the waiting thread's to handle.
        except Exception as error:  # noqa: BLE001
            handle.finish(error)
        else:
            handle.finish()
        del item, carry_out, run, handle


def _as_list(tensors: Any) -> list[torch.Tensor]:
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, like: torch.Tensor) -> torch.Tensor:
    if not data:
        return torch.empty_like(like)
    flat = torch.frombuffer(bytearray(data), dtype=like.dtype)
    return flat.reshape(like.shape)


def _reduce(parts: list[torch.Tensor], operation: Any) -> torch.Tensor:
    """In the order of ranks, so that all get the same."""
    result = parts[0].clone()
    for part in parts[1:]:
        if operation == dist.ReduceOp.MAX:
            result = torch.maximum(result, part)
        elif operation == dist.ReduceOp.MIN:
            result = torch.minimum(result, part)
        elif operation == dist.ReduceOp.PRODUCT:
            result = result * part
        else:
            result = result + part
    return result
