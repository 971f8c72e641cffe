"""Which engines give up memory for others, and what does not fit at all.

Host memory is what sleepers at level 1 keep, counted per machine; device memory what
engines that are awake have, counted per rank. A budget of None is no budget. The one
least recently used goes first; a pinned engine never does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_resident.controller.state import Engine, EnginePhase, PoolState


@dataclass(frozen=True)
class Holder:
    """One engine as the policy sees it: bytes by rank, and when it was last used.

    `level` is its sleep level. `is_free` says that it may be moved: not pinned, not
    part of a running switch; `can_drop` that it can go to level 2.
    """

    name: str
    level: int
    last_used: float
    is_free: bool
    can_drop: bool = True
    device_bytes: Mapping[int, int] = field(default_factory=dict)
    host_bytes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Demotion:
    """Take an engine from level 1 to level 2, or (`level` None) unload it."""

    name: str
    level: int | None


def demotions(
    sleepers: Sequence[Holder],
    hosts: Mapping[int, str],
    budget_bytes: int | None,
    wanted: Mapping[int, int],
) -> tuple[list[Demotion], bool]:
    """What must go so that `wanted` bytes by rank fit beside the sleepers, in order,
    and whether they do then. `hosts` says which machine a rank is on.

    First level 1 to level 2, then, where level 2 still keeps something, unloading.
    """
    if budget_bytes is None:
        return [], True
    used = _by_host(hosts, [wanted, *(s.host_bytes for s in sleepers)])
    chosen: dict[str, Demotion] = {}
    by_age = sorted(sleepers, key=lambda each: each.last_used)
    for level in (2, None):
        for sleeper in by_age:
            crowded = {host for host, size in used.items() if size > budget_bytes}
            if not crowded:
                return list(chosen.values()), True
            sizes = _by_host(hosts, [sleeper.host_bytes])
            is_deeper = level is None or (sleeper.level < level and sleeper.can_drop)
            if not sleeper.is_free or not is_deeper or crowded.isdisjoint(sizes):
                continue
            if level is None and sleeper.name in chosen:
                # Level 2 was counted as giving all of it back.
                continue
            for host, size in sizes.items():
                used[host] -= size
            chosen[sleeper.name] = Demotion(sleeper.name, level)
    fits = all(size <= budget_bytes for size in used.values())
    return list(chosen.values()), fits


def _by_host(
    hosts: Mapping[int, str], sizes: Iterable[Mapping[int, int]]
) -> dict[str, int]:
    total: dict[str, int] = {}
    for by_rank in sizes:
        for rank, size in by_rank.items():
            if size:
                total[hosts[rank]] = total.get(hosts[rank], 0) + size
    return total


def device_shortage(
    name: str,
    needed: Mapping[int, int],
    awake: Sequence[Holder],
    budget_bytes: int | None,
) -> str:
    """Why an engine that needs `needed` bytes by rank cannot be awake beside `awake`,
    and what would have to sleep; empty where it can."""
    if budget_bytes is None:
        return ""
    for rank, size in sorted(needed.items()):
        there = [each for each in awake if each.device_bytes.get(rank, 0)]
        free = budget_bytes - sum(each.device_bytes[rank] for each in there)
        if size <= free:
            continue
        text = (
            f"engine {name!r} needs {_mib(size)} on rank {rank}, where {_mib(free)} of "
            f"{_mib(budget_bytes)} are free"
        )
        there.sort(key=lambda each: each.last_used)
        for count in range(1, len(there) + 1):
            if size <= free + sum(e.device_bytes[rank] for e in there[:count]):
                names = ", ".join(repr(each.name) for each in there[:count])
                return f"{text}: {names} would have to sleep"
        return f"{text}: it does not fit even alone"
    return ""


def _mib(size: int) -> str:
    return f"{max(size, 0) / 2**20:.0f} MiB"


# ------------------------------------------------------------ of the pool's state


def holders(state: PoolState) -> list[Holder]:
    """Every engine as the policy sees it."""
    return [
        Holder(
            name=e.name,
            level=e.sleep_level,
            last_used=e.last_used,
            is_free=not e.spec.pinned
            and e.phase is EnginePhase.ASLEEP
            and state.switch_of(e) is None,
            can_drop=not e.keeps_weights,
            device_bytes={r: m.device_bytes for r, m in e.memory.items()},
            host_bytes={r: m.host_bytes for r, m in e.memory.items()},
        )
        for e in state.engines.values()
    ]


def over_budget(
    state: PoolState, wanted: Mapping[int, int]
) -> tuple[list[Demotion], bool]:
    """What must be demoted so that `wanted` host bytes by rank fit, and whether they do
    then."""
    hosts = {r.rank: r.hello.host_id if r.hello else "" for r in state.ranks.values()}
    sleepers = [each for each in holders(state) if each.level]
    return demotions(sleepers, hosts, state.host_memory_bytes, wanted)


def kept_bytes(engine: Engine) -> dict[int, int]:
    """What an awake engine will keep of host memory by rank at level 1."""
    return {rank: memory.weight_bytes for rank, memory in engine.memory.items()}


def shortage(
    state: PoolState, coming: Sequence[Engine], leaving: Sequence[Engine]
) -> str:
    """Why the engines `coming` cannot be awake when those `leaving` are not; empty
    where they can."""
    awake = [
        each
        for each in holders(state)
        if each.level == 0 and not any(e.name == each.name for e in (*coming, *leaving))
    ]
    for engine in coming:
        needed = {rank: m.device_bytes for rank, m in engine.awake_memory.items()}
        text = device_shortage(engine.name, needed, awake, state.device_memory_bytes)
        if text:
            return text
        awake.append(
            Holder(engine.name, 0, engine.last_used, False, device_bytes=needed)
        )
    return ""
