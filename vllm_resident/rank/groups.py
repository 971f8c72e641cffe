"""The process groups of one world, made anew or taken from what the rank has kept.

torch and vLLM are led here by `hooks`: so vLLM's groups, the default one, an
out-of-tree platform's and vLLM's own NCCL communicators (`nccl`) are all kept and used
again without their knowing. Which may be is agreed upon when a world's ranks meet
(`communicators`, `meeting`): all of them take the same one, or all make one. What vLLM
asks of a group's ranks each time, though they stay where they are, is remembered with
it. With `world`, `hooks`, `meeting`, `process_groups`, `store` and `holders` the only
module that touches torch.distributed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
import vllm.envs as envs
from torch.distributed import distributed_c10d as c10d
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

from vllm_resident.rank import nccl
from vllm_resident.rank.communicators import (
    Agreement,
    Communicator,
    CommunicatorPool,
    Key,
    Offer,
    agree,
    describe,
)
from vllm_resident.rank.meeting import Meeting
from vllm_resident.rank.process_groups import (
    Check,
    abort,
    has_run,
    let_go,
    register,
    set_timeout,
    unregister,
)
from vllm_resident.rank.store import CancellableStore

# A member that does not answer in this time will not: one collective of a few bytes.
CHECK_TIMEOUT_S = 10.0
# Read by the libraries when a communicator is made; vLLM sets the first for one engine
# (0.32.0, distributed/eplb/eplb_utils.py).
_VARIABLES = ("NCCL_MAX_CTAS", "HCCL_BUFFSIZE")
_NOT_KEPT = ("undefined", "mpi", "fake")

log = logging.getLogger("vllm_resident.rank")


class Groups:
    """The groups of one world on one rank, and where they come from and go.

    `members` are the world's ranks as ranks of the pool, in the order of `meeting`.
    Main thread only, but for `abort`.
    """

    def __init__(
        self,
        pool: CommunicatorPool,
        members: Sequence[int],
        meeting: Meeting,
        timeout_s: float,
        memory_used: Callable[[], int],
    ) -> None:
        self._pool = pool
        self.members = list(members)
        self._meeting = meeting
        self._rank = meeting.rank
        self._store = meeting.store
        self._timeout_s = timeout_s
        self._memory_used = memory_used
        self._agreement = Agreement()
        # Names of those agreed on that were not checked yet; they are when taken.
        self._unchecked: set[str] = set()
        # Those of this world, by their process group or object of vLLM's.
        self._mine: dict[Any, Communicator] = {}
        # What the making of groups wrote, until they are kept or the world is closed.
        self._stores: list[CancellableStore] = []
        self._is_closing = False
        # Between the thread that aborts and the one that closes.
        self._lock = threading.Lock()
        self.is_broken = False

    # ------------------------------------------------------------ before there is any

    def agree(self, offers: Sequence[Sequence[Offer]], deadline: float) -> None:
        """Settle with the others, by what each of them offers, what groups that are
        made from here on are taken from.

        What this world is likely to take is proven by a collective on each, all at
        once; whatever else was kept, when it is taken: how much that is must not
        matter. What the others could not match serves nobody any more.
        """
        agreement = agree(dict(zip(self.members, offers, strict=True)))
        names = {offer.name for offer in agreement.offers}
        mine = [each.name for each in self._pool.within(self.members)]
        self._pool.discard(name for name in mine if name not in names)
        self._agreement = agreement
        self._unchecked = {each.name for each in agreement.worth_a_check()}
        # With time left to say so, and to make anew what failed.
        check_s = (deadline - time.monotonic()) / 2
        self._prove(agreement.likely(self.members), "checked", check_s, deadline)

    def offers(self) -> list[Offer]:
        """What this rank could use of what it has kept."""
        return [
            Offer(each.name, each.key, has_run(each.handle), each.served)
            for each in self._pool.within(self.members)
        ]

    def _prove(
        self, offers: Sequence[Offer], point: str, check_s: float, deadline: float
    ) -> None:
        """Drop, on every rank of the world, those of these that fail for any."""
        if not offers:
            return
        failed = self._check(offers, check_s)
        everywhere = self._meeting.exchange(point, failed, list[str], deadline)
        broken = {name for names in everywhere for name in names}
        self._unchecked.difference_update(offer.name for offer in offers)
        self._agreement = self._agreement.without(broken)
        self._pool.discard(broken)

    def _check(self, offers: Iterable[Offer], timeout_s: float) -> list[str]:
        """One small collective on each of these that is this rank's too, all at once;
        returns the names of those that failed or did not end. Every member must call
        it with the same."""
        me = self.members[self._rank]
        mine = [offer for offer in offers if me in offer.key.ranks]
        started = [self._start_check(offer) for offer in mine]
        self._pool.counts.checked += len(mine)
        deadline = time.monotonic() + min(CHECK_TIMEOUT_S, timeout_s)
        failed = []
        for offer, check in zip(mine, started, strict=True):
            if check is None or not check.has_passed(deadline, self._store.pause):
                log.warning("event=communicator_failed name=%s", offer.name)
                failed.append(offer.name)
                if (communicator := self._pool.find(offer.name)) is not None:
                    communicator.is_broken = True
        return failed

    def _start_check(self, offer: Offer) -> Check | None:
        communicator = self._pool.find(offer.name)
        assert communicator is not None
        place = offer.key.ranks.index(self.members[self._rank])
        return Check.start(communicator.handle, place, len(offer.key.ranks))

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
        if (offer := self._next(key, arguments["group_name"])) is not None:
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
        # A hash names those that their members make by themselves (torch 2.13,
        # _process_group_name), a number those that the whole world makes.
        if not str(arguments["group_name"]).isdigit():
            return None
        parts = [options]
        if backend != "gloo":
            parts += _of_device(arguments.get("device_id"))
        return Key(self._ranks(places), backend, " ".join(parts))

    def _ranks(self, places: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.members[place] for place in places)

    def _next(self, key: Key, group_name: str) -> Offer | None:
        """The same on all ranks of the world, which all make the group now."""
        while (offer := self._agreement.first(key, self._unchecked)) is not None:
            if offer.name in self._unchecked:
                deadline = time.monotonic() + self._timeout_s
                point = f"checked/{group_name}/{offer.name}"
                self._prove([offer], point, self._timeout_s / 2, deadline)
                continue
            self._agreement = self._agreement.without([offer.name])
            return offer
        return None

    def _take(self, offer: Offer, arguments: dict[str, Any]) -> tuple[Any, Any]:
        communicator = self._pool.take(offer.name)
        group, name = communicator.handle, arguments["group_name"]
        self._mine[group] = communicator
        self._stores.append(communicator.store)
        set_timeout(group, arguments["timeout"])
        group._set_group_name(name)
        group._set_group_desc(arguments.get("group_desc") or "undefined")
        store = dist.PrefixStore(f"{name}/", self._store)
        register(group, name, str(arguments["backend"]), store)
        return group, store

    def _make_new(
        self, key: Key, original: Callable[..., Any], arguments: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Its store is its own: it may outlive this world's."""
        name = f"{self._meeting.identity}/groups/{arguments['group_name']}"
        own = self._store.of_one_group(arguments["group_name"])
        with self._lock:
            self._stores.append(own)
            if self.is_broken:  # before there was this one to call off
                own.cancel()
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

    def make_nccl(self, owner: PyNcclCommunicator, group: Any, device: Any) -> None:
        """In the place of its `__init__`, by the members of one group of the world."""
        is_torchs = isinstance(group, dist.ProcessGroup)
        # What is registered with one (symmetric memory) is not told apart from it.
        if not is_torchs or group.size() == 1 or envs.VLLM_USE_NCCL_SYMM_MEM:
            nccl.make(owner, group, device)
            return
        ranks = self._ranks(dist.get_process_group_ranks(group))
        key = Key(ranks, nccl.BACKEND, " ".join(_of_device(device)))
        if (offer := self._next_of_members(key, group)) is not None:
            communicator = self._pool.take(offer.name)
            communicator.handle.attach(owner, group)
            self._mine[owner] = communicator
            return
        before = self._memory_used()
        if (handle := nccl.make(owner, group, device)) is None:
            return
        num_bytes = max(0, self._memory_used() - before)
        name = f"{self._meeting.identity}/nccl/{group.group_name}/"
        name += str(sum(each.name.startswith(name) for each in self._mine.values()))
        self._mine[owner] = Communicator(name, key, handle, num_bytes)
        self._pool.counts.made += 1

    def _next_of_members(self, key: Key, group: dist.ProcessGroup) -> Offer | None:
        """As `_next`, where only the members are asked: the others make none now."""
        while (offer := self._agreement.first(key, self._unchecked)) is not None:
            self._agreement = self._agreement.without([offer.name])
            if offer.name not in self._unchecked:
                return offer
            self._unchecked.discard(offer.name)
            num_failed = torch.tensor(len(self._check([offer], self._timeout_s / 2)))
            dist.all_reduce(num_failed, group=group)
            if not num_failed:
                return offer
            self._pool.discard([offer.name])
        return None

    def retire_nccl(self, owner: PyNcclCommunicator) -> bool:
        """As `retire`, of one that vLLM is about to destroy. Main thread."""
        communicator = self._mine.get(owner)
        if communicator is None:
            return False
        if self._is_closing and communicator.handle.detach(owner):
            return True
        del self._mine[owner]
        return False

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

    def on_same_machine(
        self, ask: Callable[..., list[bool]], group: Any, source: int
    ) -> list[bool]:
        """In the place of vLLM's `in_the_same_node_as`. Of a kept group all ranks know
        the answer, or none does. "No" may have been a failure (it catches errors) and
        is asked again."""
        is_torchs = isinstance(group, dist.ProcessGroup)
        communicator = self._mine.get(group) if is_torchs else None
        if communicator is not None and communicator.is_on_one_machine:
            return [True] * len(communicator.key.ranks)
        answer = ask(group, source)
        if communicator is not None:
            communicator.is_on_one_machine = all(answer)
        return answer

    # ------------------------------------------------------------ the end

    def settle(self) -> None:
        """The world is built: what is made later is made anew, since the others may
        not be making it at the same time."""
        self._agreement = Agreement()
        self._unchecked = set()

    def begin_close(self, *, keep: bool) -> None:
        """From here on groups that are destroyed are set aside, if they may be kept."""
        self.settle()
        self._is_closing = keep and not self.is_broken
        # Somebody may have destroyed one by a way that does not lead through here.
        there = c10d._world.pg_map
        self._mine = {
            g: each
            for g, each in self._mine.items()
            if g in there or each.key.backend == nccl.BACKEND
        }

    def end_close(self) -> bool:
        """Keep what was set aside, True if it may be; delete what the others wrote to
        the store."""
        with self._lock:
            mine, self._mine = self._mine, {}
            stores, self._stores = self._stores, []
            keep = self._is_closing and not self.is_broken
        # Of vLLM's own those that it has let go of; what it has forgotten ends here,
        # which may take some seconds each.
        kept = [e for e in mine.values() if getattr(e.handle, "is_kept", True)]
        for each in mine.values():
            if not getattr(each.handle, "is_kept", True):
                threading.Thread(target=each.handle.abort, daemon=True).start()
        mine.clear()
        for each in kept:
            each.served = tuple(self.members)
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
            # Copied at one go: the main thread makes and takes groups meanwhile.
            mine = list(self._mine.values())
            stores = [*self._stores, *(each.store for each in mine)]
        for store in stores:
            if store is not None:
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
        if each.store is None:
            continue
        with suppress(dist.DistError):
            each.store.cancel()
            each.store.delete_written()
    if broken:
        threading.Thread(target=broken.clear, daemon=True).start()
    let_go(sound)


def _of_device(device: Any) -> list[str]:
    """What else makes one over devices another than one like it: whether it is bound,
    not to which, since that differs from member to member."""
    kind = getattr(device, "type", "unbound")
    return [kind, *(str(os.environ.get(name)) for name in _VARIABLES)]


def _declared_bytes(options: Any) -> int:
    """HCCL has two buffers of the size that the group's options say, in MB, which it
    may only allocate at the first collective (CANN's HCCL_BUFFSIZE)."""
    config = getattr(options, "hccl_config", None)
    if not isinstance(config, dict):
        return 0
    return 2 * int(config.get("hccl_buffer_size", 0)) * 2**20
