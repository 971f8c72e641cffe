"""One engine, from `PrepareEngine` to the last `EngineClosed`.

Each function is one thing that happens to an engine. What this means for the command
that moved it is `switches.py`'s business, which looks at the phases afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vllm_resident.controller import reports, requests, tally
from vllm_resident.controller.state import (
    ENGINE_BUILT,
    ENGINE_MOVING,
    Engine,
    EnginePhase,
    PoolState,
    log_engine,
    move_engine,
    note_progress,
)
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    BuildEngine,
    CloseEngine,
    DropEngine,
    EngineBuilt,
    EngineClosed,
    EngineFailed,
    EnginePrepared,
    EngineResumed,
    EngineSpec,
    EngineSuspended,
    PhaseStarted,
    PrepareEngine,
    ResumeEngine,
    SuspendEngine,
)

DROP_TIMEOUT_S = 10.0
# A rank that keeps its own deadline needs time to say so.
ANSWER_GRACE_S = 3.0
MIN_TIMEOUT_S = 1.0
# The peers of a rank that dies may report their broken connection before the kernel
# reports the death: so long an engine's failed step waits to be blamed on the dead.
BLAME_S = 1.0

LOADING = (EnginePhase.PREPARING, EnginePhase.PREPARED, EnginePhase.BUILDING)
WORD = {
    EnginePhase.PREPARING: "prepare",
    EnginePhase.BUILDING: "build",
    EnginePhase.SUSPENDING: "sleep",
    EnginePhase.RESUMING: "wake_up",
}
# Errors that say by themselves what happened: a rank lost later did not cause them.
CONCLUSIVE = ("CommandRejected", "RankDiverged", "RankLost", "RankTimeout",
               "ReleaseIncomplete")  # fmt: skip


# ------------------------------------------------------------ what is done to one


def prepare(
    state: PoolState,
    spec: EngineSpec,
    ranks: list[int],
    *,
    deadline: float,
    load_timeout_s: float,
    now: float,
    num_restores: int = 0,
) -> Engine:
    """Issue a generation and ask the ranks to prepare; all of them are attached."""
    engine = Engine(
        spec=spec,
        ranks=ranks,
        generation=state.next_generation,
        load_timeout_s=load_timeout_s,
        started=now,
        since=now,
        waiting=set(ranks),
        deadline=deadline,
        num_restores=num_restores,
        keeps_failure=num_restores > 0,
    )
    state.next_generation += 1
    state.engines[engine.generation] = engine
    log_engine(state, engine, "none", 0.0)
    for rank in ranks:
        state.send_to_rank(
            rank,
            PrepareEngine(
                generation=engine.generation,
                name=spec.name,
                model=spec.model,
                engine_args=spec.engine_args,
                ranks=ranks,
                frontend_args=spec.frontend_args,
            ),
        )
    return engine


def build(state: PoolState, engine: Engine, now: float) -> None:
    """Every rank prepared it and nothing else holds its ranks.

    Forming its world is collective. All ranks are told here, in one go and by the one
    loop there is, and each forms what it was told first: so of two worlds every rank
    that is in both forms the same one first, and no two wait for each other.
    """
    assert engine.deadline is not None
    move_engine(state, engine, EnginePhase.BUILDING, now)
    engine.waiting = set(engine.ranks)
    engine.build_began = now
    note_progress(state, engine, "build", now)
    greetings = [state.ranks[rank].hello for rank in engine.ranks]
    hosts = {hello.host_id for hello in greetings if hello is not None}
    turn = state.next_turn
    state.next_turn += 1
    for rank in engine.ranks:
        state.send_to_rank(
            rank,
            BuildEngine(
                generation=engine.generation,
                timeout_s=max(engine.deadline - now, MIN_TIMEOUT_S),
                spans_machines=len(hosts) > 1,
                turn=turn,
            ),
        )


def close(state: PoolState, engine: Engine, deadline: float, now: float) -> None:
    """Unload a ready engine; of a lost one, wait for its survivors to drop it."""
    engine.close_began = now
    if engine.phase is EnginePhase.LOST:
        is_held = bool(engine.waiting)
        after = EnginePhase.UNWINDING if is_held else EnginePhase.CLOSED
        move_engine(state, engine, after, now)
        return
    timeout_s = max(deadline - now, MIN_TIMEOUT_S)
    move_engine(state, engine, EnginePhase.CLOSING, now)
    engine.waiting = set(engine.ranks)
    engine.deadline = now + timeout_s + ANSWER_GRACE_S
    note_progress(state, engine, "close", now)
    for rank in engine.ranks:
        state.send_to_rank(
            rank, CloseEngine(generation=engine.generation, timeout_s=timeout_s)
        )


def drain(state: PoolState, engine: Engine, now: float) -> None:
    """Let a ready engine finish what it has; what comes in is held."""
    move_engine(state, engine, EnginePhase.DRAINING, now)
    note_progress(state, engine, "drain", now)


def undrain(state: PoolState, engine: Engine, now: float) -> None:
    move_engine(state, engine, EnginePhase.READY, now)
    requests.release(state, engine)


def suspend(
    state: PoolState,
    engine: Engine,
    level: int,
    deadline: float,
    now: float,
    *,
    finish_s: float = 0.0,
) -> None:
    """Put an awake engine to sleep, or a sleeping one to a deeper level. What its
    leader has by then may go on for `finish_s`."""
    _set_in_motion(state, engine, EnginePhase.SUSPENDING, deadline, now)
    engine.suspended = {}
    engine.refusal = None
    timeout_s = max(deadline - now, MIN_TIMEOUT_S)
    for rank in engine.ranks:
        state.send_to_rank(
            rank,
            SuspendEngine(
                generation=engine.generation,
                level=level,
                timeout_s=timeout_s,
                finish_s=finish_s,
            ),
        )


def resume(state: PoolState, engine: Engine, deadline: float, now: float) -> None:
    """Wake a sleeping engine up; there is room for it on its ranks."""
    _set_in_motion(state, engine, EnginePhase.RESUMING, deadline, now)
    engine.resumed = {}
    timeout_s = max(deadline - now, MIN_TIMEOUT_S)
    for rank in engine.ranks:
        state.send_to_rank(
            rank, ResumeEngine(generation=engine.generation, timeout_s=timeout_s)
        )


def _set_in_motion(
    state: PoolState, engine: Engine, phase: EnginePhase, deadline: float, now: float
) -> None:
    move_engine(state, engine, phase, now)
    engine.motion_began = now
    engine.waiting = set(engine.ranks)
    engine.deadline = max(deadline, now + MIN_TIMEOUT_S) + ANSWER_GRACE_S
    engine.progress = []
    note_progress(state, engine, phase.value, now)


def unwind(
    state: PoolState, engine: Engine, error: ErrorInfo | None, now: float
) -> None:
    """Have every rank that may hold something of the engine drop it."""
    holders = set(engine.ranks) - set(engine.closed)
    engine.error = engine.error or error
    move_engine(state, engine, EnginePhase.UNWINDING, now)
    note_progress(state, engine, "unwind", now)
    reason = error.message if error else "a rank was lost"
    drop(state, engine, holders, reason, now)
    settle(state, engine, now)


def drop(
    state: PoolState, engine: Engine, ranks: Iterable[int], reason: str, now: float
) -> None:
    engine.waiting = {rank for rank in ranks if state.is_attached(rank)}
    engine.deadline = now + DROP_TIMEOUT_S + ANSWER_GRACE_S
    for rank in sorted(engine.waiting):
        state.send_to_rank(
            rank,
            DropEngine(
                generation=engine.generation, reason=reason, timeout_s=DROP_TIMEOUT_S
            ),
        )


def settle(state: PoolState, engine: Engine, now: float) -> None:
    """Move on when the last missing answer is there."""
    if engine.waiting:
        return
    engine.deadline = None
    if engine.phase in (EnginePhase.CLOSING, EnginePhase.UNWINDING):
        _end(state, engine, now)


def _end(state: PoolState, engine: Engine, now: float) -> None:
    error = engine.error or ErrorInfo(
        "RankFailure",
        f"engine {engine.name!r} ended before the request did",
        engine.leader,
        engine.generation,
        "close",
    )
    requests.fail_all(state, engine.generation, error)
    keep = engine.keeps_failure and engine.error is not None
    end = EnginePhase.FAILED if keep else EnginePhase.CLOSED
    move_engine(state, engine, end, now)


# ------------------------------------------------------------ what a rank says of one


def on_phase_started(
    state: PoolState, engine: Engine, message: PhaseStarted, now: float
) -> None:
    if engine.phase not in ENGINE_MOVING:
        return
    switch = state.switch_of(engine)
    since = switch.started if switch else now
    begun = engine.rank_phases.get(message.rank, [])
    begun = [each for each in begun if each[1] >= since]
    engine.rank_phases[message.rank] = [*begun, (message.phase, now)]
    note_progress(state, engine, message.phase, now)


def on_prepared(
    state: PoolState, engine: Engine, message: EnginePrepared, now: float
) -> bool:
    """False if the message does not belong to the engine's phase."""
    if engine.phase is not EnginePhase.PREPARING:
        return engine.phase in (EnginePhase.UNWINDING, EnginePhase.LOST)
    engine.waiting.discard(message.rank)
    engine.awake_memory[message.rank] = message.memory
    if not engine.waiting:
        engine.prepared_at = now
        move_engine(state, engine, EnginePhase.PREPARED, now)
    return True


