"""Which model comes up next, where, and what sleeps for it: on demand (pure).

Knows nothing of sockets, switches or clocks: it reads a `PoolView` that the controller
draws of itself, `now` is handed in, and what it wants done is returned. The controller
(`demand.py`) asks `admit` for each call that must wait, and `decide` after each event
and at `look_again_at`; so does the simulator in `benchmarks/policy.py`.

The rule, once: a waiting model comes up when its requests have together waited as long
as the requests of what must sleep for it are expected to wait for that (as with skis:
buy when the rent paid is the price), and at the latest after its `fair_share_s`. So one
request waits a little for a hot model that is idle for a moment, a long queue hardly at
all, and nobody for a model nobody calls. Busy engines have their `residency_s` besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum

# How many times the seconds lost to a turn (its drain, its switch) the turn lasts.
RESIDENCY_PER_LOSS = 2.0
# How many turns of the others a model waits at most for their sake.
FAIR_TURNS = 3.0
# Of the gap between two calls, how much the last one weighs in the average.
GAP_WEIGHT = 0.2
# How much of a dearer way's seconds each model that waits for a rank loses.
MOVE_WEIGHT = 3.0
# Two moments closer than this are one: `look_again_at` must not come too early.
EPSILON_S = 1e-6


class Phase(Enum):
    ABSENT = "absent"  # not loaded
    ASLEEP = "asleep"
    AWAKE = "awake"
    COMING = "coming"  # being loaded or woken, or waiting for what drains for it
    GOING = "going"  # draining or falling asleep
    MOVING = "moving"  # neither: takes no place, and cannot come up now


@dataclass(frozen=True)
class Costs:
    """Expected seconds of a model's moves; `wake_up_s` by sleep level."""

    sleep_s: float
    wake_up_s: Mapping[int, float]
    load_s: float


@dataclass(frozen=True)
class Limits:
    """What pool.toml allows a model's requests. None: no limit."""

    max_queue: int | None = None
    max_wait_s: float | None = None
    idle_ttl_s: float | None = None


@dataclass(frozen=True)
class ModelView:
    """One model and its engine, if it has one. Times are of `now`'s clock.

    `ranks` are where its engine is, asleep too; of an ABSENT one, the ranks pool.toml
    lists, if it does (`is_bound`: it may go to no others). `phase_until` is when COMING
    or GOING is expected to end. `queue` holds the arrivals of requests not given to an
    engine, oldest first; `num_slots` how many an engine takes at once. `gap_s` is the
    average time between two calls (`average_gap`), `service_s` what one takes.
    """

    name: str
    costs: Costs
    num_ranks: int = 1
    limits: Limits = Limits()
    pinned: bool = False
    is_bound: bool = False
    phase: Phase = Phase.ABSENT
    ranks: tuple[int, ...] = ()
    sleep_level: int = 0
    phase_until: float = 0.0
    awake_since: float = 0.0
    down_since: float = -math.inf
    idle_since: float = 0.0
    in_flight: int = 0
    queue: tuple[float, ...] = ()
    num_slots: int = 1
    service_s: float = 0.0
    gap_s: float = math.inf
    last_call: float = -math.inf

    @property
    def is_busy(self) -> bool:
        return self.in_flight > 0 or bool(self.queue)

    @property
    def is_placed(self) -> bool:
        """Whether it has its ranks to itself, or is about to."""
        return self.phase in (Phase.AWAKE, Phase.COMING, Phase.GOING)

    @property
    def is_down(self) -> bool:
        return self.phase in (Phase.ABSENT, Phase.ASLEEP)

    @property
    def return_s(self) -> float:
        """From asleep at level 1 to awake."""
        return self.costs.wake_up_s.get(1, self.costs.load_s)


@dataclass(frozen=True)
class PoolView:
    """`ranks` are those that are ready; a drain is cut off after `drain_s`."""

    ranks: tuple[int, ...]
    models: tuple[ModelView, ...]
    awake_per_rank: int = 1
    min_residency_s: float = 1.0
    drain_s: float = 30.0


