"""What becomes of an engine whose rank is lost, or does not answer in time.

The other half of `engines.py`: things that nobody asked for. Which ranks are lost is
`ranks.py`'s to say.
"""

from __future__ import annotations

from vllm_resident.controller import engines, requests
from vllm_resident.controller.state import (
    ENGINE_BUILT,
    ENGINE_GONE,
    ENGINE_MOVING,
    Engine,
    EnginePhase,
    PoolState,
    Rank,
    move_engine,
)
from vllm_resident.errors import ErrorInfo, RankFailure, RankLost, RankTimeout

MAX_RESTORES = 3

_P = EnginePhase
# At whose deadline an engine is given up, not its ranks.
_UNWOUND_LATE = (*engines.LOADING, _P.SUSPENDING, _P.RESUMING)


def on_rank_lost(
    state: PoolState,
    engine: Engine,
    rank: Rank,
    what: str,
    now: float,
    *,
    evicted: bool,
) -> None:
    """A rank of the engine is gone. An engine that served is kept as LOST."""
    engine.waiting.discard(rank.rank)
    error = _loss(engine, rank, what)
    if engine.phase in ENGINE_BUILT or engine.phase in engines.LOADING:
        if _is_restorable(engine):
            _lose(state, engine, error, now)
        else:
            engines.unwind(state, engine, error, now)
    elif engine.phase is EnginePhase.CLOSING:
        # What is asked for is that it goes; the others must not wait for the dead.
        engines.unwind(state, engine, None, now)
    elif engine.phase is EnginePhase.UNWINDING and not evicted and may_echo(engine):
        # What failed the engine was the loss: only its echo came first.
        engine.error = error
        if _is_restorable(engine):
            requests.fail_all(state, engine.generation, error)
            engine.keeps_failure = False
            move_engine(state, engine, EnginePhase.LOST, now)
    if engine.phase not in ENGINE_GONE:
        engines.settle(state, engine, now)


def _is_restorable(engine: Engine) -> bool:
    """It was there whole, and is not being restored for the last time."""
    if engine.num_restores:
        return engine.num_restores < MAX_RESTORES
    return engine.ready_at is not None and engine.close_began is None


def may_echo(engine: Engine) -> bool:
    """Whether its error may turn out to be what a lost rank's peers say of the loss."""
    return engine.error is not None and engine.error.kind not in engines.CONCLUSIVE


def _loss(engine: Engine, rank: Rank, what: str) -> ErrorInfo:
    message = (
        f"rank {rank.rank} (pid {rank.pid} on {rank.host}) of engine {engine.name!r} "
        f"is lost: {what}"
    )
    phase = engines.WORD.get(engine.phase, engine.phase.value)
    return RankLost(
        message, rank=rank.rank, generation=engine.generation, phase=phase
    ).to_info()


def _lose(state: PoolState, engine: Engine, error: ErrorInfo, now: float) -> None:
    requests.fail_all(state, engine.generation, error)
    engine.error = error
    move_engine(state, engine, EnginePhase.LOST, now)
    engines.drop(state, engine, engine.ranks, error.message, now)


def expire(
    state: PoolState, engine: Engine, now: float
) -> tuple[set[int], RankFailure | None]:
    """Act on the engine's deadline. Returns the ranks that must be evicted, because
    they did not even give the engine up, and the error that says so."""
    if engine.fail_requests_at is not None and now >= engine.fail_requests_at:
        engine.fail_requests_at = None
        if engine.error:
            requests.fail_all(state, engine.generation, engine.error)
    if engine.deadline is None:
        return set(), None
    if engine.phase not in _UNWOUND_LATE and _waits_for_another(state, engine):
        # Their time begins when they are free.
        drop_s = engines.DROP_TIMEOUT_S + engines.ANSWER_GRACE_S
        engine.deadline = max(engine.deadline, now + drop_s)
    if now < engine.deadline:
        return set(), None
    if engine.phase in engines.LOADING:
        engines.unwind(state, engine, _too_late(engine, now).to_info(), now)
        return set(), None
    if engine.phase in (EnginePhase.SUSPENDING, EnginePhase.RESUMING):
        engine.keeps_failure = not engines.is_new(state, engine)
        engines.unwind(state, engine, _too_late(engine, now).to_info(), now)
        return set(), None
    error = _too_late(engine, now)
    engine.error = engine.error or error.to_info()
    return set(engine.waiting), error


def _waits_for_another(state: PoolState, engine: Engine) -> bool:
    """Whether ranks may not have come to giving the engine up, because another
    engine's move keeps them busy. That one has a deadline of its own, at which it is
    given up too; then they have time for that."""
    return any(
        other.waiting & engine.waiting
        and (other.phase in _UNWOUND_LATE or other.since > engine.since)
        for other in state.engines.values()
        if other is not engine
    )


def _too_late(engine: Engine, now: float) -> RankTimeout:
    word = engines.WORD.get(engine.phase, engine.phase.value)
    names = sorted(engine.waiting)
    if engine.phase is EnginePhase.PREPARED:
        text = f"engine {engine.name!r}: its ranks were not free in time"
    elif engine.phase in ENGINE_MOVING - {_P.CLOSING, _P.UNWINDING}:
        began = engine.started if engine.phase in engines.LOADING else engine.since
        text = (
            f"engine {engine.name!r}: rank(s) {names} did not finish {word!r} (last "
            f"phase {engine.progress[-1] if engine.progress else word!r}) within "
            f"{now - began:.1f} s"
        )
    else:
        text = (
            f"engine {engine.name!r}: rank(s) {names} did not give it up within "
            f"{now - engine.since:.1f} s and were told to exit"
        )
    return RankTimeout(
        text,
        rank=names[0] if names else None,
        generation=engine.generation,
        phase=engine.progress[-1] if engine.progress else word,
    )