def on_built(
    state: PoolState, engine: Engine, message: EngineBuilt, now: float
) -> bool:
    if engine.phase is not EnginePhase.BUILDING:
        return engine.phase in (EnginePhase.UNWINDING, EnginePhase.LOST)
    engine.waiting.discard(message.rank)
    engine.built[message.rank] = message
    engine.memory[message.rank] = engine.awake_memory[message.rank] = message.memory
    if not engine.waiting:
        engine.ready_at = engine.last_used = now
        engine.deadline = None
        move_engine(state, engine, EnginePhase.READY, now)
        state.failed.pop(engine.name, None)
    return True


def on_suspended(
    state: PoolState, engine: Engine, message: EngineSuspended, now: float
) -> bool:
    if engine.phase is not EnginePhase.SUSPENDING:
        return engine.phase in (EnginePhase.UNWINDING, EnginePhase.LOST)
    engine.waiting.discard(message.rank)
    engine.suspended[message.rank] = message
    engine.memory[message.rank] = message.memory
    if not engine.waiting and engine.refusal is not None:
        _split(state, engine, engine.refusal, now)
    elif not engine.waiting:
        engine.deadline = None
        engine.sleep_level = message.level
        move_engine(state, engine, EnginePhase.ASLEEP, now)
        if switch := state.switch_of(engine):
            switch.reports.append(reports.sleep_report(engine, switch, now))
    return True