@dataclass(frozen=True)
class BringUp:
    """Wake the model, or load it (`is_move`: unload it first where it sleeps). Those of
    `drain` have requests in flight: they finish them before they sleep."""

    model: str
    ranks: tuple[int, ...]
    sleep: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    is_move: bool = False


@dataclass(frozen=True)
class PutToSleep:
    """Nobody called it for its idle_ttl_s."""

    model: str


@dataclass(frozen=True)
class Refused:
    """`is_unknown`: no such model (404); else 503, worth asking again after
    `retry_after_s`."""

    reason: str
    retry_after_s: float = 0.0
    is_unknown: bool = False


@dataclass(frozen=True)
class GiveUp:
    """The oldest `num_requests` have waited max_wait_s: refuse them."""

    model: str
    num_requests: int
    refusal: Refused


@dataclass(frozen=True)
class Decision:
    """Actions that may run at the same time. Without an event before it, there is
    nothing more to decide until `look_again_at` (None: until an event)."""

    actions: tuple[BringUp | PutToSleep | GiveUp, ...] = ()
    look_again_at: float | None = None


@dataclass(frozen=True)
class _Option:
    """One way to bring a model up: when the switch should start and what it takes. It
    is not open while what is in the way moves (an event will tell of its end). The
    lowest `rating` is the best."""

    ranks: tuple[int, ...]
    victims: tuple[ModelView, ...]
    seconds: float
    start_at: float
    is_open: bool
    rating: float

    @property
    def up_at(self) -> float:
        return self.start_at + self.seconds


def average_gap(
    gap_s: float, last_call: float, now: float, num_calls: int = 1
) -> float:
    """`gap_s` of a model that has had so many calls since `last_call`, evenly."""
    gap = (now - last_call) / num_calls
    if math.isinf(gap) or math.isinf(gap_s):
        return gap
    return gap_s + (1 - (1 - GAP_WEIGHT) ** num_calls) * (gap - gap_s)


def rate(model: ModelView, now: float) -> float:
    """Calls per second, as expected: fewer the longer there was none."""
    gap = max(model.gap_s, now - model.last_call)
    return 1.0 / max(gap, EPSILON_S)


def residency_s(pool: PoolView, model: ModelView) -> float:
    """How long a busy engine stays awake at least, so that most of a turn is work."""
    lost = model.costs.sleep_s + model.return_s + model.service_s
    return max(pool.min_residency_s, RESIDENCY_PER_LOSS * lost)


def fair_share_s(pool: PoolView, model: ModelView) -> float:
    """How long the model waits at most for others' sake: FAIR_TURNS turns of each of
    those that want ranks, on as many ranks as there are."""
    return _turns(pool) * (residency_s(pool, model) + model.return_s)


def _turns(pool: PoolView) -> float:
    wanted = sum(m.num_ranks for m in pool.models if m.is_busy)
    return FAIR_TURNS * max(1.0, wanted / _places(pool))


def _places(pool: PoolView) -> int:
    return max(1, len(pool.ranks) * pool.awake_per_rank)


def waiting_since(model: ModelView) -> float:
    """When its oldest request began to wait for a turn: one that was left over when
    the turn ended waits from there, behind those that had none."""
    return max(model.queue[0], model.down_since)


