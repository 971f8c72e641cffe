"""The communicators a rank keeps of worlds that are closed, for worlds to come.

Making one is collective and costs up to seconds, so what a closed world gives back is
kept, within a budget in number and bytes, the least recently used destroyed first. Each
is known by its members as ranks of the pool, in order, by backend and by options,
whatever numbers the ranks have in a world. This module decides which are kept and which
may be used again; it knows neither torch nor worlds: a handle is anything.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Key(msgspec.Struct, array_like=True, frozen=True):
    """What two communicators must have alike for one to serve as the other. `options`
    is text that is equal where the options are."""

    ranks: tuple[int, ...]
    backend: str
    options: str


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """One that a rank has kept, as it tells the ranks it is about to form a world with.

    `name` was given at its making, the same on all members and no other's ever. `used`:
    collectives have run on it, so that one more costs nothing. `served`: the ranks, of
    the pool and in order, of the world that had it last.
    """

    name: str
    key: Key
    used: bool
    served: tuple[int, ...] = ()


@dataclass
class Communicator:
    """One that exists here, in a world or kept. `num_bytes` of the device's memory are
    its own, as far as they could be told; `store` has what its making wrote.
    `is_broken`: a collective on it failed or has not ended. `served` as of an `Offer`;
    `is_on_one_machine`: its members have found that they share memory."""

    name: str
    key: Key
    handle: Any
    num_bytes: int = 0
    store: Any = None
    is_broken: bool = False
    served: tuple[int, ...] = ()
    is_on_one_machine: bool = False


@dataclass(frozen=True)
class Budget:
    """What may be kept on one rank: so many, and so many bytes (None: any)."""

    num: int = 0
    num_bytes: int | None = None

    def allows(self, num: int, num_bytes: int) -> bool:
        return num <= self.num and (
            self.num_bytes is None or num_bytes <= self.num_bytes
        )


# Of a device, if pool.toml does not say: some layouts' worth, a small part of a device.
DEFAULT_BUDGET = Budget(64, 4 * 2**30)


@dataclass
class Counts:
    """Since the process began: communicators made, checked to be taken again, taken
    again, and given up, of those that were kept."""

    made: int = 0
    checked: int = 0
    reused: int = 0
    destroyed: int = 0


@dataclass
class CommunicatorPool:
    """What one rank keeps. `destroy` ends communicators without their other members'
    help. Not thread-safe, but for reading `num` and `num_bytes`."""

    budget: Budget
    destroy: Callable[[list[Communicator]], None]
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        # By name, the least recently used first.
        self._kept: dict[str, Communicator] = {}

    @property
    def num(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in list(self._kept.values()))

    def set_budget(self, budget: Budget) -> None:
        """Have another budget from now on; what it does not allow goes at once."""
        self.budget = budget
        self._shrink()

    def within(self, members: Iterable[int]) -> list[Communicator]:
        """Those whose members are all among these ranks of the pool, by name."""
        ranks = set(members)
        kept = sorted(self._kept.values(), key=lambda each: each.name)
        return [each for each in kept if ranks.issuperset(each.key.ranks)]

    def find(self, name: str) -> Communicator | None:
        return self._kept.get(name)

    def take(self, name: str) -> Communicator:
        """Hand one out: it is its taker's now."""
        self.counts.reused += 1
        return self._kept.pop(name)

    def give_back(self, communicators: Iterable[Communicator]) -> None:
        """Keep these, as the most recently used; those over the budget go."""
        self._kept.update((each.name, each) for each in communicators)
        self._shrink()

    def discard(self, names: Iterable[str]) -> None:
        """Destroy those of these names that are kept."""
        gone = [self._kept.pop(name) for name in set(names) & self._kept.keys()]
        self.counts.destroyed += len(gone)
        if gone:
            self.destroy(gone)

    def discard_of(self, rank: int) -> None:
        """Destroy those of which a rank is a member: its process is gone."""
        self.discard([n for n, each in self._kept.items() if rank in each.key.ranks])

    def close(self) -> None:
        """Destroy all. May be called twice."""
        self.discard(list(self._kept))

    def _shrink(self) -> None:
        num, num_bytes = self.num, self.num_bytes
        too_many = []
        for name, each in self._kept.items():
            if self.budget.allows(num, num_bytes):
                break
            too_many.append(name)
            num, num_bytes = num - 1, num_bytes - each.num_bytes
        self.discard(too_many)


