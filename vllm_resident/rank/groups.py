"""The process groups of one world, made anew or taken from what the rank has kept.

c10d makes every group in one function and destroys it in another; while a world has
`Groups`, both pass through here. So vLLM's groups, the default one and an out-of-tree
platform's are all kept and used again without their knowing. Which may be is agreed
upon when a world's ranks meet (`communicators`, `world`): all of them take the same
one, or all make one. With `world`, `store` and `holders` this is the only module that
touches torch.distributed.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from vllm_resident.rank.communicators import (
    Agreement,
    Communicator,
    CommunicatorPool,
    Key,
    Offer,
    describe,
)
from vllm_resident.rank.store import CancellableStore, StoreCancelled

# A member that does not answer in this time will not: one collective of a few bytes.
CHECK_TIMEOUT_S = 10.0
_CHECK_POLL_S = 0.0002
# Read by the libraries when a communicator is made; vLLM sets the first for one engine
# (0.32.0, distributed/eplb/eplb_utils.py).
_VARIABLES = ("NCCL_MAX_CTAS", "HCCL_BUFFSIZE")
_NOT_KEPT = ("undefined", "mpi", "fake")

log = logging.getLogger("vllm_resident.rank")


class Groups:
    """The groups of one world on one rank, and where they come from and go.

    `members` are the world's ranks as ranks of the pool, `rank` is this one's place
    among them. Main thread only, but for `abort`.
    """

    def __init__(
        self,
        pool: CommunicatorPool,
        members: Sequence[int],
        rank: int,
        identity: str,
        store: CancellableStore,
        timeout_s: float,
        memory_used: Callable[[], int],
    ) -> None:
        self._pool = pool
        self.members = list(members)
        self._rank = rank
        self._identity = identity
        self._store = store
        self._timeout_s = timeout_s
        self._memory_used = memory_used
        self._agreement = Agreement()
        # Those of this world, by their process group.
        self._mine: dict[dist.ProcessGroup, Communicator] = {}
        # What the making of groups wrote, until they are kept or the world is closed.
        self._stores: list[CancellableStore] = []
        self._is_closing = False
        # Between the thread that aborts and the one that closes.
        self._lock = threading.Lock()
        self.is_broken = False

    # ------------------------------------------------------------ before there is any

    def offers(self) -> list[Offer]:
        """What this rank could use of what it has kept."""
        return [
            Offer(each.name, each.key, _has_run(each.handle))
            for each in self._pool.within(self.members)
        ]

    def settle_on(self, agreement: Agreement) -> None:
        """Groups that are made from here on come from these where they can. What is
        kept here that the others could not match serves nobody any more."""
        names = {offer.name for offer in agreement.offers}
        mine = [each.name for each in self._pool.within(self.members)]
        self._pool.discard(name for name in mine if name not in names)
        self._agreement = agreement

    def check(self, offers: Iterable[Offer], timeout_s: float) -> list[str]:
        """One small collective on each of these that is this rank's too, all at once;
        returns the names of those that failed or did not end. Every member must call
        it with the same."""
        me = self.members[self._rank]
        mine = [offer for offer in offers if me in offer.key.ranks]
        started = [self._start_check(offer) for offer in mine]
        deadline = time.monotonic() + min(CHECK_TIMEOUT_S, timeout_s)
        failed = []
        for offer, check in zip(mine, started, strict=True):
            if not _has_passed(offer, check, deadline, self._store):
                failed.append(offer.name)
                if (communicator := self._pool.find(offer.name)) is not None:
                    communicator.is_broken = True
        return failed

    def _start_check(self, offer: Offer) -> tuple[torch.Tensor, Any] | None:
        communicator = self._pool.find(offer.name)
        assert communicator is not None
        place = offer.key.ranks.index(self.members[self._rank])
        try:
            value = torch.full(
                (1,), place + 1.0, device=_device_of(communicator.handle)
            )
            return value, communicator.handle.allreduce([value])
        # Whatever a backend raises: this one is not used again.
        except Exception:  # noqa: BLE001 (told by the caller)
            return None

    # ------------------------------------------------------------ made, destroyed

    def make(
        self, original: Callable[..., Any], arguments: dict[str, Any]
    ) -> tuple[Any, Any]:
        """In the place of c10d's `_new_process_group_helper`, with its arguments."""
        places = list(arguments["global_ranks_in_group"]) or range(len(self.members))
        key = self._key(places, arguments)
        if key is None:
            return original(**arguments)
        is_member = self._rank in places
        if (offer := self._next(key)) is not None:
            if not is_member:
                return dist.GroupMember.NON_GROUP_MEMBER, None
            return self._take(offer, arguments)
        if not is_member:
            return original(**arguments)
        return self._make_new(key, original, arguments)

    def _key(self, places: Sequence[int], arguments: dict[str, Any]) -> Key | None:
        backend = str(arguments["backend"])
        options = describe(arguments.get("backend_options"))
        if options is None or backend in _NOT_KEPT or arguments.get("pg_tag"):
            return None
        parts = [options]
        if backend != "gloo":
            # Whether it is bound, not to which: that is another on each member.
            parts.append(getattr(arguments.get("device_id"), "type", "unbound"))
            parts += [str(os.environ.get(name)) for name in _VARIABLES]
        return Key(
            tuple(self.members[place] for place in places), backend, " ".join(parts)
        )

    def _next(self, key: Key) -> Offer | None:
        for offer in self._agreement.offers:
            if offer.key == key:
                self._agreement = self._agreement.without([offer.name])
                return offer
        return None

    def _take(self, offer: Offer, arguments: dict[str, Any]) -> tuple[Any, Any]:
        communicator = self._pool.take(offer.name)
        group, name = communicator.handle, arguments["group_name"]
        self._mine[group] = communicator
        self._stores.append(communicator.store)
        _set_timeout(group, arguments["timeout"])
        group._set_group_name(name)
        group._set_group_desc(arguments.get("group_desc") or "undefined")
        store = dist.PrefixStore(f"{name}/", self._store)
        _register(group, name, str(arguments["backend"]), store)
        return group, store

    def _make_new(
        self, key: Key, original: Callable[..., Any], arguments: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Its store is its own: it may outlive this world's."""
        name = f"{self._identity}/groups/{arguments['group_name']}"
        own = self._store.of_one_group(arguments["group_name"])
        self._stores.append(own)
        before = self._memory_used()
        group, _ = original(**{**arguments, "store": own})
        num_bytes = max(0, self._memory_used() - before)
        num_bytes = max(num_bytes, _declared_bytes(arguments.get("backend_options")))
        self._mine[group] = Communicator(name, key, group, num_bytes, own)
        self._pool.counts.made += 1
        # What is made later reads its store from here, if it is none of ours.
        store = dist.PrefixStore(f"{arguments['group_name']}/", self._store)
        c10d._world.pg_map[group] = (c10d._world.pg_map[group][0], store)
        return group, store

    def retire(self, group: dist.ProcessGroup) -> bool:
        """Whether a group that is about to be destroyed is set aside instead, which it
        is where its world closes in order. No map of c10d's has it any more then."""
        if group not in self._mine:
            return False
        if not self._is_closing:
            del self._mine[group]
            return False
        unregister(group)
        return True

    # ------------------------------------------------------------ the end

    def settle(self) -> None:
        """The world is built: what is made later is made anew, since the others may
        not be making it at the same time."""
        self._agreement = Agreement()

    def begin_close(self, *, keep: bool) -> None:
        """From here on groups that are destroyed are set aside, if they may be kept."""
        self.settle()
        self._is_closing = keep and not self.is_broken
        # Somebody may have destroyed one by a way that does not lead through here.
        there = c10d._world.pg_map
        self._mine = {g: each for g, each in self._mine.items() if g in there}

    def end_close(self) -> bool:
        """Keep what was set aside, True if it may be; delete what the others wrote to
        the store."""
        with self._lock:
            mine, self._mine = self._mine, {}
            stores, self._stores = self._stores, []
            keep = self._is_closing and not self.is_broken
        kept = list(mine.values())
        mine.clear()
        if keep:
            self._pool.give_back(kept)
        else:
            destroy(list(kept))
        still = {id(each.store) for each in kept}
        # The launcher, whose store it is, may be gone already.
        with suppress(dist.DistError):
            for store in stores:
                if id(store) not in still:
                    store.delete_written()
        return keep

    def abort(self) -> None:
        """Never keep any of these; their waits in the store end. Any thread."""
        with self._lock:
            self.is_broken = True
            stores = [*self._stores, *(each.store for each in self._mine.values())]
        for store in stores:
            store.cancel()


def destroy(communicators: list[Communicator]) -> None:
    """End these without their other members' help, which a shutdown may wait for
    (NCCL's is collective on a machine); the list is emptied.

    What is broken ends on a thread: a gloo group with an operation that never ends
    cannot be aborted, and its end waits for that.
    """
    # Each with its store, which must not go first: a tuple lets go of its last first.
    sound: list[Any] = []
    broken: list[Any] = []
    while communicators:
        each = communicators.pop()
        abort(each.handle)
        (broken if each.is_broken else sound).append((each.store, each.handle))
        each.handle = None
        with suppress(dist.DistError):
            each.store.cancel()
            each.store.delete_written()
    if broken:
        threading.Thread(target=broken.clear, daemon=True).start()
    let_go(sound)


def abort(group: dist.ProcessGroup) -> None:
    """End a group's collectives in flight, here, and the group with them; any thread.
    Nothing where the backend cannot (gloo)."""
    with suppress(RuntimeError):
        group.abort()
    # HCCL's has another name (torch_npu, distributed/distributed_c10d.py,
    # reinit_process_group).
    with suppress(RuntimeError):
        for device in group._device_types:
            backend = group._get_backend(device)
            getattr(backend, "abort_hccl_comm", lambda _: None)("its world is closed")


def let_go(groups: list[Any]) -> None:
    """Drop the last references side by side and empty the list: the end of a gloo group
    joins a thread that looks up every 10 ms (torch 2.13, gloo/transport/tcp/loop.cc),
    with the GIL released."""
    # Not `map`: its arguments would hold them.
    with ThreadPoolExecutor(max(len(groups), 1)) as threads:
        while groups:
            threads.submit([groups.pop()].clear)


def unregister(group: dist.ProcessGroup) -> None:
    """Take a group out of the entered world's maps and out of the registry of names, as
    `destroy_process_group` does (torch 2.13), without shutting it down."""
    world = c10d._world
    name = world.pg_names.pop(group, None)
    if name is None:
        return
    for entries in (world.pg_map, world.pg_group_ranks, world.pg_backend_config):
        entries.pop(group, None)
    world.pg_coalesce_state.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    for each in {tag, ""}:
        if group in (groups := world.tags_to_pg.get(each, [])):
            groups.remove(group)
    with suppress(RuntimeError):
        c10d._unregister_process_group(name)


def _register(
    group: dist.ProcessGroup, name: str, backend: str, store: dist.Store
) -> None:
    """The reverse, as at the end of `_new_process_group_helper` (torch 2.13)."""
    world = c10d._world
    world.pg_map[group] = (backend, store)
    world.pg_names[group] = name
    world.pg_backend_config[group] = str(c10d.BackendConfig(c10d.Backend(backend)))
    c10d._register_process_group(name, group)
    tag = f"ptd:{name}"
    world.pg_to_tag[group] = tag
    for each in ("", tag):
        world.tags_to_pg.setdefault(each, []).append(group)


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    if hasattr(group, "set_timeout"):
        group.set_timeout(timeout)
        return
    for device in group._device_types:  # torch 2.11
        group._get_backend(device)._set_default_timeout(timeout)


def _has_run(group: dist.ProcessGroup) -> bool:
    try:
        return bool(group._get_sequence_number_for_group())
    except RuntimeError:  # a backend that does not count
        return True


def _device_of(group: dist.ProcessGroup) -> torch.device:
    types = {device.type for device in group._device_types}
    # Gloo says it can do others too; the process's current one is this rank's.
    return torch.device("cpu" if "cpu" in types else min(types))


def _has_passed(
    offer: Offer,
    check: tuple[torch.Tensor, Any] | None,
    deadline: float,
    store: CancellableStore,
) -> bool:
    if check is None:
        return False
    value, work = check
    size = len(offer.key.ranks)
    try:
        while not work.is_completed():
            if time.monotonic() > deadline:
                return False
            store.pause(_CHECK_POLL_S)
        work.wait()
        return value.item() == size * (size + 1) / 2
    except StoreCancelled:
        raise
    except RuntimeError as error:
        log.warning("event=communicator_failed name=%s error=%s", offer.name, error)
        return False


def _declared_bytes(options: Any) -> int:
    """HCCL has two buffers of the size that the group's options say, in MB, which it
    may only allocate at the first collective (CANN's HCCL_BUFFSIZE)."""
    config = getattr(options, "hccl_config", None)
    if not isinstance(config, dict):
        return 0
    return 2 * int(config.get("hccl_buffer_size", 0)) * 2**20


# ---------------------------------------------------------------- c10d's two functions

_make = c10d._new_process_group_helper
_destroy = c10d.destroy_process_group
_MAKE_SIGNATURE = inspect.signature(_make)


def _make_or_take(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    if not hasattr(c10d._world, "groups"):
        return _make(*args, **kwargs)
    call = _MAKE_SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    arguments = dict(call.arguments)
    if c10d._world.groups is None:
        return _make_as_asked(**arguments)
    return c10d._world.groups.make(_make_as_asked, arguments)


def _make_as_asked(**arguments: Any) -> tuple[Any, Any]:
    """With a bound device torch splits a group off the default one's communicator, for
    which it calls on all ranks; of a gloo group only on those that are not in it (torch
    2.13), which then wait for the others. There is nothing to split."""
    places = arguments["global_ranks_in_group"]
    if str(arguments["backend"]) == "gloo":
        if places and c10d._world.default_pg.rank() not in places:
            return dist.GroupMember.NON_GROUP_MEMBER, None
        arguments["device_id"] = None
    return _make(**arguments)


def _destroy_or_keep(group: dist.ProcessGroup | None = None) -> None:
    groups = getattr(c10d._world, "groups", None)
    if groups is None or group is None or not groups.retire(group):
        _destroy(group)


# Callers look them up where they are defined, or in torch.distributed.
c10d._new_process_group_helper = _make_or_take
c10d.destroy_process_group = dist.destroy_process_group = _destroy_or_keep