def admit(
    pool: PoolView, name: str, now: float, *, is_queued: bool = False
) -> Refused | None:
    """Why a request for the model `name` cannot be queued, or, where it `is_queued`,
    cannot stay; None where it can."""
    model = next((m for m in pool.models if m.name == name), None)
    if model is None:
        return unknown_model(name, [m.name for m in pool.models])
    wait_s = expected_wait_s(pool, model, now)
    if math.isinf(wait_s):
        retry_s = fair_share_s(pool, model)
        text = (
            f"model {name!r}: no room: it needs {model.num_ranks} rank(s), there are "
            f"{len(pool.ranks)} that are not lost, and pinned models stay"
        )
        return Refused(text, retry_s)
    limits = model.limits
    is_full = limits.max_queue is not None and len(model.queue) >= limits.max_queue
    if is_full and not is_queued:
        text = f"model {name!r}: {len(model.queue)} requests wait (max_queue)"
        return Refused(text, wait_s)
    if limits.max_wait_s is not None and wait_s > limits.max_wait_s:
        text = (
            f"model {name!r}: would wait about {wait_s:.1f} s, more than "
            f"{limits.max_wait_s:.1f} s (max_wait_s)"
        )
        return Refused(text, wait_s - limits.max_wait_s)
    return None


def unknown_model(name: str, known: Iterable[str]) -> Refused:
    """There is no such model: a caller is told which there are."""
    there = sorted(known)
    listing = f"there are {there}" if there else "the pool has none"
    return Refused(f"no model {name!r}: {listing}", is_unknown=True)


def expected_wait_s(pool: PoolView, model: ModelView, now: float) -> float:
    """Until a request that comes now is begun; infinite where no rank can be had."""
    ahead = model.in_flight + len(model.queue) + 1 - model.num_slots
    turn_s = max(0, ahead) * model.service_s / model.num_slots
    match model.phase:
        case Phase.AWAKE:
            return turn_s
        case Phase.COMING:
            return max(0.0, model.phase_until - now) + turn_s
        case Phase.GOING | Phase.MOVING:
            return max(0.0, model.phase_until - now) + model.return_s + turn_s
    asked = replace(model, queue=(*model.queue, now))
    option = _best(_Scene.of(pool, now), asked, frozenset())
    return math.inf if option is None else option.up_at - now + turn_s


def decide(pool: PoolView, now: float) -> Decision:
    """What to do next (see the module for the rule).

    No model starves: with N models, R the longest `residency_s`, S the longest switch
    (sleep and load) and D the longest drain, each model that waits serves its oldest
    request within (FAIR_TURNS + 1) (N + 1) (R + S + D), `starvation_bound_s`. For after
    its fair share, at most FAIR_TURNS N (R + S), it is overdue: no model that went down
    since comes before it, so each other one at most once, and the ranks it waits for
    are kept for it. Needs that a drain ends, and that not all its ranks are pinned.
    """
    actions: list[BringUp | PutToSleep | GiveUp] = []
    moments: list[float] = []
    taken: set[int] = set()
    scene = _Scene.of(pool, now)
    for model in _in_turn(scene):
        option = _best(scene, model, taken)
        if option is None:
            continue
        if option.is_open and option.start_at <= now:
            actions.append(_bring_up(model, option))
            taken.update(option.ranks, *(victim.ranks for victim in option.victims))
            continue
        moments.append(option.start_at)
        if scene.overdue_at(model) <= now:
            # Its own ranks too: at the latest there it comes up, whatever looks better
            # at one look or another.
            taken.update(option.ranks, model.ranks)
    for model in pool.models:
        actions += _expired(pool, model, now, taken)
        moments += _expiries(model)
    later = [at + EPSILON_S for at in moments if now < at < math.inf]
    return Decision(tuple(actions), min(later, default=None))


def starvation_bound_s(pool: PoolView) -> float:
    """Within which a model's oldest request is begun, from when it became the oldest;
    see `decide`."""
    turn_s = max(residency_s(pool, m) for m in pool.models) + pool.drain_s
    turn_s += max(m.costs.sleep_s for m in pool.models)
    turn_s += max(max(m.costs.load_s, *m.costs.wake_up_s.values()) for m in pool.models)
    return (FAIR_TURNS + 1) * (len(pool.models) + 1) * turn_s


