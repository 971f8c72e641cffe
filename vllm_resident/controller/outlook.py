"""The pool as the on-demand policy sees it: `PoolState` drawn as a `PoolView` (pure).

One row per model that can be called: the engines that are there, and what pool.toml
declares. Decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from vllm_resident.controller import requests, switches, usage
from vllm_resident.controller.planner import PARALLEL_SIZES
from vllm_resident.controller.policy import Costs, Limits, ModelView, Phase, PoolView
from vllm_resident.controller.state import (
    Engine,
    EnginePhase,
    Move,
    PoolState,
    RankPhase,
)
from vllm_resident.controller.usage import Caller, Usage
from vllm_resident.messages import EngineSpec

# A caller that was told that its model is up has reached the leader by then, whose own
# count has it (a frontend may have to be built first).
TURN_S = 60.0
# What an engine takes at once, where its engine arguments do not say (vLLM's default
# for most devices).
NUM_SLOTS = 256

_P = EnginePhase


def draw(state: PoolState, now: float) -> PoolView:
    demand = state.demand
    # In the middle of a move there are two of a name: the newer one is to stay.
    engines = {engine.name: engine for engine in state.engines.values()}
    names = sorted({*engines, *state.models})
    waiting = demand.waiting()
    told = _told(state, now)
    return PoolView(
        ranks=tuple(
            rank.rank for rank in state.ranks.values() if rank.phase is RankPhase.READY
        ),
        models=tuple(
            _model(state, name, engines.get(name), waiting.get(name, ()), told, now)
            for name in names
        ),
        awake_per_rank=state.awake_per_rank,
        min_residency_s=demand.min_residency_s,
        drain_s=demand.drain_s,
    )


def _model(
    state: PoolState,
    name: str,
    engine: Engine | None,
    waiting: Sequence[Caller],
    told: Mapping[int, int],
    now: float,
) -> ModelView:
    demand = state.demand
    known = demand.usages.get(name, Usage())
    costs = usage.costs(demand, name)
    limits = demand.limits_of(name)
    arrivals = [caller.arrived for caller in waiting]
    if engine is None:
        spec = state.models[name]
        phase, until, ranks = Phase.ABSENT, 0.0, _listed(spec)
    else:
        spec = engine.spec
        phase, until = _phase(state, engine, costs, known, now)
        ranks = tuple(engine.ranks)
        arrivals += _held(engine, waiting)
    if now < known.retry_at:
        # It is left alone: who calls it is told so, and who waits at its leader waits.
        limits = Limits(limits.max_queue, limits.max_wait_s)
        arrivals = []
    is_awake = phase is Phase.AWAKE
    return ModelView(
        name=name,
        costs=costs,
        num_ranks=_num_ranks(spec, engine),
        limits=limits,
        pinned=spec.pinned,
        is_bound=isinstance(spec.ranks, list),
        phase=phase,
        ranks=ranks,
        sleep_level=engine.sleep_level if engine else 0,
        phase_until=until,
        awake_since=engine.since if engine and is_awake else 0.0,
        down_since=engine.since if engine and phase is Phase.ASLEEP else -math.inf,
        idle_since=engine.last_used if engine else 0.0,
        in_flight=_in_flight(state, engine, told) if engine else 0,
        queue=tuple(sorted(arrivals)),
        num_slots=_num_slots(spec.engine_args),
        service_s=known.service_s,
        gap_s=known.gap_s,
        last_call=known.last_call,
    )


def _phase(
    state: PoolState, engine: Engine, costs: Costs, known: Usage, now: float
) -> tuple[Phase, float]:
    """What it does and, if it moves, when that is expected to end."""
    switch = state.switch_of(engine)
    if switch is None and engine.phase is _P.READY:
        return Phase.AWAKE, 0.0
    if switch is None and engine.phase is _P.ASLEEP:
        return Phase.ASLEEP, 0.0
    move = switch.moves_to(engine) if switch else None
    if not switches.takes_ranks(state, engine):
        return Phase.MOVING, now + costs.load_s
    if move is None:
        # It is lost or being given up: its ranks are not to be had meanwhile.
        return Phase.GOING, now + costs.load_s
    if move.after == 0:
        began = engine.since if engine.phase in (_P.BUILDING, _P.RESUMING) else now
        return Phase.COMING, max(now, began + _up_s(move, costs))
    began = engine.since if engine.phase is _P.SUSPENDING else now
    drain_s = 0.0
    if engine.phase is _P.DRAINING:
        drain_s = min(state.demand.drain_s, known.service_s)
    return Phase.GOING, max(now, began + drain_s + costs.sleep_s)


def _up_s(move: Move, costs: Costs) -> float:
    if move.before is None:
        return costs.load_s
    return costs.wake_up_s.get(move.before, costs.load_s)


def _told(state: PoolState, now: float) -> Counter[int]:
    """By generation, how many were told to come and may be on their way."""
    return Counter(
        caller.generation
        for caller in state.demand.callers.values()
        if caller.told_at is not None and now - caller.told_at < TURN_S
    )


def _in_flight(state: PoolState, engine: Engine, told: Mapping[int, int]) -> int:
    """What its leader has, or who will be there soon: mostly the same ones."""
    return max(requests.in_flight(state, engine), told.get(engine.generation, 0))


def _held(engine: Engine, waiting: Sequence[Caller]) -> list[float]:
    """Requests that reached the leader when the engine slept already, beside those
    that were announced since: they wait there, as if they had been."""
    if engine.phase is not _P.ASLEEP:
        return []
    num_announced = sum(caller.is_held for caller in waiting)
    return [engine.last_used] * (engine.num_frontend_requests - num_announced)


def _listed(spec: EngineSpec) -> tuple[int, ...]:
    return tuple(spec.ranks) if isinstance(spec.ranks, list) else ()


def _num_ranks(spec: EngineSpec, engine: Engine | None) -> int:
    """Whether the spec makes sense is seen when it is loaded."""
    if engine is not None:
        return len(engine.ranks)
    if spec.ranks is not None:
        return spec.ranks if isinstance(spec.ranks, int) else len(spec.ranks)
    return math.prod(_count(spec.engine_args, name, 1) for name in PARALLEL_SIZES)


def _num_slots(engine_args: Mapping[str, object]) -> int:
    return _count(engine_args, "max_num_seqs", NUM_SLOTS)


def _count(engine_args: Mapping[str, object], name: str, default: int) -> int:
    value = engine_args.get(name, default)
    return value if isinstance(value, int) and value > 0 else default
