"""Form, enter, leave and close one world: the distributed state of one engine here.

torch.distributed allows one default group at a time, and vLLM enters one
`ParallelState` at a time (patches/, parallel-state). A `World` owns one of each and
swaps them in, so that several engines with different layouts live in one process. Ranks
are 0..n-1 *inside* the world: vLLM sees a world of exactly its own size. Its groups are
made, or taken from what the rank has kept, by `groups`; what its ranks say to each
other before is said in a `meeting`; what a platform has beside vLLM's state is in
`holders`. This module knows nothing of engines; it, these, `process_groups` and `store`
are the only ones that touch torch.distributed and vLLM's parallel state.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.distributed import distributed_c10d as c10d

from vllm_resident.errors import RankTimeout
from vllm_resident.rank import ambient, hooks, mapping, nccl  # noqa: F401 (hooks)
from vllm_resident.rank.communicators import CommunicatorPool, Offer
from vllm_resident.rank.groups import Groups
from vllm_resident.rank.holders import Holders
from vllm_resident.rank.meeting import Meanwhile, Meeting
from vllm_resident.rank.process_groups import abort, let_go, unregister
from vllm_resident.rank.store import CancellableStore

# An abort from the control thread, and one that a closing world waits for.
_ABORT_PATIENCE_S = 1.0
_ABORT_S = 10.0
# Groups one world may create before its names could meet another world's.
_NAMES_PER_WORLD = 1 << 12
# What vLLM reads of the environment about its place in the world.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VLLM_DIST_IDENT")
# Every world of this process, by its object's id; also read by the control thread.
_worlds: dict[int, weakref.ref[World]] = {}


class _PrivateWorld(c10d._World):
    """c10d's state object with maps of its own.

    torch documents `distributed_c10d._world` as the point to override; the base class
    keeps its maps in module globals, which every world would share.
    """

    def __init__(self, first_name: int) -> None:
        super().__init__()
        self._maps: dict[str, Any] = {
            name: {}
            for name in (
                "pg_map",
                "pg_names",
                "pg_group_ranks",
                "pg_backend_config",
                "tags_to_pg",
                "pg_to_tag",
            )
        }
        self._group_count = first_name
        # Where its groups come from; None: torch makes and destroys them itself.
        self.groups: Groups | None = None

    pg_map = property(lambda self: self._maps["pg_map"])
    pg_names = property(lambda self: self._maps["pg_names"])
    pg_group_ranks = property(lambda self: self._maps["pg_group_ranks"])
    pg_backend_config = property(lambda self: self._maps["pg_backend_config"])
    tags_to_pg = property(lambda self: self._maps["tags_to_pg"])
    pg_to_tag = property(lambda self: self._maps["pg_to_tag"])

    @property
    def group_count(self) -> int:
        return self._group_count

    @group_count.setter
    def group_count(self, value: int) -> None:
        self._group_count = value


_C10D_PRISTINE = {
    name: getattr(c10d, name)
    for name in ("_world", "_backend", "_default_pg_init_method")
}


def _set_c10d(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(c10d, name, value)


def num_process_groups() -> int:
    """The process groups of all worlds that are alive here; any thread."""
    return sum(len(world._c10d.pg_map) for world in _alive())


def num_suspended_communicators() -> int:
    """Those of sleeping engines whose memory NCCL has given back; any thread."""
    communicators = [
        nccl.of_coordinator(group)
        for world in _alive()
        for group in world._holders.groups()
    ]
    return sum(getattr(each, "_suspended", False) for each in communicators)


def _alive() -> list[World]:
    worlds = [world() for world in list(_worlds.values())]
    return [world for world in worlds if world is not None]


class World:
    """One engine's torch.distributed and vLLM parallel state in this process.

    Make it with `World.form`. Not thread-safe: only the main thread enters and closes;
    `abort` may be called from any thread.
    """

    _entered: World | None = None
    # The process's own, while a world is entered.
    _outside: ambient.Ambient

    def __init__(
        self,
        identity: str,
        rank: int,
        size: int,
        local_rank: int,
        owner: str,
        store: CancellableStore,
    ) -> None:
        self.identity = identity
        self.store = store
        # Ends in what an identity cannot hold: "...-1" is in the names of "...-12" too.
        self.segment_token = owner + re.sub(r"[^A-Za-z0-9.-]", "-", identity) + "_"
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.closed = False
        self._meeting = Meeting(identity, rank, size, store)
        digest = hashlib.blake2b(identity.encode(), digest_size=5).digest()
        first_name = int.from_bytes(digest, "big") * _NAMES_PER_WORLD
        self._c10d = _PrivateWorld(first_name)
        self._c10d_values = {**_C10D_PRISTINE, "_world": self._c10d}
        self._holders = Holders()
        self._device: torch.device | None = None
        self._is_aborted = False
        self._aborting: threading.Thread | None = None
        # Between the thread that aborts and the one that closes.
        self._lock = threading.Lock()
        self._is_closing = False
        place = (str(rank), str(size), str(local_rank), self.segment_token)
        self._ambient = ambient.fresh(dict(zip(_PLACE, place, strict=True)))
        key = id(self)
        _worlds[key] = weakref.ref(self, lambda _: _worlds.pop(key, None))

    @classmethod
    def form(
        cls,
        *,
        identity: str,
        rank: int,
        size: int,
        local_rank: int,
        owner: str,
        store: Store,
        backend: str,
        timeout_s: float,
        on_start: Callable[[World], None] = lambda _: None,
        device: torch.device | None = None,
        members: Sequence[int] = (),
        communicators: CommunicatorPool | None = None,
        memory_used: Callable[[], int] = lambda: 0,
        meanwhile: Meanwhile | None = None,
    ) -> World:
        """Form the world together with its other `size - 1` ranks; blocks.

        `identity` must be new and the same on all of them; it prefixes the store's keys
        and seeds the groups' names. `owner` is this machine's `shm.owner_token`; with
        the identity it names the world's shared memory. `timeout_s` bounds the meeting
        and the default group's collectives; vLLM gives its own groups the engine's
        `distributed_timeout_seconds`, or torch's default. `on_start` is given the world
        before the first wait, so that another thread can `abort` it. With a `device`
        the default group is bound to it, and connected at once where its backend can.

        `communicators` is what this rank has kept; groups over the same `members` (the
        world's ranks as ranks of the pool) are taken from it, and told apart by
        `memory_used`, the device's. Until all have come, `meanwhile` is served.

        Raises `RankTimeout` naming the ranks that did not come, `StoreCancelled` when
        aborted; either way nothing is left but, of the former, some keys in the store.
        The world is entered when this returns.
        """
        cancellable = CancellableStore(store, identity, timeout_s)
        world = cls(identity, rank, size, local_rank, owner, cancellable)
        world._device = device
        if communicators is not None and communicators.budget.num:
            world._c10d.groups = Groups(
                communicators, members, world._meeting, timeout_s, memory_used
            )
        on_start(world)
        try:
            world._meet(timeout_s, meanwhile)
            world.enter()
            world._init_default_group(backend, timeout_s)
        except RankTimeout:
            # Nothing was entered. What is in the store stays: the others, whose waits
            # end now too, are about to look who is absent.
            world.closed = True
            raise
        # Closed and raised again, Ctrl-C too: nobody has the world yet.
        except BaseException:
            world.close()
            raise
        return world

    def _init_default_group(self, backend: str, timeout_s: float) -> None:
        hook = sys.excepthook
        try:
            dist.init_process_group(
                backend,
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=timeout_s),
                device_id=self._device,
            )
        finally:
            # init_process_group wraps the hook anew each time (torch 2.13): over many
            # worlds that is a leak and an ever longer prefix.
            sys.excepthook = hook

    def _meet(self, timeout_s: float, meanwhile: Meanwhile | None) -> None:
        """Wait until every rank is about to form the world, and say which is not; then
        agree on what is used again.

        In steps, because a rank that waits here for another may be what that one waits
        for in a collective of an engine that serves: until all have come each goes on
        serving, then each leader stops its followers at the same step. One that waits
        to be stopped may need the leader of another world that forms: until all are
        stopped each hears what it is asked.
        """
        deadline = time.monotonic() + timeout_s
        serve = None if meanwhile is None else meanwhile.serve
        groups = self._c10d.groups
        mine = None if groups is None else groups.offers()
        waits = meanwhile is not None and meanwhile.waits_for_leaders()
        said = self._meeting.exchange(
            "meet", (mine, waits), tuple[list[Offer] | None, bool], deadline, serve
        )
        if meanwhile is not None:
            self._meeting.hold(meanwhile, deadline)
        if any(waits for _, waits in said):
            self._meeting.exchange("held", None, None, deadline, serve)
        offers = [offers for offers, _ in said]
        # Else some rank would take what another cannot know of.
        if groups is not None and None not in offers:
            groups.agree(offers, deadline)

    def settle(self) -> None:
        """Its groups are made; any that comes later is made anew."""
        if self._c10d.groups is not None:
            self._c10d.groups.settle()

    def enter(self) -> None:
        """Make this the process's distributed state; free if it is already."""
        if World._entered is self:
            return
        if self.closed:
            raise RuntimeError(f"world {self.identity} is closed")
        if World._entered is not None:
            World._entered.leave()
        World._outside = ambient.capture()
        _set_c10d(self._c10d_values)
        self._holders.enter()
        ambient.restore(self._ambient)
        World._entered = self

    def leave(self) -> None:
        """Put the process's own state back; keep this world's for the next `enter`."""
        if World._entered is not self:
            return
        self._c10d_values = {name: getattr(c10d, name) for name in _C10D_PRISTINE}
        self._holders.leave()
        self._ambient = ambient.capture()
        self._step_out()

    @staticmethod
    def _step_out() -> None:
        _set_c10d(_C10D_PRISTINE)
        ambient.restore(World._outside)
        World._entered = None
        del World._outside

    def set_variables(self, variables: ambient.Variables) -> None:
        """Set what an engine's configuration wants in the environment, but for the
        place in the world; while the world is entered."""
        ambient.set_variables(
            {name: each for name, each in variables.items() if name not in _PLACE}
        )

    def call_off(self) -> None:
        """End every wait in the store, now and later; any thread. The world must be
        closed afterwards, and none of its groups is kept."""
        self._is_aborted = True
        self.store.cancel()
        # The main thread may be closing the world.
        if (groups := self._c10d.groups) is not None:
            groups.abort()

    def abort(self) -> None:
        """Make waits in the store and collectives in flight fail, from any thread; the
        world must be closed afterwards, and none of its groups is kept. Gloo cannot
        abort (torch 2.13): its collectives fail when a peer closes the world. The
        CPU's shared-memory collectives, and CUDA's custom all-reduce, spin on.
        """
        self.call_off()
        if (aborting := self._start_abort()) is not None:
            aborting.join(_ABORT_PATIENCE_S)

    def _start_abort(self) -> threading.Thread | None:
        """On a thread of its own: aborting NCCL can wait for CUDA graphs to go. No-op
        for a world whose groups are being destroyed."""
        with self._lock:
            is_running = self._aborting is not None and self._aborting.is_alive()
            if not (is_running or self._is_closing):
                self._aborting = threading.Thread(
                    target=self._abort_groups, name="abort", daemon=True
                )
                self._aborting.start()
            return self._aborting

    def _end_aborts(self) -> None:
        """Wait for one under way, and let none begin: the groups are about to go."""
        with self._lock:
            self._is_closing = True
            aborting = self._aborting
        if aborting is not None:
            aborting.join(_ABORT_S)

    def _abort_groups(self) -> None:
        # vLLM's own NCCL communicators; each waits up to 5 s for its abort.
        for group in list(self._holders.groups()):
            if (owner := nccl.of_coordinator(group)) is not None:
                threading.Thread(
                    target=nccl.destroy, args=(owner,), daemon=True
                ).start()
        names = dict(self._c10d.pg_names)
        groups = sorted(names, key=lambda each: names[each], reverse=True)
        with _as_one(groups):
            for group in groups:
                abort(group)

    def close(self, *, orderly: bool = False) -> None:
        """Destroy the groups and give back what they held. May be called twice.

        Not collective: a rank may close alone, its peers' collectives then fail (with
        gloo, which cannot be shut down, once nothing holds the groups any more).
        `orderly`: every rank has formed it and closes it now, none is in a collective:
        then groups may be kept for a world to come. Otherwise they are aborted.
        """
        if self.closed:
            return
        orderly = orderly and not self._is_aborted and self._is_idle()
        if not orderly:
            self._start_abort()
        self._end_aborts()
        self.enter()
        groups = list(self._c10d.pg_map)
        if (mine := self._c10d.groups) is not None:
            mine.begin_close(keep=orderly)
        try:
            self._close_handles()
            self._holders.close()
        # Raised again: what did not close in order is not kept.
        except BaseException:
            if mine is not None:
                mine.abort()
            raise
        finally:
            self._destroy_groups()
            if mine is not None and mine.end_close():
                groups.clear()
            let_go(groups)
            self._step_out()
            self.closed = True
            self._c10d_values = {}
            self._c10d.groups = None
            del self._ambient
            # The launcher, whose store it is, may be gone already.
            with suppress(dist.DistError):
                self.store.delete_written()
            mapping.release_shared(self.segment_token)

    def _is_idle(self) -> bool:
        """Wait for what was begun on the device; False if it ended in an error."""
        if self._device is None:
            return True
        try:
            torch.accelerator.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def _close_handles(self) -> None:
        """End what rests on groups before they go: memory that is mapped from other
        ranks, which vLLM leaves to its garbage (0.32.0, distributed/
        device_communicators/cuda_communicator.py); and the cycle that its CPU
        communicator makes round them (cpu_communicator.py), without which their sockets
        and threads would stay until a garbage collection."""
        for group in self._holders.groups():
            communicator = getattr(group, "device_communicator", None)
            if hasattr(communicator, "dist_module"):
                del communicator.dist_module
            for name in ("ca_comm", "qr_comm", "symm_mem_comm"):
                if (handle := getattr(communicator, name, None)) is not None:
                    getattr(handle, "close", lambda: None)()
                    setattr(communicator, name, None)
        for entries in _by_group_name():
            for name in self._c10d.pg_names.values():
                entries.pop(name, None)

    def _destroy_groups(self) -> None:
        """Shut down the groups still registered, by name, newest first, but for those
        that are kept.

        `destroy_process_group()` would do this too, but it also clears the process-wide
        C++ registry, in which other live worlds have their groups (torch 2.13).
        """
        names = dict(self._c10d.pg_names)
        for group in sorted(names, key=lambda each: names[each], reverse=True):
            if self._c10d.groups is not None and self._c10d.groups.retire(group):
                continue
            with suppress(RuntimeError):
                group.shutdown()
            unregister(group)
        for entries in self._c10d._maps.values():
            entries.clear()
        self._c10d.pg_coalesce_state.clear()
        self._c10d.default_pg = None

    def __enter__(self) -> World:
        self.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()


@contextmanager
def _as_one(groups: list[dist.ProcessGroup]) -> Iterator[None]:
    """Abort NCCL's communicators as one operation, so that they do not wait for each
    other (torch 2.13, distributed_c10d._abort_process_group)."""
    first = next((b for g in groups if (b := _nccl_backend(g)) is not None), None)
    if first is not None:
        first._group_start()
    try:
        yield
    finally:
        if first is not None:
            first._group_end()


def _nccl_backend(group: dist.ProcessGroup) -> Any:
    if not dist.is_nccl_available() or type(group) is not dist.ProcessGroup:
        return None
    with suppress(RuntimeError):
        backend = group._get_backend(torch.device("cuda"))
        if isinstance(backend, c10d.ProcessGroupNCCL):
            return backend
    return None


def _by_group_name() -> list[dict[str, Any]]:
    """What torch keeps of symmetric memory by the names of groups (torch 2.13)."""
    module = sys.modules.get("torch.distributed._symmetric_memory")
    names = ("_group_name_to_store", "_group_name_to_workspace_tensor")
    return [getattr(module, name, {}) for name in names]


def connect_store(timeout_s: float) -> dist.TCPStore:
    """A client of the launcher's long-lived store at MASTER_ADDR:MASTER_PORT.

    torchrun's agent hosts one that outlives its workers; under another launcher global
    rank 0 hosts it here.
    """
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not agent_hosts and os.environ["RANK"] == "0",
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