@dataclass(frozen=True)
class _Scene:
    """What one look at the pool needs more than once. `by_rank` are the engines there,
    who may go first in front, and of those who loses least."""

    pool: PoolView
    now: float
    turns: float
    crowd: float
    free_at: Mapping[str, float]
    by_rank: Mapping[int, Sequence[ModelView]]

    @classmethod
    def of(cls, pool: PoolView, now: float) -> _Scene:
        placed = [m for m in pool.models if m.is_placed]
        free_at = {m.name: _free_at(pool, m, now) for m in placed}
        placed.sort(key=lambda m: (free_at[m.name], _value(m, now)))
        by_rank = {r: [m for m in placed if r in m.ranks] for r in pool.ranks}
        waiting = sum(m.num_ranks for m in pool.models if m.queue and m.is_down)
        crowd = waiting / _places(pool)
        return cls(pool, now, _turns(pool), crowd, free_at, by_rank)

    def overdue_at(self, model: ModelView) -> float:
        turn_s = residency_s(self.pool, model) + model.return_s
        return waiting_since(model) + self.turns * turn_s


def _in_turn(scene: _Scene) -> list[ModelView]:
    """Those that wait to come up: the overdue by age, then who has waited most."""

    def key(model: ModelView) -> tuple[bool, float]:
        if scene.overdue_at(model) <= scene.now:
            return (False, waiting_since(model))
        return (True, -_pressure(model, scene.now))

    return sorted((m for m in scene.pool.models if m.queue and m.is_down), key=key)


def _pressure(model: ModelView, now: float) -> float:
    """What its requests have waited together, in seconds."""
    return len(model.queue) * now - sum(model.queue)


def _best(scene: _Scene, model: ModelView, taken: Set[int]) -> _Option | None:
    """The way by which it is up first. While its own ranks are taken that may be a load
    elsewhere, rated by what its longer switch costs the others that wait."""
    options = [
        option
        for ranks in _blocks(scene.pool, model)
        if taken.isdisjoint(ranks) and (option := _option(scene, model, ranks))
    ]
    return min(options, key=lambda option: option.rating, default=None)


def _blocks(pool: PoolView, model: ModelView) -> Iterator[tuple[int, ...]]:
    """Where it may go: its own ranks, and all aligned blocks, as the planner's. None
    while one that sleeps has lost a rank."""
    if model.ranks:
        if not set(model.ranks) <= set(pool.ranks):
            return
        yield model.ranks
    if model.is_bound:
        return
    for start in range(0, max(pool.ranks, default=-1) + 1, model.num_ranks):
        block = tuple(range(start, start + model.num_ranks))
        if block != model.ranks and set(block) <= set(pool.ranks):
            yield block


def _option(scene: _Scene, model: ModelView, ranks: tuple[int, ...]) -> _Option | None:
    there = _in_the_way(scene, ranks)
    free_at = max((scene.free_at[v.name] for v in there), default=scene.now)
    if math.isinf(free_at):
        return None
    victims = tuple(v for v in there if v.phase is Phase.AWAKE)
    path_s, dearer_s = _path_s(model, ranks)
    seconds = path_s + max((v.costs.sleep_s for v in victims), default=0.0)
    seconds += max((_drain_s(scene.pool, v) for v in victims), default=0.0)
    harm = sum(_harm(model, v, seconds, scene.now) for v in there)
    worth_at = (harm + sum(model.queue)) / len(model.queue)
    start_at = max(free_at, min(worth_at, scene.overdue_at(model)))
    return _Option(
        ranks, victims, seconds, start_at, len(victims) == len(there),
        start_at + seconds + dearer_s * scene.crowd * MOVE_WEIGHT,
    )  # fmt: skip


def _path_s(model: ModelView, ranks: tuple[int, ...]) -> tuple[float, float]:
    """What waking or loading it takes, and how much more than waking it at home."""
    if model.phase is not Phase.ASLEEP:
        return model.costs.load_s, 0.0
    wake_up_s = model.costs.wake_up_s.get(model.sleep_level, model.costs.load_s)
    if ranks == model.ranks:
        return wake_up_s, 0.0
    return model.costs.load_s, max(0.0, model.costs.load_s - wake_up_s)