@dataclass(frozen=True)
class Agreement:
    """What ranks that form a world may use again: of each, every member has it and says
    so. The same on all of them, also for those they are not members of."""

    offers: tuple[Offer, ...] = ()

    def without(self, names: Iterable[str]) -> Agreement:
        gone = set(names)
        return Agreement(tuple(o for o in self.offers if o.name not in gone))

    def worth_a_check(self) -> tuple[Offer, ...]:
        """Those that a collective tells something of: one that has run none yet would
        be made by it, one with a single member has nobody to miss."""
        return tuple(o for o in self.offers if o.used and len(o.key.ranks) > 1)

    def likely(self, members: Iterable[int]) -> tuple[Offer, ...]:
        """Of those worth a check what a world over these ranks is about to take: the
        groups over just them, and those that the last such world had."""
        ranks = tuple(members)
        return tuple(
            o for o in self.worth_a_check() if ranks in (o.key.ranks, o.served)
        )

    def first(self, key: Key, unchecked: Container[str]) -> Offer | None:
        """The one to take next for such a group; one that is checked, if there is."""
        alike = [offer for offer in self.offers if offer.key == key]
        checked = [offer for offer in alike if offer.name not in unchecked]
        return next(iter([*checked, *alike]), None)


def agree(offers: Mapping[int, Iterable[Offer]]) -> Agreement:
    """What ranks of the pool, that are about to form a world, can all use again, by
    what each of them offers. In the order of names, which is the order in which they
    are to be taken where several would do."""
    of_rank = {
        rank: {offer.name: offer for offer in mine} for rank, mine in offers.items()
    }
    agreed: dict[str, Offer] = {}
    for mine in of_rank.values():
        for offer in mine.values():
            theirs = [of_rank.get(r, {}).get(offer.name) for r in offer.key.ranks]
            if offer.name not in agreed and all(
                each is not None and each.key == offer.key for each in theirs
            ):
                there = [each for each in theirs if each is not None]
                used = any(each.used for each in there)
                is_same = all(each.served == offer.served for each in there)
                served = offer.served if is_same else ()
                agreed[offer.name] = Offer(offer.name, offer.key, used, served)
    return Agreement(tuple(agreed[name] for name in sorted(agreed)))


def describe(options: Any) -> str | None:
    """Text that is equal for equal options of a group; None where that cannot be told,
    so that such a group is never taken for another.

    Of an object, such as `ProcessGroupHCCL.Options`, its public attributes count, but
    for those that torch fills in for each group.
    """
    try:
        return repr(_plain(options, depth=4))
    except (_Unknown, AttributeError, RuntimeError):
        return None


class _Unknown(Exception):
    """A value whose equality cannot be told by its text."""


# Of c10d's Backend.Options and ProcessGroupNCCL.Options (torch 2.13): the group's own
# name, members and time-out, and what it was split from.
_PER_GROUP = frozenset(
    {
        "backend", "global_ranks_in_group", "group_id", "group_name", "op_timeout",
        "split_color", "split_from",
    }
)  # fmt: skip
# In `hccl_config` vllm-ascend puts the coordinator's name; it is kept, since HCCL names
# the communicator by it.
_SIMPLE = (str, bytes, int, float, bool, type(None))


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if depth == 0:
        raise _Unknown
    if isinstance(value, Mapping):
        return sorted((str(k), _plain(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(each, depth - 1) for each in value]
    if isinstance(value, type) or callable(value):
        raise _Unknown
    names = [n for n in dir(value) if not n.startswith("_") and n not in _PER_GROUP]
    if not names:
        raise _Unknown
    found = {name: getattr(value, name) for name in names}
    return [
        type(value).__name__,
        *sorted((n, _plain(v, depth - 1)) for n, v in found.items() if not callable(v)),
    ]
