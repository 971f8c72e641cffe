"""Switches that nobody commanded: what pool.toml starts, what is over the host-memory
budget, and what `policy.py` wants done on demand.

They are switches like any other and meet the same checks; a command that finds one
under way is rejected, as by a command under way.
"""

from __future__ import annotations

import msgspec

from vllm_resident.controller import commands, memory, requests, switches
from vllm_resident.controller.effects import Note
from vllm_resident.controller.memory import Demotion
from vllm_resident.controller.planner import Placement
from vllm_resident.controller.policy import BringUp
from vllm_resident.controller.state import (
    Engine,
    EnginePhase,
    Move,
    PoolState,
    Switch,
)
from vllm_resident.errors import CommandRejected
from vllm_resident.messages import EngineSpec, LoadEngine

# How long one of them may take.
OWN_TIMEOUT_S = 600.0


def start_declared(state: PoolState, now: float) -> None:
    """Once, when all ranks are there: load what pool.toml says."""
    if state.was_started or not state.was_complete:
        return
    state.was_started = True
    for spec in state.start_up:
        command = LoadEngine(call=-1, spec=spec, timeout_s=OWN_TIMEOUT_S)
        try:
            commands.load(state, None, command, now)
        except CommandRejected as error:
            state.effects.append(Note(f"not started: {error}"))


def demote_for_budget(state: PoolState, now: float) -> None:
    """Where sleepers keep more than the budget, the policy's choice goes deeper."""
    if any(switch.action == "demote" for switch in state.switches):
        return
    chosen, _ = memory.over_budget(state, {})
    if chosen:
        demote(state, chosen, now)


def demote(state: PoolState, chosen: list[Demotion], now: float) -> None:
    """The pool's own switch: sleepers over the host-memory budget give it back."""
    switch = Switch(
        action="demote",
        client=None,
        call=-1,
        started=now,
        deadline=now + OWN_TIMEOUT_S,
        next_progress=now,
        moves=[_demotion_move(state, each) for each in chosen],
        cause="host memory budget",
    )
    switches.begin(state, switch, now)


def _demotion_move(state: PoolState, demotion: Demotion) -> Move:
    engine = state.engine_named(demotion.name)
    assert engine is not None
    return Move(engine, engine.sleep_level, demotion.level)


# ------------------------------------------------------------ on demand


def bring_up(state: PoolState, action: BringUp, cause: str, now: float) -> None:
    """Wake the model or load it, where and in whose place the policy says; raises
    `CommandRejected` where that cannot be."""
    engine = state.engine_named(action.model)
    leaving = [_leaving(state, name) for name in (*action.sleep, *action.drain)]
    if engine is not None and not action.is_move:
        leaving += _over_memory(state, engine, leaving)
        placement = Placement(engine.spec, engine.ranks)
        switch = _on_demand(state, "wake_up", action.model, cause, now)
    else:
        asked = EngineSpec(action.model) if engine is None else engine.spec
        spec = msgspec.structs.replace(commands.checked(state, asked), asleep=False)
        placement = Placement(spec, list(action.ranks))
        switch = _on_demand(state, "load", action.model, cause, now)
    commands.check_together(state, [placement], leaving)
    switch.moves += [Move(other, 0, 1) for other in leaving]
    if engine is not None:
        after = None if action.is_move else 0
        switch.moves.append(Move(engine, engine.sleep_level, after))
    switches.check_room(state, switch.moves)
    if engine is None or action.is_move:
        commands.add_load(state, switch, placement, OWN_TIMEOUT_S, now)
    switches.begin(state, switch, now)


def put_to_sleep(state: PoolState, name: str, cause: str, now: float) -> None:
    """Of an engine that nobody calls."""
    switch = _on_demand(state, "sleep", name, cause, now)
    switch.moves.append(Move(_leaving(state, name), 0, 1))
    switches.begin(state, switch, now)


def _on_demand(
    state: PoolState, action: str, model: str, cause: str, now: float
) -> Switch:
    return Switch(
        action=action,
        client=None,
        call=-1,
        started=now,
        deadline=now + OWN_TIMEOUT_S,
        next_progress=now,
        moves=[],
        cause=f"on demand: {cause}",
        drain_s=state.demand.drain_s,
        on_demand=model,
    )


def _leaving(state: PoolState, name: str) -> Engine:
    engine = state.engine_named(name)
    assert engine is not None
    assert engine.phase is EnginePhase.READY
    assert state.switch_of(engine) is None
    return engine


def _over_memory(
    state: PoolState, engine: Engine, leaving: list[Engine]
) -> list[Engine]:
    """Who else must sleep, where the budget of device memory says so: those on its
    ranks that are idle, the least recently used first."""
    idle = [
        other
        for other in state.engines.values()
        if other.phase is EnginePhase.READY
        and state.switch_of(other) is None
        and not other.spec.pinned
        and not set(other.ranks).isdisjoint(engine.ranks)
        and not any(other is each for each in leaving)
        and not requests.in_flight(state, other)
    ]
    idle.sort(key=lambda other: other.last_used)
    more: list[Engine] = []
    while memory.shortage(state, [engine], [*leaving, *more]) and len(more) < len(idle):
        more.append(idle[len(more)])
    return more