def _drain_s(pool: PoolView, victim: ModelView) -> float:
    return min(pool.drain_s, victim.service_s) if victim.in_flight else 0.0


def _harm(model: ModelView, victim: ModelView, seconds: float, now: float) -> float:
    """What the victim's requests will wait together, in seconds, if it sleeps for this
    and then comes back: those that wait and those that will call meanwhile. A drain
    leaves slots empty, so what is in flight counts as if it waited."""
    away_s = seconds + model.costs.sleep_s + victim.return_s
    if victim.is_busy:
        away_s += model.service_s
    there = len(victim.queue) + victim.in_flight
    return away_s * (there + rate(victim, now) * away_s / 2)


def _in_the_way(scene: _Scene, ranks: tuple[int, ...]) -> list[ModelView]:
    """Whose places it needs: on each full rank of those who may go first."""
    leaving: list[ModelView] = []
    if len(ranks) > 1:
        leaving += {
            m.name: m
            for rank in ranks
            for m in scene.by_rank[rank]
            if _conflict(ranks, m.ranks)
        }.values()
    for rank in ranks:
        here = [m for m in scene.by_rank[rank] if m not in leaving]
        leaving += here[: max(0, len(here) - scene.pool.awake_per_rank + 1)]
    return leaving


def _value(model: ModelView, now: float) -> float:
    """Seconds per second that its calls would wait if it slept."""
    return rate(model, now) * (model.return_s + model.costs.sleep_s)


def _free_at(pool: PoolView, victim: ModelView, now: float) -> float:
    """When its place can be had: pinned ones stay, idle ones may go, busy ones have
    their residency."""
    if victim.phase is Phase.GOING:
        return max(now, victim.phase_until)
    if victim.pinned:
        return math.inf
    if victim.phase is Phase.COMING:
        return max(now, victim.phase_until) + residency_s(pool, victim)
    if not victim.is_busy:
        return now
    return max(now, victim.awake_since + residency_s(pool, victim))


def _conflict(ranks: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two engines of several ranks share one but not their leader: they cannot
    be awake together (planner.leader_conflict)."""
    is_shared = min(len(ranks), len(other)) > 1 and not set(ranks).isdisjoint(other)
    return is_shared and ranks[0] != other[0]


def _bring_up(model: ModelView, option: _Option) -> BringUp:
    return BringUp(
        model.name,
        option.ranks,
        sleep=tuple(v.name for v in option.victims if not v.in_flight),
        drain=tuple(v.name for v in option.victims if v.in_flight),
        is_move=model.phase is Phase.ASLEEP and option.ranks != model.ranks,
    )


def _expired(
    pool: PoolView, model: ModelView, now: float, taken: Set[int]
) -> Iterator[PutToSleep | GiveUp]:
    limits = model.limits
    if limits.max_wait_s is not None:
        late = sum(arrival + limits.max_wait_s <= now for arrival in model.queue)
        if late:
            text = (
                f"model {model.name!r}: waited {limits.max_wait_s:.1f} s (max_wait_s)"
            )
            yield GiveUp(model.name, late, Refused(text, fair_share_s(pool, model)))
    if limits.idle_ttl_s is None or not taken.isdisjoint(model.ranks):
        return
    is_idle = model.phase is Phase.AWAKE and not model.is_busy and not model.pinned
    if is_idle and model.idle_since + limits.idle_ttl_s <= now:
        yield PutToSleep(model.name)


def _expiries(model: ModelView) -> Iterator[float]:
    limits = model.limits
    if limits.max_wait_s is not None and model.queue:
        yield model.queue[0] + limits.max_wait_s
    if limits.idle_ttl_s is not None and model.phase is Phase.AWAKE:
        yield model.idle_since + limits.idle_ttl_s
