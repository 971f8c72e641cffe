"""What clients ask for, turned into a switch's moves or refused.

A command is checked wholly before anything changes: each function here either raises
`CommandRejected` or opens a switch (`switches.py`), whose life is not its business.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from vllm_resident.config import adapters
from vllm_resident.controller import engines, memory, planner, switches
from vllm_resident.controller.planner import Placement, RankView, Resident
from vllm_resident.controller.state import (
    PROGRESS_INTERVAL_S,
    Engine,
    EnginePhase,
    Move,
    PoolState,
    RankPhase,
    Switch,
    pin,
)
from vllm_resident.controller.validation import (
    check_drain,
    check_level,
    check_spec,
    with_frontend_args,
)
from vllm_resident.errors import CommandRejected
from vllm_resident.messages import (
    ApplyLayout,
    EngineSpec,
    LoadEngine,
    SleepEngine,
    SwitchEngines,
    UnloadEngine,
    WakeUpEngine,
)

SwitchCommand = (
    LoadEngine | UnloadEngine | ApplyLayout | SleepEngine | WakeUpEngine | SwitchEngines
)

_STEADY = (EnginePhase.READY, EnginePhase.ASLEEP, EnginePhase.LOST)
_DOING = {
    EnginePhase.PREPARING: "loading",
    EnginePhase.PREPARED: "loading",
    EnginePhase.BUILDING: "loading",
    EnginePhase.DRAINING: "finishing its requests",
    EnginePhase.SUSPENDING: "falling asleep",
    EnginePhase.RESUMING: "waking up",
    EnginePhase.CLOSING: "unloading",
    EnginePhase.UNWINDING: "being given up after a failure",
}


def run(
    state: PoolState, client: bytes | None, command: SwitchCommand, now: float
) -> None:
    """Do what a command asks for; raises what is wrong with it."""
    match command:
        case LoadEngine():
            load(state, client, command, now)
        case UnloadEngine():
            unload(state, client, command, now)
        case ApplyLayout():
            apply(state, client, command, now)
        case SleepEngine():
            sleep(state, client, command, now)
        case WakeUpEngine():
            wake_up(state, client, command, now)
        case SwitchEngines():
            switch(state, client, command, now)


def load(
    state: PoolState, client: bytes | None, command: LoadEngine, now: float
) -> None:
    spec = checked(state, command.spec)
    _check_unused(state, spec)
    views = _views(state, taken_by=() if spec.asleep else _awake(state))
    placement = Placement(spec, planner.choose_ranks(spec, views))
    if not spec.asleep:
        check_together(state, [placement], leaving=())
    switch = _new_switch("load", client, command, now)
    add_load(state, switch, placement, command.timeout_s, now)
    switches.begin(state, switch, now)


def unload(
    state: PoolState, client: bytes | None, command: UnloadEngine, now: float
) -> None:
    check_drain(command.drain_s)
    engine = state.engine_named(command.name)
    if engine is None and command.name not in state.failed:
        raise _unknown(state, command.name)
    if engine is not None:
        _check_steady(state, engine)
    state.failed.pop(command.name, None)
    switch = _new_switch("unload", client, command, now)
    switch.drain_s = command.drain_s
    if engine is not None:
        switch.moves.append(Move(engine, engine.sleep_level, None))
    switches.begin(state, switch, now)


def apply(
    state: PoolState, client: bytes | None, command: ApplyLayout, now: float
) -> None:
    check_drain(command.drain_s)
    wanted = [checked(state, spec) for spec in command.engines]
    _check_adapters(wanted, ())
    for engine in state.engines.values():
        _check_steady(state, engine)
    current = {engine.name: engine for engine in state.engines.values()}
    plan = planner.plan_layout(
        # A lost engine is not what was asked for until it serves again.
        [_resident(state, e) for e in current.values() if not _is_lost(e)],
        wanted,
        _views(state, taken_by=()),
        state.awake_per_rank,
    )
    switch = _new_switch("apply", client, command, now)
    switch.drain_s = command.drain_s
    switch.kept = plan.keep
    untouched = {*plan.keep, *plan.wake_up, *plan.sleep}
    for name, engine in current.items():
        if name not in untouched:
            switch.moves.append(Move(engine, engine.sleep_level, None))
    for name in plan.sleep:
        switch.moves.append(Move(current[name], 0, 1))
    for name in plan.wake_up:
        switch.moves.append(Move(current[name], current[name].sleep_level, 0))
    switches.check_room(state, switch.moves)
    for placement in plan.load:
        add_load(state, switch, placement, command.timeout_s, now)
    pinned = {spec.name: spec.pinned for spec in wanted}
    for name in untouched:
        was_pinned = current[name].spec.pinned
        switch.pins[name] = (was_pinned, pinned[name])
        pin(current[name], was_pinned or pinned[name])
    switches.begin(state, switch, now)


def sleep(
    state: PoolState, client: bytes | None, command: SleepEngine, now: float
) -> None:
    check_drain(command.drain_s)
    check_level(command.level)
    engine = _steady_engine(state, command.name)
    if engine.sleep_level > command.level:
        raise CommandRejected(
            f"engine {engine.name!r} sleeps at level {engine.sleep_level} already, "
            f"where its weights are dropped: wake it up to put it to level "
            f"{command.level}"
        )
    switch = _new_switch("sleep", client, command, now)
    switch.drain_s = command.drain_s
    if engine.sleep_level == command.level:
        switch.kept = [engine.name]
    else:
        _check_keepable(state, engine, command.level)
        switch.moves.append(Move(engine, engine.sleep_level, command.level))
    switches.begin(state, switch, now)


def wake_up(
    state: PoolState, client: bytes | None, command: WakeUpEngine, now: float
) -> None:
    check_drain(command.drain_s)
    engine = _steady_engine(state, command.name)
    switch = _new_switch("wake_up", client, command, now)
    switch.drain_s = command.drain_s
    if engine.sleep_level == 0:
        switch.kept = [engine.name]
    else:
        for other in _in_the_way(state, engine):
            switch.moves.append(Move(other, 0, 1))
        switch.moves.append(Move(engine, engine.sleep_level, 0))
        switches.check_room(state, switch.moves)
    switches.begin(state, switch, now)


def switch(
    state: PoolState, client: bytes | None, command: SwitchEngines, now: float
) -> None:
    check_drain(command.drain_s)
    old = _steady_engine(state, command.old)
    if old.sleep_level:
        raise CommandRejected(
            f"engine {old.name!r} is asleep: to bring {command.new.name!r} up, wake it "
            "up or load it"
        )
    if old.spec.pinned:
        raise CommandRejected(f"engine {old.name!r} is pinned: it stays awake")
    if command.new.name == old.name:
        raise CommandRejected(f"engine {old.name!r}: old and new are the same")
    switch = _new_switch("switch", client, command, now)
    switch.drain_s = command.drain_s
    switch.strategy = command.strategy
    after = None if command.strategy == "unload" else 1
    switch.moves.append(Move(old, 0, after))
    existing = state.engine_named(command.new.name)
    if existing is not None and not command.new.model:
        if command.new.engine_args or command.new.ranks is not None:
            raise CommandRejected(
                f"engine {existing.name!r} is there as it was loaded: to give it other "
                "arguments or ranks, unload it and name its model"
            )
        _check_steady(state, existing)
        _check_not_lost(existing)
        if existing.sleep_level == 0:
            raise CommandRejected(f"engine {existing.name!r} is awake already")
        check_together(state, [Placement(existing.spec, existing.ranks)], leaving=[old])
        switch.moves.append(Move(existing, existing.sleep_level, 0))
        switches.check_room(state, switch.moves)
    else:
        placement = _place_new(state, command.new, old)
        add_load(state, switch, placement, command.timeout_s, now)
    switches.begin(state, switch, now)


def _check_keepable(state: PoolState, engine: Engine, level: int) -> None:
    wanted = memory.kept_bytes(engine) if level == 1 else {}
    _, fits = memory.over_budget(state, wanted)
    if not fits and state.host_memory_bytes is not None:
        raise CommandRejected(
            f"engine {engine.name!r} keeps {sum(wanted.values()) / 2**20:.0f} MiB at "
            f"level 1, more than the pool's host memory "
            f"({state.host_memory_bytes / 2**20:.0f} MiB) has room for: level 2 drops "
            "its weights"
        )


# ------------------------------------------------------------ parts of commands


def _new_switch(
    action: str, client: bytes | None, command: SwitchCommand, now: float
) -> Switch:
    return Switch(
        action=action,
        client=client,
        call=command.call,
        started=now,
        deadline=now + command.timeout_s,
        next_progress=now + PROGRESS_INTERVAL_S,
        moves=[],
        cause="start-up" if client is None else f"{action}, client {client.hex()}",
    )


def add_load(
    state: PoolState, switch: Switch, placement: Placement, timeout_s: float, now: float
) -> None:
    engine = engines.prepare(
        state,
        placement.spec,
        placement.ranks,
        deadline=switch.deadline,
        load_timeout_s=timeout_s,
        now=now,
    )
    engine.home_level = int(placement.spec.asleep)
    switch.moves.append(Move(engine, None, engine.home_level))


def _place_new(state: PoolState, new: EngineSpec, old: Engine) -> Placement:
    """Where an engine goes that is to be loaded in the place of `old`: on its ranks if
    it names none and they are as many."""
    spec = checked(state, new)
    _check_unused(state, spec)
    if spec.asleep:
        raise CommandRejected(
            f"engine {spec.name!r} is asked for asleep: a switch brings it up"
        )
    if spec.ranks is None and planner.num_ranks(spec) == len(old.ranks):
        spec = msgspec.structs.replace(spec, ranks=list(old.ranks))
    views = _views(state, taken_by=[e for e in _awake(state) if e is not old])
    placement = Placement(spec, planner.choose_ranks(spec, views))
    check_together(state, [placement], leaving=[old])
    return placement


def _in_the_way(state: PoolState, engine: Engine) -> list[Engine]:
    """Which engines must sleep so that this one can be awake."""
    awake = [e for e in _awake(state) if e is not engine]
    names = planner.make_room(
        Placement(engine.spec, engine.ranks),
        [_resident(state, e) for e in awake],
        state.awake_per_rank,
    )
    return [e for e in awake if e.name in names]


def check_together(
    state: PoolState, coming: list[Placement], leaving: Collection[Engine]
) -> None:
    """Raise unless those that come can be awake where they come. What goes on on other
    ranks is not their business: a switch there has what comes and what goes at once."""
    ranks = {rank for placement in coming for rank in placement.ranks}
    awake = [
        Placement(e.spec, e.ranks)
        for e in _awake(state)
        if not any(e is other for other in leaving) and not ranks.isdisjoint(e.ranks)
    ]
    planner.check_together([*awake, *coming], state.awake_per_rank)


def checked(state: PoolState, spec: EngineSpec) -> EngineSpec:
    """The spec with its parallel sizes complete; raises what is wrong with it."""
    if not state.world_size:
        raise CommandRejected(
            f"pool {state.name!r} is starting: no rank has said hello yet"
        )
    spec = with_frontend_args(
        declared(state, spec), _known_frontend_args(state), state.frontend_args
    )
    check_spec(spec, _known_args(state), _known_frontend_args(state))
    return planner.complete(spec)


def declared(state: PoolState, spec: EngineSpec) -> EngineSpec:
    """A spec without a model is the one that pool.toml declares under its name."""
    if spec.model:
        return spec
    known = state.models.get(spec.name)
    if known is None:
        names = sorted(state.models)
        raise CommandRejected(
            f"engine {spec.name!r} names no model, and pool.toml declares none of that "
            "name: " + (f"there are {names}" if names else "it declares no models")
        )
    return msgspec.structs.replace(
        known,
        ranks=known.ranks if spec.ranks is None else spec.ranks,
        engine_args={**known.engine_args, **spec.engine_args},
        frontend_args={**known.frontend_args, **spec.frontend_args},
        asleep=spec.asleep,
        pinned=known.pinned or spec.pinned,
    )


def _known_args(state: PoolState) -> Collection[str]:
    """What every rank that ever greeted takes: they import the same vLLM."""
    names = [set(r.hello.engine_arg_names) for r in state.ranks.values() if r.hello]
    return set.intersection(*names) if names else ()


def _known_frontend_args(state: PoolState) -> Collection[str]:
    names = [set(r.hello.frontend_arg_names) for r in state.ranks.values() if r.hello]
    return set.intersection(*names) if names else ()


def _check_adapters(wanted: Sequence[EngineSpec], there: Sequence[EngineSpec]) -> None:
    """A request's `model` may name an adapter: each name is one model's."""
    everyone = {spec.name: spec for spec in (*there, *wanted)}.values()
    owners = {spec.name: spec.name for spec in everyone}
    for spec in everyone:
        for adapter in adapters(spec.frontend_args):
            owner = owners.setdefault(adapter, spec.name)
            if owner != spec.name or adapter == spec.name:
                raise CommandRejected(
                    f"engine {spec.name!r}: lora_modules: the name {adapter!r} is in "
                    f"use by engine {owner!r}: give the adapter another"
                )


def _check_unused(state: PoolState, spec: EngineSpec) -> None:
    _check_adapters([spec], [engine.spec for engine in state.engines.values()])
    if existing := state.engine_named(spec.name):
        raise CommandRejected(
            f"engine name {spec.name!r} is in use ({existing.phase.value}): unload it "
            "first or take another name"
        )


def _unknown(state: PoolState, name: str) -> CommandRejected:
    names = sorted(e.name for e in state.engines.values())
    return CommandRejected(
        f"no engine {name!r}: " + (f"there are {names}" if names else "none is loaded")
    )


def _steady_engine(state: PoolState, name: str) -> Engine:
    engine = state.engine_named(name)
    if engine is None:
        raise _unknown(state, name)
    _check_steady(state, engine)
    _check_not_lost(engine)
    return engine


def _check_not_lost(engine: Engine) -> None:
    if _is_lost(engine):
        raise CommandRejected(
            f"engine {engine.name!r} lost a rank: wait until it is back, or unload it"
        )


def _check_steady(state: PoolState, engine: Engine) -> None:
    if engine.phase not in _STEADY:
        raise CommandRejected(
            f"engine {engine.name!r} is {_doing(engine)}: wait until it is done"
        )
    if switch := state.switch_of(engine):
        raise CommandRejected(
            f"engine {engine.name!r} is part of a running {switch.action}: wait until "
            "it is done"
        )


def _doing(engine: Engine) -> str:
    return "being restored" if engine.is_restoring else _DOING[engine.phase]


def _is_lost(engine: Engine) -> bool:
    return engine.phase is EnginePhase.LOST


def _awake(state: PoolState) -> list[Engine]:
    """All that have their ranks to themselves, or are about to."""
    return [e for e in state.engines.values() if switches.takes_ranks(state, e)]


def _resident(state: PoolState, engine: Engine) -> Resident:
    return Resident(
        Placement(engine.spec, engine.ranks),
        is_awake=engine.sleep_level == 0,
        last_used=engine.last_used,
        pinned=engine.spec.pinned,
        can_move=engine.phase is EnginePhase.READY and state.switch_of(engine) is None,
    )


def _views(state: PoolState, taken_by: Collection[Engine]) -> list[RankView]:
    """Every rank; one is taken when as many engines as may be awake on it are."""
    there: dict[int, list[Engine]] = {}
    for engine in taken_by:
        for rank in engine.ranks:
            there.setdefault(rank, []).append(engine)
    return [
        RankView(
            rank.rank,
            rank.hello.host_id if rank.hello else "",
            _taken(there.get(rank.rank, []), state.awake_per_rank)
            if rank.phase is RankPhase.READY
            else f"is not ready ({rank.phase.value})",
        )
        for rank in state.ranks.values()
    ]


def _taken(there: list[Engine], awake_per_rank: int) -> str:
    if len(there) < awake_per_rank:
        return ""
    names = ", ".join(f"{e.name!r} ({e.phase.value})" for e in there)
    return f"is taken by engine {names}"
