"""Which ranks an engine gets, and what a new layout keeps, unloads and loads (pure).

Reads plain values, returns plain values; every refusal is a `CommandRejected` that
names the ranks in the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import msgspec

from vllm_resident.errors import CommandRejected
from vllm_resident.messages import EngineSpec

PARALLEL_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
)


@dataclass(frozen=True)
class RankView:
    """A rank as the planner sees it. `obstacle` says why it cannot be used: its phase
    ("lost"), or which engine has it; empty when it is free."""

    rank: int
    host_id: str
    obstacle: str = ""


@dataclass(frozen=True)
class Placement:
    """`spec` with its parallel sizes complete, and the ranks it goes to."""

    spec: EngineSpec
    ranks: list[int]


@dataclass(frozen=True)
class Resident:
    """An engine that is there. `can_move` is false where something else moves it."""

    placement: Placement
    is_awake: bool
    last_used: float = 0.0
    pinned: bool = False
    can_move: bool = True

    @property
    def name(self) -> str:
        return self.placement.spec.name

    @property
    def ranks(self) -> list[int]:
        return self.placement.ranks


@dataclass(frozen=True)
class LayoutPlan:
    """What `apply` does, by engine name for what exists. `wake_up` and `sleep` are
    engines that are as asked but for that."""

    keep: list[str]
    unload: list[str]
    load: list[Placement]
    wake_up: list[str]
    sleep: list[str]


def num_ranks(spec: EngineSpec) -> int:
    """How many ranks the parallel sizes multiply to."""
    return math.prod(spec.engine_args.get(name, 1) for name in PARALLEL_SIZES)


def complete(spec: EngineSpec) -> EngineSpec:
    """Fill in tensor_parallel_size from `ranks` where no parallel size is given.

    Raises `CommandRejected` when ranks and sizes do not agree.
    """
    if spec.ranks is None:
        return spec
    count = spec.ranks if isinstance(spec.ranks, int) else len(spec.ranks)
    if count < 1:
        raise CommandRejected(f"engine {spec.name!r}: asks for {count} ranks")
    if not any(name in spec.engine_args for name in PARALLEL_SIZES):
        engine_args = {**spec.engine_args, "tensor_parallel_size": count}
        return msgspec.structs.replace(spec, engine_args=engine_args)
    if num_ranks(spec) != count:
        sizes = ", ".join(
            f"{name}={spec.engine_args[name]}"
            for name in PARALLEL_SIZES
            if name in spec.engine_args
        )
        raise CommandRejected(
            f"engine {spec.name!r}: {count} rank(s) asked for, but {sizes} needs "
            f"{num_ranks(spec)}: make them agree, or leave one out"
        )
    return spec


def choose_ranks(spec: EngineSpec, views: Sequence[RankView]) -> list[int]:
    """The ranks for a completed spec; `views` are all ranks of the pool, in order."""
    if isinstance(spec.ranks, list):
        _check_listed(spec, views)
        return list(spec.ranks)
    count = num_ranks(spec)
    free = {view.rank: view for view in views if not view.obstacle}
    if len(free) >= count:
        return _best_block(count, free)
    obstacles = "; ".join(f"rank {v.rank} {v.obstacle}" for v in views if v.obstacle)
    raise CommandRejected(
        f"engine {spec.name!r} needs {count} rank(s), {len(free)} of {len(views)} are "
        f"free" + (f": {obstacles}" if obstacles else "")
    )


def _check_listed(spec: EngineSpec, views: Sequence[RankView]) -> None:
    assert isinstance(spec.ranks, list)
    by_rank = {view.rank: view for view in views}
    if outside := [rank for rank in spec.ranks if rank not in by_rank]:
        raise CommandRejected(
            f"engine {spec.name!r}: no rank {_join(outside)} in this pool of "
            f"{len(views)} (ranks 0 to {len(views) - 1})"
        )
    if twice := sorted({rank for rank in spec.ranks if spec.ranks.count(rank) > 1}):
        raise CommandRejected(
            f"engine {spec.name!r}: rank {_join(twice)} is listed twice"
        )
    if taken := [by_rank[rank] for rank in spec.ranks if by_rank[rank].obstacle]:
        reasons = "; ".join(f"rank {v.rank} {v.obstacle}" for v in taken)
        raise CommandRejected(f"engine {spec.name!r}: {reasons}")


def _join(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _best_block(count: int, free: Mapping[int, RankView]) -> list[int]:
    """Aligned blocks leave room for others, one host keeps traffic off the network."""
    starts = sorted(free)
    preferences: tuple[Callable[[list[int]], bool], ...] = (
        lambda block: block[0] % count == 0 and _is_one_host(block, free),
        lambda block: _is_one_host(block, free),
    )
    blocks = [list(range(start, start + count)) for start in starts]
    blocks = [block for block in blocks if all(rank in free for rank in block)]
    for is_good in preferences:
        if good := next(filter(is_good, blocks), None):
            return good
    by_host: dict[str, list[int]] = {}
    for rank in starts:
        by_host.setdefault(free[rank].host_id, []).append(rank)
    fitting = [ranks for ranks in by_host.values() if len(ranks) >= count]
    return (fitting[0] if fitting else starts)[:count]


def _is_one_host(block: Iterable[int], free: Mapping[int, RankView]) -> bool:
    return len({free[rank].host_id for rank in block}) == 1


def plan_layout(
    current: Sequence[Resident],
    wanted: Sequence[EngineSpec],
    views: Sequence[RankView],
    awake_per_rank: int = 1,
) -> LayoutPlan:
    """Turn `current` into `wanted` (completed specs) with the least change.

    An engine is kept where it is when name, model, arguments and, if listed, ranks are
    as asked; kept engines never move, but may be woken or put to sleep. `views`
    hold the obstacles that remain when every engine of `current` is gone. Engines that
    are to sleep need no room. Listed ranks are given out before counted ones, larger
    engines before smaller.
    """
    _check_distinct(wanted)
    by_name = {each.name: each for each in current}
    keep = [
        s
        for s in wanted
        if s.name in by_name and _is_as_asked(by_name[s.name].placement, s)
    ]
    kept = {spec.name for spec in keep}
    awake = [by_name[s.name].placement for s in keep if not s.asleep]
    check_together(awake, awake_per_rank)
    load = [spec for spec in wanted if spec.name not in kept]
    placed: dict[str, list[int]] = {}
    for spec in sorted(load, key=lambda s: (s.ranks is None or isinstance(s.ranks, int),
                                            -num_ranks(s))):  # fmt: skip
        obstacles = {} if spec.asleep else _full_ranks(awake, awake_per_rank)
        placed[spec.name] = choose_ranks(spec, _with_taken(views, obstacles))
        if not spec.asleep:
            awake.append(Placement(spec, placed[spec.name]))
            check_together(awake, awake_per_rank)
    return LayoutPlan(
        keep=[s.name for s in keep if by_name[s.name].is_awake is not s.asleep],
        unload=[name for name in by_name if name not in kept],
        load=[Placement(spec, placed[spec.name]) for spec in load],
        wake_up=[s.name for s in keep if not s.asleep and not by_name[s.name].is_awake],
        sleep=[s.name for s in keep if s.asleep and by_name[s.name].is_awake],
    )


def _full_ranks(awake: Sequence[Placement], awake_per_rank: int) -> dict[int, str]:
    names: dict[int, list[str]] = {}
    for placement in awake:
        for rank in placement.ranks:
            names.setdefault(rank, []).append(repr(placement.spec.name))
    return {
        rank: f"is asked for by {', '.join(there)}"
        for rank, there in names.items()
        if len(there) >= awake_per_rank
    }


def check_together(awake: Sequence[Placement], awake_per_rank: int) -> None:
    """Raise unless these engines can be awake at the same time.

    Where two engines of several ranks share one, they must have the same leader: a
    leader steps one engine after the other, so no rank ever waits in one engine for a
    rank that waits for it in another.
    """
    full = _full_ranks(awake, awake_per_rank + 1)
    for rank, reason in sorted(full.items()):
        raise CommandRejected(
            f"rank {rank} {reason}, but {awake_per_rank} engine(s) may be awake on a "
            "rank (awake_per_rank): let one sleep"
        )
    wide = [placement for placement in awake if len(placement.ranks) > 1]
    for first, second in combinations(wide, 2):
        if reason := leader_conflict(first, second):
            raise CommandRejected(reason)


def leader_conflict(first: Placement, second: Placement) -> str:
    """Why the two cannot be awake together, if they cannot."""
    if min(len(first.ranks), len(second.ranks)) < 2:
        return ""
    shared = set(first.ranks) & set(second.ranks)
    if not shared or first.ranks[0] == second.ranks[0]:
        return ""
    return (
        f"engines {first.spec.name!r} (ranks {_join(first.ranks)}) and "
        f"{second.spec.name!r} (ranks {_join(second.ranks)}) share rank "
        f"{_join(sorted(shared))} but not their first rank: they cannot be awake at "
        "the same time"
    )


def make_room(
    wanted: Placement, awake: Sequence[Resident], awake_per_rank: int
) -> list[str]:
    """Which awake engines must sleep so that `wanted` can be awake: the least recently
    used of each full rank. Raises where what is in the way cannot be moved."""
    leaving = [
        _movable(wanted, [other])
        for other in awake
        if leader_conflict(wanted, other.placement)
    ]
    for rank in wanted.ranks:
        there = [e for e in awake if rank in e.ranks and e not in leaving]
        while len(there) >= awake_per_rank:
            leaving.append(_movable(wanted, there))
            there.remove(leaving[-1])
    return [each.name for each in leaving]


def _movable(wanted: Placement, in_the_way: Sequence[Resident]) -> Resident:
    free = [each for each in in_the_way if each.can_move and not each.pinned]
    if free:
        return min(free, key=lambda each: each.last_used)
    reasons = ", ".join(
        f"{each.name!r} ({'pinned' if each.pinned else 'being moved'})"
        for each in in_the_way
    )
    raise CommandRejected(
        f"engine {wanted.spec.name!r}: no room on its ranks {_join(wanted.ranks)}, in "
        f"the way: {reasons}"
    )


def _check_distinct(wanted: Sequence[EngineSpec]) -> None:
    names = [spec.name for spec in wanted]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CommandRejected(f"the layout names {', '.join(twice)} twice")


def _is_as_asked(existing: Placement, wanted: EngineSpec) -> bool:
    return (
        existing.spec.model == wanted.model
        and _args(existing.spec) == _args(wanted)
        and existing.spec.frontend_args == wanted.frontend_args
        and (not isinstance(wanted.ranks, list) or existing.ranks == wanted.ranks)
    )


def _args(spec: EngineSpec) -> dict[str, object]:
    """Engine arguments with the default parallel sizes spelled out."""
    return {**dict.fromkeys(PARALLEL_SIZES, 1), **spec.engine_args}


def _with_taken(views: Sequence[RankView], taken: Mapping[int, str]) -> list[RankView]:
    return [
        RankView(view.rank, view.host_id, view.obstacle or taken.get(view.rank, ""))
        for view in views
    ]
