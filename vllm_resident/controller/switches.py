"""The life of a switch: what comes is prepared, what goes is set aside, what comes is
brought up, what went for good is given back; or all is made as it was.

After every event `advance` looks at the phases of the switch's engines and takes the
next step. Until the commit nothing is given up that cannot be brought back: what goes
sleeps, where host memory allows, until what comes serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from vllm_resident.controller import engines, losses, memory, reports, requests, tally
from vllm_resident.controller.effects import RecordTransition
from vllm_resident.controller.state import (
    ENGINE_BUILT,
    ENGINE_GONE,
    ENGINE_MOVING,
    PROGRESS_INTERVAL_S,
    Engine,
    EnginePhase,
    Move,
    PastSwitch,
    PoolState,
    RankPhase,
    Switch,
    SwitchStage,
    move_switch,
    note_progress,
    pin,
    report_progress,
)
from vllm_resident.errors import CommandRejected, ErrorInfo
from vllm_resident.messages import CallFailed, SwitchDone

# What the way back may take where less than this is left of the command's time.
MIN_BACK_S = 60.0

_P = EnginePhase
_LOADING = (_P.PREPARING, _P.PREPARED, _P.BUILDING)


# ------------------------------------------------------------ beginnings


def check_room(state: PoolState, moves: Sequence[Move]) -> None:
    """Raise `CommandRejected` where what wakes up does not fit; before anything is
    changed. What is loaded is looked at when its ranks have said what it needs."""
    waking = [m.engine for m in moves if m.before and m.after == 0]
    leaving = [m.engine for m in moves if m.after != 0]
    if text := memory.shortage(state, waking, leaving):
        raise CommandRejected(text)


def begin(state: PoolState, switch: Switch, now: float) -> None:
    """Open a switch whose moves were found to be possible."""
    state.open_switch(switch)
    for move in switch.moves:
        if move.before is None:
            note_progress(state, move.engine, "prepare", now)


def restore(state: PoolState, now: float) -> None:
    """Load again, on the same ranks, each lost engine whose ranks are all back."""
    for engine in list(state.engines.values()):
        is_back = all(state.ranks[r].phase is RankPhase.READY for r in engine.ranks)
        if engine.phase is not _P.LOST or engine.waiting or not is_back:
            continue
        if state.switch_of(engine) is not None:
            continue
        engines.close(state, engine, now, now)
        deadline = now + engine.load_timeout_s
        incoming = engines.prepare(
            state,
            engine.spec,
            engine.ranks,
            deadline=deadline,
            load_timeout_s=engine.load_timeout_s,
            now=now,
            num_restores=engine.num_restores + 1,
        )
        incoming.home_level = engine.home_level
        switch = Switch(
            action="restore",
            client=None,
            call=-1,
            started=now,
            deadline=deadline,
            next_progress=now,
            moves=[Move(incoming, None, engine.home_level)],
            cause="a rank came back",
        )
        state.open_switch(switch)


def takes_ranks(state: PoolState, engine: Engine) -> bool:
    """Whether the engine is awake on its ranks, or may be before its switch ends."""
    switch = state.switch_of(engine)
    move = switch.moves_to(engine) if switch else None
    if move is not None:
        return 0 in (move.before, move.after)
    return engine.home_level == 0


# ------------------------------------------------------------ stage by stage


def advance(state: PoolState, switch: Switch, now: float) -> bool:
    """Take the next step of a switch; False if it has to wait for its engines."""
    stage = switch.stage
    if stage in _MAY_GO_BACK and _note_failure(switch):
        _turn_back(switch)
        return True
    if not _STEPS[stage](state, switch, now):
        return False
    if stage is SwitchStage.GOING_BACK or stage is SwitchStage.COMMITTING:
        move_switch(switch, SwitchStage.DONE)
        _finish(state, switch, now)
    elif switch.stage is stage:
        move_switch(switch, _NEXT[stage])
        if enter := _ENTER.get(switch.stage):
            enter(state, switch, now)
    return True


def _turn_back(switch: Switch) -> None:
    switch.is_undone = True
    if switch.stage is not SwitchStage.PREPARING:
        _note_path(switch, "go_back")
    move_switch(switch, SwitchStage.GOING_BACK)


def _note_failure(switch: Switch) -> bool:
    """Whether something failed that must take the switch back."""
    has_failed = switch.refusal is not None
    for move in switch.moves:
        engine = move.engine
        if engine.error is None or _goes_by_loss(move):
            continue
        switch.failed = switch.failed or engine
        # Of one that was told to go the error is told, but nothing is undone.
        has_failed |= engine.close_began is None
    return has_failed


def _goes_by_loss(move: Move) -> bool:
    """What is to go may also go by losing its rank; while it is given up, that may
    still turn out to be so."""
    engine = move.engine
    if move.before is None or move.after is not None:
        return False
    may_be_lost = engine.phase is _P.UNWINDING and losses.may_echo(engine)
    return may_be_lost or engine.phase is _P.LOST


def _prepared(state: PoolState, switch: Switch, _now: float) -> bool:
    coming = [move.engine for move in switch.moves if move.before is None]
    if any(engine.phase is _P.PREPARING for engine in coming):
        return False
    awake = [m.engine for m in switch.moves if m.before is None and m.after == 0]
    leaving = [m.engine for m in switch.moves if m.before == 0]
    if text := memory.shortage(state, awake, leaving):
        switch.refusal = CommandRejected(text).to_info()
        _turn_back(switch)
    return True


def _staged(state: PoolState, switch: Switch, now: float) -> bool:
    """Build what comes and put it to sleep, while what goes serves."""
    if switch.strategy != "stage":
        return True
    coming = [m.engine for m in switch.moves if m.before is None and m.after == 0]
    for engine in coming:
        if engine.phase is _P.PREPARED:
            engines.build(state, engine, now)
            _note_path(switch, "stage")
        elif engine.phase is _P.READY:
            engines.suspend(state, engine, 1, switch.deadline, now)
    return all(engine.phase is _P.ASLEEP for engine in coming)


def _enter_making_room(state: PoolState, switch: Switch, _now: float) -> None:
    """Decide what is parked and which sleepers go deeper for it."""
    brings_up = any(m.after == 0 for m in switch.moves)
    kept = [m for m in _leaving(switch) if m.engine.phase is not _P.LOST]
    for move in kept:
        goes = move.after is None
        move.parked = goes and brings_up and switch.strategy != "unload"
    wanted: dict[int, int] = {}
    for move in kept:
        if move.parked or move.after == 1:
            for rank, size in memory.kept_bytes(move.engine).items():
                wanted[rank] = wanted.get(rank, 0) + size
    chosen, fits = memory.over_budget(state, wanted)
    if not fits:
        # It does not fit whatever goes: weights are dropped, not kept.
        for move in kept:
            move.parked = False
            move.after = 2 if move.after == 1 else move.after
        return
    for demotion in chosen:
        engine = state.engine_named(demotion.name)
        assert engine is not None
        move = Move(engine, engine.sleep_level, demotion.level, demotion=True)
        switch.moves.append(move)


def _roomy(state: PoolState, switch: Switch, now: float) -> bool:
    deeper = [m for m in switch.moves if _is_deepening(m)]
    for move in deeper:
        if move.engine.phase is _P.ASLEEP and not _is_at(move):
            _note_path(switch, "demote" if move.demotion else "sleep")
            _put(state, switch, move, move.after, now)
    return all(_is_at(move) for move in deeper)


def _is_deepening(move: Move) -> bool:
    """A sleeper that goes deeper, or is unloaded now to give its memory."""
    if not move.before or move.after == 0:
        return False
    return move.after is not None or move.demotion


def _enter_draining(state: PoolState, switch: Switch, now: float) -> None:
    switch.drain_until = now + switch.drain_s
    for move in _leaving(switch):
        if move.engine.phase is _P.READY:
            if requests.in_flight(state, move.engine):
                _note_path(switch, "drain")
            engines.drain(state, move.engine, now)


def _drained(state: PoolState, switch: Switch, now: float) -> bool:
    if now >= switch.drain_until:
        return True
    return not any(requests.in_flight(state, m.engine) for m in _leaving(switch))


def _enter_setting_aside(_state: PoolState, switch: Switch, now: float) -> None:
    if _leaving(switch):
        switch.aside_began = now


def _aside(state: PoolState, switch: Switch, now: float) -> bool:
    leaving = [m for m in _leaving(switch) if m.engine.phase is not _P.LOST]
    for move in leaving:
        if move.engine.phase in (_P.READY, _P.DRAINING):
            level = 1 if move.parked else move.after
            _note_path(switch, "unload" if level is None else "sleep")
            _put(state, switch, move, level, now)
    return all(m.engine.phase in (_P.ASLEEP, *ENGINE_GONE) for m in leaving)


def _up(state: PoolState, switch: Switch, now: float) -> bool:
    coming = [m for m in switch.moves if m.before is None or m.after == 0]
    lost = [m.engine for m in _leaving(switch) if m.engine.phase is _P.LOST]
    if coming and any(engine.waiting for engine in lost):
        return False  # the ranks that are there drop it first
    for move in coming:
        engine = move.engine
        if engine.phase is _P.PREPARED:
            _note_path(switch, "load")
            engines.build(state, engine, now)
        elif engine.phase is _P.READY and move.after:
            engines.suspend(state, engine, move.after, switch.deadline, now)
        elif engine.phase is _P.ASLEEP and move.after == 0:
            _note_path(switch, "wake_up")
            engines.resume(state, engine, switch.deadline, now)
    is_up = all(m.engine.phase is (_P.ASLEEP if m.after else _P.READY) for m in coming)
    if is_up and coming and switch.aside_began is not None:
        switch.up_at = now
    return is_up


def _committed(state: PoolState, switch: Switch, now: float) -> bool:
    """Give back what went for good; an error here is told, nothing is undone."""
    going = [m for m in switch.moves if m.after is None]
    for move in going:
        if move.engine.phase is _P.LOST:
            move.engine.error = None  # what it was lost for is over
        elif move.engine.phase not in ENGINE_BUILT - ENGINE_MOVING:
            continue
        _note_path(switch, "unload")
        engines.close(state, move.engine, switch.deadline, now)
    for move in switch.moves:
        if move.engine.close_began is not None and move.engine.error:
            switch.failed = switch.failed or move.engine
    return all(move.engine.phase in ENGINE_GONE for move in going)


# ------------------------------------------------------------ the way back


def _gone_back(state: PoolState, switch: Switch, now: float) -> bool:
    """First what came leaves again, then what went comes back."""
    coming = [m for m in switch.moves if m.before != 0]
    leaving = [m for m in switch.moves if m.before == 0]
    for moves in (coming, leaving):
        # Each takes its step, also where another has one to take.
        are_back = [_step_back(state, switch, move, now) for move in moves]
        if not all(are_back):
            return False
    return True


def _step_back(state: PoolState, switch: Switch, move: Move, now: float) -> bool:
    """Bring one engine nearer to where it was; True when it is there, or given up."""
    engine = move.engine
    if engine.phase in ENGINE_MOVING:
        # What is still being made is for nothing.
        if engine.phase in _LOADING and move.before is None:
            engines.unwind(state, engine, switch.error, now)
        return engine.phase in ENGINE_GONE
    if move.before is None:
        return _undo_load(state, switch, engine, now)
    if engine.phase is _P.LOST:
        return True
    if engine.phase in ENGINE_GONE:
        return _rebuild(state, switch, move, now)
    deadline = max(switch.deadline, now + MIN_BACK_S)
    if engine.phase is _P.PREPARED:
        engines.build(state, engine, now)
    elif engine.phase is _P.DRAINING:
        engines.undrain(state, engine, now)
    elif engine.phase is _P.READY and move.before:
        engines.suspend(state, engine, move.before, deadline, now)
    elif engine.phase is _P.ASLEEP and move.before == 0:
        engines.resume(state, engine, deadline, now)
    else:
        return True
    return engine.phase is _P.READY and move.before == 0


def _undo_load(state: PoolState, switch: Switch, engine: Engine, now: float) -> bool:
    if engine.phase in ENGINE_GONE:
        return True
    if engine.phase is _P.LOST:
        if engine.num_restores:
            return True  # another restore tries again
        engines.close(state, engine, now, now)
    else:
        engines.unwind(state, engine, switch.error, now)
    return engine.phase in ENGINE_GONE


def _rebuild(state: PoolState, switch: Switch, move: Move, now: float) -> bool:
    """What was unloaded, or broke on its way, is loaded anew where it was."""
    old = move.engine
    is_there = all(state.ranks[r].phase is RankPhase.READY for r in old.ranks)
    if move.rebuilt or not is_there:
        return True
    move.rebuilt = True
    engine = engines.prepare(
        state,
        old.spec,
        old.ranks,
        deadline=max(switch.deadline, now + MIN_BACK_S),
        load_timeout_s=old.load_timeout_s,
        now=now,
    )
    engine.keeps_failure = True
    engine.home_level = old.home_level
    engine.last_used = old.last_used
    requests.adopt(state, old, engine)
    move.engine = engine
    _note_path(switch, "load")
    return False


# ------------------------------------------------------------ parts and ends


def _leaving(switch: Switch) -> list[Move]:
    """Of engines that are awake and will not be."""
    return [m for m in switch.moves if m.before == 0 and m.after != 0]


def _put(
    state: PoolState, switch: Switch, move: Move, level: int | None, now: float
) -> None:
    if level is None:
        engines.close(state, move.engine, switch.deadline, now)
    else:
        # A request may have been on its way when the last one ended.
        finish_s = max(0.0, switch.drain_until - now) if move.before == 0 else 0.0
        engines.suspend(
            state, move.engine, level, switch.deadline, now, finish_s=finish_s
        )


def _is_at(move: Move) -> bool:
    if move.after is None:
        return move.engine.phase in ENGINE_GONE
    return (
        move.engine.phase is _P.ASLEEP and move.engine.sleep_level == move.after
    ) or move.engine.phase in ENGINE_GONE


def _note_path(switch: Switch, step: str) -> None:
    if step not in switch.path:
        switch.path.append(step)


def _finish(state: PoolState, switch: Switch, now: float) -> None:
    state.switches = [other for other in state.switches if other is not switch]
    state.ended.append(switch)
    for move in switch.moves:
        if not switch.is_undone and move.after is not None:
            move.engine.home_level = move.after
        if move.engine.phase in (_P.READY, _P.ASLEEP):
            # It is where it was to be: no restore, and not built anew, any more.
            move.engine.num_restores = 0
            move.engine.keeps_failure = False
        if move.engine.phase is not _P.READY:
            requests.refuse_held(state, move.engine)
    for name, (before, after) in switch.pins.items():
        if engine := state.engine_named(name):
            pin(engine, before if switch.is_undone else after)
    switch.reports.extend(reports.of_moves(switch, now))
    report = reports.switch_report(switch, now)
    state.effects.append(RecordTransition(report, switch.cause, switch.started))
    names = tuple(dict.fromkeys(move.engine.name for move in switch.moves))
    past = PastSwitch(switch.number, switch.started, switch.cause, names, report)
    state.history.past.append(past)
    state.history.num_past += 1
    tally.note_switch(state.history.tally, report)
    if switch.error:
        answer = CallFailed(call=switch.call, error=_failure(switch))
        state.send_to_client(switch.client, answer)
        return
    if switch.action == "apply":
        state.failed.clear()
    state.send_to_client(switch.client, SwitchDone(call=switch.call, report=report))


def _failure(switch: Switch) -> ErrorInfo:
    """The first error, and what the pool is like after it."""
    error = switch.error
    assert error is not None
    if "go_back" not in switch.path:
        return error
    # Something was changed and changed back: whatever the rank called it, this is no
    # rejection.
    kind = "RankFailure" if error.kind == "CommandRejected" else error.kind
    text = error.message
    lost = [
        f"{engine.name}: {engine.error.message if engine.error else 'a rank is lost'}"
        for engine in (m.engine for m in switch.moves if m.before is not None)
        if engine.phase in (*ENGINE_GONE, _P.LOST)
    ]
    if lost:
        text += f" (could not be brought back: {'; '.join(lost)})"
    elif any(move.before is not None for move in switch.moves):
        text += " (everything is as it was)"
    return msgspec.structs.replace(error, kind=kind, message=text)


def tick(state: PoolState, now: float) -> None:
    """Show who waits that the switch is alive, engine by engine."""
    for switch in state.switches:
        if switch.client is None or now < switch.next_progress:
            continue
        switch.next_progress = now + PROGRESS_INTERVAL_S
        for move in switch.moves:
            if move.engine.phase in (*ENGINE_MOVING, _P.PREPARED, _P.DRAINING):
                report_progress(state, switch, move.engine, now)


def client_gone(state: PoolState, client: bytes) -> None:
    """What was begun goes on; nobody is told."""
    for switch in state.switches:
        if switch.client == client:
            switch.client = None


_Step = Callable[[PoolState, Switch, float], bool]
# What a stage does until it is through.
_STEPS: dict[SwitchStage, _Step] = {
    SwitchStage.PREPARING: _prepared,
    SwitchStage.STAGING: _staged,
    SwitchStage.MAKING_ROOM: _roomy,
    SwitchStage.DRAINING: _drained,
    SwitchStage.SETTING_ASIDE: _aside,
    SwitchStage.BRINGING_UP: _up,
    SwitchStage.COMMITTING: _committed,
    SwitchStage.GOING_BACK: _gone_back,
}
_ENTER: dict[SwitchStage, Callable[[PoolState, Switch, float], None]] = {
    SwitchStage.MAKING_ROOM: _enter_making_room,
    SwitchStage.DRAINING: _enter_draining,
    SwitchStage.SETTING_ASIDE: _enter_setting_aside,
}
_NEXT = {
    SwitchStage.PREPARING: SwitchStage.STAGING,
    SwitchStage.STAGING: SwitchStage.MAKING_ROOM,
    SwitchStage.MAKING_ROOM: SwitchStage.DRAINING,
    SwitchStage.DRAINING: SwitchStage.SETTING_ASIDE,
    SwitchStage.SETTING_ASIDE: SwitchStage.BRINGING_UP,
    SwitchStage.BRINGING_UP: SwitchStage.COMMITTING,
}
_MAY_GO_BACK = frozenset(_NEXT)
