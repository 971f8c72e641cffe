"""Form, enter, leave and close one world: the distributed state of one engine here.

torch.distributed allows one default group at a time, and vLLM enters one
`ParallelState` at a time (patches/, parallel-state). A `World` owns one of each and
swaps them in, so that several engines with different layouts live in one process. Ranks
are 0..n-1 *inside* the world: vLLM sees a world of exactly its own size. This module
knows nothing of engines and, with `store`, is the only one that touches
torch.distributed and vLLM's parallel state.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.distributed import distributed_c10d as c10d
from vllm.distributed import parallel_state

from vllm_resident.errors import RankTimeout
from vllm_resident.rank import ambient, mapping
from vllm_resident.rank.store import CancellableStore

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
    worlds = [world() for world in list(_worlds.values())]
    return sum(len(world._c10d.pg_map) for world in worlds if world is not None)


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
        digest = hashlib.blake2b(identity.encode(), digest_size=5).digest()
        first_name = int.from_bytes(digest, "big") * _NAMES_PER_WORLD
        self._c10d = _PrivateWorld(first_name)
        self._c10d_values = {**_C10D_PRISTINE, "_world": self._c10d}
        self._parallel = parallel_state.ParallelState()
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
    ) -> World:
        """Form the world together with its other `size - 1` ranks; blocks.

        `identity` must be new and the same on all of them; it prefixes the store's keys
        and seeds the groups' names. `owner` is this machine's `shm.owner_token`; with
        the identity it names the world's shared memory. `timeout_s` bounds the meeting
        and the default group's collectives; vLLM gives its own groups the engine's
        `distributed_timeout_seconds`, or torch's default. `on_start` is given the world
        before the first wait, so that another thread can `abort` it. Raises
        `RankTimeout` naming the ranks that did not come, `StoreCancelled` when aborted;
        either way nothing is left but, of the former, one key in the store. The world
        is entered when this returns.
        """
        cancellable = CancellableStore(store, identity, timeout_s)
        world = cls(identity, rank, size, local_rank, owner, cancellable)
        on_start(world)
        try:
            world._meet(timeout_s)
            world.enter()
            world._init_default_group(backend, timeout_s)
        except RankTimeout:
            # Nothing was entered. The key in the store stays: the others, whose waits
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
            )
        finally:
            # init_process_group wraps the hook anew each time (torch 2.13): over many
            # worlds that is a leak and an ever longer prefix.
            sys.excepthook = hook

    def _meet(self, timeout_s: float) -> None:
        """Wait until every rank is about to form the world, and say which is not."""
        keys = [f"meet/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], b"1")
        try:
            self.store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            absent = [r for r, key in enumerate(keys) if not self.store.check([key])]
            raise RankTimeout(
                f"ranks {absent} of world {self.identity} did not come to form it "
                f"within {timeout_s:g} s"
            ) from error

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
        self._parallel.enter()
        ambient.restore(self._ambient)
        World._entered = self

    def leave(self) -> None:
        """Put the process's own state back; keep this world's for the next `enter`."""
        if World._entered is not self:
            return
        self._c10d_values = {name: getattr(c10d, name) for name in _C10D_PRISTINE}
        self._parallel.leave()
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

    def abort(self) -> None:
        """Make waits in the store and collectives in flight fail, from any thread; the
        world must be closed afterwards. Gloo cannot abort (torch 2.13): its collectives
        fail when a peer closes the world. The CPU's shared-memory collectives spin on.
        """
        self.store.cancel()
        for group in list(self._c10d.pg_map):
            with suppress(RuntimeError):
                group.abort()

    def close(self) -> None:
        """Destroy the groups and give back what they held. May be called twice.

        Not collective: a rank may close alone, its peers' collectives then fail (with
        gloo, which cannot be shut down, once nothing holds the groups any more).
        """
        if self.closed:
            return
        self.enter()
        groups = list(self._c10d.pg_map)
        try:
            self._untie_groups()
            self._parallel.close()
        finally:
            self._destroy_groups()
            _let_go(groups)
            self._step_out()
            self.closed = True
            self._c10d_values = {}
            del self._ambient
            # The launcher, whose store it is, may be gone already.
            with suppress(dist.DistError):
                self.store.delete_written()
            mapping.release_shared(self.segment_token)

    def _untie_groups(self) -> None:
        """Break the cycle that vLLM's CPU communicator makes round its groups (0.32.0,
        distributed/device_communicators/cpu_communicator.py): their sockets and threads
        would stay until a garbage collection."""
        for group in vars(parallel_state).values():
            communicator = getattr(group, "device_communicator", None)
            if hasattr(communicator, "dist_module"):
                del communicator.dist_module

    def _destroy_groups(self) -> None:
        """Shut down the groups still registered, by name, newest first.

        `destroy_process_group()` would do this too, but it also clears the process-wide
        C++ registry, in which other live worlds have their groups (torch 2.13).
        """
        names = self._c10d.pg_names
        for group in sorted(names, key=lambda each: names[each], reverse=True):
            with suppress(RuntimeError):
                group.shutdown()
            with suppress(RuntimeError):
                torch._C._distributed_c10d._unregister_process_group(group.group_name)
        for entries in self._c10d._maps.values():
            entries.clear()
        self._c10d.pg_coalesce_state.clear()
        self._c10d.default_pg = None

    def __enter__(self) -> World:
        self.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.leave()


def _let_go(groups: list[dist.ProcessGroup]) -> None:
    """Drop the last references side by side and empty the list: the end of a gloo group
    joins a thread that looks up every 10 ms (torch 2.13, gloo/transport/tcp/loop.cc),
    with the GIL released."""
    # Not `map`: its arguments would hold them.
    with ThreadPoolExecutor(max(len(groups), 1)) as threads:
        while groups:
            threads.submit([groups.pop()].clear)


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