def on_resumed(
    state: PoolState, engine: Engine, message: EngineResumed, now: float
) -> bool:
    if engine.phase is not EnginePhase.RESUMING:
        return engine.phase in (EnginePhase.UNWINDING, EnginePhase.LOST)
    engine.waiting.discard(message.rank)
    engine.resumed[message.rank] = message
    engine.memory[message.rank] = engine.awake_memory[message.rank] = message.memory
    if not engine.waiting:
        engine.deadline = None
        engine.sleep_level = 0
        engine.last_used = now
        move_engine(state, engine, EnginePhase.READY, now)
        if switch := state.switch_of(engine):
            switch.reports.append(reports.wake_report(engine, switch, now))
        requests.release(state, engine)
    return True


def on_closed(
    state: PoolState, engine: Engine, message: EngineClosed, now: float
) -> bool:
    if message.rank not in engine.waiting or engine.phase in LOADING:
        return False
    engine.closed[message.rank] = message
    engine.waiting.discard(message.rank)
    settle(state, engine, now)
    return True


def on_failed(
    state: PoolState, engine: Engine, message: EngineFailed, now: float
) -> None:
    """The first error counts; what the other ranks say of it is its echo."""
    error = _complete(engine, message)
    if error.kind == "RankDiverged":
        tally.note_divergence(state.history.tally, engine.name, message.rank)
    if engine.phase is EnginePhase.SUSPENDING and error.kind == "CommandRejected":
        _on_refused(state, engine, message.rank, error, now)
    elif engine.phase in LOADING:
        unwind(state, engine, error, now)
    elif engine.phase in ENGINE_BUILT:
        engine.keeps_failure = not is_new(state, engine)
        _blame_requests(state, engine, error, now)
        unwind(state, engine, error, now)
    elif engine.phase is EnginePhase.CLOSING:
        unwind(state, engine, error, now)
    elif error.kind == "ReleaseIncomplete" and message.rank in engine.waiting:
        # The answer to DropEngine of a rank that could not give everything back.
        engine.error = engine.error or error
        engine.waiting.discard(message.rank)
        settle(state, engine, now)


def _on_refused(
    state: PoolState, engine: Engine, rank: int, error: ErrorInfo, now: float
) -> None:
    """A rank cannot put it to that level, and has changed nothing: where they all say
    so it is as it was."""
    engine.waiting.discard(rank)
    engine.refusal = engine.refusal or error
    if engine.waiting:
        return
    if engine.suspended:
        _split(state, engine, engine.refusal, now)
        return
    engine.deadline = None
    engine.keeps_weights = True
    if switch := state.switch_of(engine):
        switch.refusal = switch.refusal or error
    if engine.sleep_level:
        move_engine(state, engine, EnginePhase.ASLEEP, now)
    else:
        undrain(state, engine, now)


def _split(state: PoolState, engine: Engine, refusal: ErrorInfo, now: float) -> None:
    """Some of its ranks have put it to that level, others refused: it can only go."""
    engine.keeps_failure = not is_new(state, engine)
    error = msgspec.structs.replace(refusal, kind="RankFailure")
    unwind(state, engine, error, now)


def is_new(state: PoolState, engine: Engine) -> bool:
    """Whether a command brings it: its caller is told of the failure."""
    switch = state.switch_of(engine)
    move = switch.moves_to(engine) if switch else None
    return move is not None and move.before is None and not engine.num_restores


def _complete(engine: Engine, message: EngineFailed) -> ErrorInfo:
    error = message.error
    phase = error.phase or WORD.get(engine.phase, engine.phase.value)
    return msgspec.structs.replace(
        error,
        rank=message.rank if error.rank is None else error.rank,
        generation=engine.generation,
        phase=phase,
    )


def _blame_requests(
    state: PoolState, engine: Engine, error: ErrorInfo, now: float
) -> None:
    """Fail the requests, or wait a moment for the loss that may have caused this."""
    if len(engine.ranks) == 1 or error.kind in CONCLUSIVE:
        requests.fail_all(state, engine.generation, error)
        return
    is_local = all(state.ranks[rank].local for rank in engine.ranks)
    wait_s = BLAME_S if is_local else state.heartbeat_timeout_s + BLAME_S
    engine.fail_requests_at = now + wait_s
