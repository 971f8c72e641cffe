"""Load, unload, apply and restore: the order in which engines are moved.

All four are one `Switch`: prepare what comes, unload what goes, build what comes. A
command is checked wholly before anything changes; after every event `advance` looks
at the phases of the switch's engines and takes the next step.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from vllm_resident.controller import engines, planner, reports
from vllm_resident.controller.planner import Placement, RankView
from vllm_resident.controller.state import (
    ENGINE_GONE,
    PROGRESS_INTERVAL_S,
    Engine,
    EnginePhase,
    PoolState,
    RankPhase,
    Switch,
    SwitchStage,
    move_switch,
    note_progress,
    report_progress,
)
from vllm_resident.controller.validation import check_spec
from vllm_resident.errors import CommandRejected, ErrorInfo
from vllm_resident.messages import (
    ApplyLayout,
    CallFailed,
    EngineSpec,
    LoadEngine,
    SwitchDone,
    UnloadEngine,
)

_STEADY = (EnginePhase.READY, EnginePhase.LOST)
_DOING = {
    EnginePhase.PREPARING: "loading",
    EnginePhase.PREPARED: "loading",
    EnginePhase.BUILDING: "loading",
    EnginePhase.CLOSING: "unloading",
    EnginePhase.UNWINDING: "being given up after a failure",
}


# ------------------------------------------------------------ commands


def load(state: PoolState, client: bytes, command: LoadEngine, now: float) -> None:
    spec = _checked(state, command.spec)
    if existing := state.engine_named(spec.name):
        raise CommandRejected(
            f"engine name {spec.name!r} is in use ({existing.phase.value}): unload it "
            "first or take another name"
        )
    ranks = planner.choose_ranks(spec, _views(state))
    placement = Placement(spec, ranks)
    _begin(state, "load", client, command, now, [placement], [], [])


def unload(state: PoolState, client: bytes, command: UnloadEngine, now: float) -> None:
    engine = state.engine_named(command.name)
    if engine is None and command.name not in state.failed:
        names = sorted(e.name for e in state.engines.values())
        raise CommandRejected(
            f"no engine {command.name!r}: "
            + (f"there are {names}" if names else "none is loaded")
        )
    if engine is not None:
        _check_steady(state, engine)
    state.failed.pop(command.name, None)
    _begin(state, "unload", client, command, now, [], [engine] if engine else [], [])


def apply(state: PoolState, client: bytes, command: ApplyLayout, now: float) -> None:
    wanted = [_checked(state, spec) for spec in command.engines]
    for engine in state.engines.values():
        _check_steady(state, engine)
    current = list(state.engines.values())
    plan = planner.plan_layout(
        # A lost engine is not what was asked for until it serves again.
        [Placement(e.spec, e.ranks) for e in current if _serves(e)],
        wanted,
        _views(state, leaving=current),
    )
    outgoing = [e for e in current if e.name not in plan.keep]
    _begin(state, "apply", client, command, now, plan.load, outgoing, plan.keep)


def _serves(engine: Engine) -> bool:
    return engine.phase is EnginePhase.READY


def _checked(state: PoolState, spec: EngineSpec) -> EngineSpec:
    """The spec with its parallel sizes complete; raises what is wrong with it."""
    if not state.world_size:
        raise CommandRejected(
            f"pool {state.name!r} is starting: no rank has said hello yet"
        )
    check_spec(spec, _known_args(state))
    return planner.complete(spec)


def _known_args(state: PoolState) -> Collection[str]:
    """What every rank that ever greeted takes: they import the same vLLM."""
    names = [set(r.hello.engine_arg_names) for r in state.ranks.values() if r.hello]
    return set.intersection(*names) if names else ()


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


def _views(state: PoolState, leaving: Collection[Engine] = ()) -> list[RankView]:
    """Every rank as it is without the engines in `leaving`."""
    taken: dict[int, str] = {}
    for engine in state.engines.values():
        if not any(engine is other for other in leaving):
            text = f"is taken by engine {engine.name!r} ({engine.phase.value})"
            taken.update(dict.fromkeys(engine.ranks, text))
    return [
        RankView(
            rank.rank,
            rank.hello.host_id if rank.hello else "",
            taken.get(rank.rank, "")
            if rank.phase is RankPhase.READY
            else f"is not ready ({rank.phase.value})",
        )
        for rank in state.ranks.values()
    ]


# ------------------------------------------------------------ the life of a switch


def _begin(
    state: PoolState,
    action: str,
    client: bytes,
    command: LoadEngine | UnloadEngine | ApplyLayout,
    now: float,
    load: list[Placement],
    outgoing: list[Engine],
    kept: list[str],
) -> None:
    deadline = now + command.timeout_s
    switch = Switch(
        action=action,
        client=client,
        call=command.call,
        started=now,
        deadline=deadline,
        next_progress=now + PROGRESS_INTERVAL_S,
        incoming=[
            engines.prepare(
                state,
                placement.spec,
                placement.ranks,
                deadline=deadline,
                load_timeout_s=command.timeout_s,
                now=now,
            )
            for placement in load
        ],
        outgoing=outgoing,
        kept=kept,
    )
    _open(state, switch, now)


def _open(state: PoolState, switch: Switch, now: float) -> None:
    state.switches.append(switch)
    for engine in switch.incoming:
        note_progress(state, engine, "prepare", now)


def restore(state: PoolState, now: float) -> None:
    """Load again, on the same ranks, each lost engine whose ranks are all back."""
    for engine in list(state.engines.values()):
        is_back = all(state.ranks[r].phase is RankPhase.READY for r in engine.ranks)
        if engine.phase is not EnginePhase.LOST or engine.waiting or not is_back:
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
        _open(
            state,
            Switch(
                action="restore",
                client=None,
                call=-1,
                started=now,
                deadline=deadline,
                next_progress=now,
                incoming=[incoming],
                outgoing=[],
            ),
            now,
        )


def advance(state: PoolState, switch: Switch, now: float) -> bool:
    """Take the next step of a switch; False if it has to wait for its engines."""
    _note_failures(switch)
    match switch.stage:
        case SwitchStage.PREPARING if switch.failed:
            _give_up(state, switch, now)
        case SwitchStage.PREPARING if _all_in(switch.incoming, EnginePhase.PREPARED):
            _unload_outgoing(state, switch, now)
        case SwitchStage.UNLOADING if _all_in(switch.outgoing, *ENGINE_GONE):
            _build_incoming(state, switch, now)
        case SwitchStage.BUILDING | SwitchStage.UNWINDING if all(
            _is_settled(engine) for engine in switch.incoming
        ):
            _finish(state, switch, now)
        case _:
            return False
    return True


def _note_failures(switch: Switch) -> None:
    coming = [engine for engine in switch.incoming if engine.ready_at is None]
    closed = [engine for engine in switch.outgoing if engine.close_began is not None]
    for engine in (*coming, *closed):
        if engine.error and not any(engine is other for other in switch.failed):
            switch.failed.append(engine)


def _all_in(some: list[Engine], *phases: EnginePhase) -> bool:
    return all(engine.phase in phases for engine in some)


def _is_settled(engine: Engine) -> bool:
    """It reached its end, or had been ready, or waits for lost ranks (a restore)."""
    is_at_end = engine.phase in (*ENGINE_GONE, *_STEADY)
    return is_at_end or engine.ready_at is not None


def _give_up(state: PoolState, switch: Switch, now: float) -> None:
    """An engine cannot be prepared: nothing was changed yet, and nothing will be."""
    move_switch(switch, SwitchStage.UNWINDING)
    error = switch.failed[0].error
    for engine in switch.incoming:
        if engine.phase in (EnginePhase.PREPARING, EnginePhase.PREPARED):
            engines.unwind(state, engine, error, now)


def _unload_outgoing(state: PoolState, switch: Switch, now: float) -> None:
    move_switch(switch, SwitchStage.UNLOADING)
    for engine in switch.outgoing:
        if engine.phase in _STEADY:
            engines.close(state, engine, switch.deadline, now)


def _build_incoming(state: PoolState, switch: Switch, now: float) -> None:
    for engine in switch.outgoing:
        if engine.close_began is not None and engine.error is None:
            switch.reports.append(reports.unload_report(engine, now))
    move_switch(switch, SwitchStage.BUILDING)
    for engine in switch.incoming:
        if engine.phase is EnginePhase.PREPARED:
            engines.build(state, engine, now)


def _finish(state: PoolState, switch: Switch, now: float) -> None:
    # Rolling an apply back belongs here: `switch.outgoing` still has the specs and
    # ranks of what was unloaded, and nothing of what failed is left.
    _drop_switch(state, switch)
    switch.reports.extend(
        reports.load_report(e) for e in switch.incoming if e.ready_at is not None
    )
    if switch.failed:
        answer = CallFailed(call=switch.call, error=_failure(switch))
        state.send_to_client(switch.client, answer)
        return
    if switch.action == "apply":
        state.failed.clear()
    report = reports.switch_report(switch, now)
    state.send_to_client(switch.client, SwitchDone(call=switch.call, report=report))


def _drop_switch(state: PoolState, switch: Switch) -> None:
    state.switches = [other for other in state.switches if other is not switch]


def _failure(switch: Switch) -> ErrorInfo:
    """The first error; of an apply that got as far as unloading, also what is left."""
    error = switch.failed[0].error
    assert error is not None
    if switch.action != "apply" or switch.stage is SwitchStage.UNWINDING:
        return error
    unloaded = [e.name for e in switch.outgoing if e.phase in ENGINE_GONE]
    loaded = [e.name for e in switch.incoming if e.ready_at is not None]
    missing = [e.name for e in switch.incoming if e.ready_at is None]
    text = (
        f"{error.message} (the layout was applied in part: unloaded {unloaded}, loaded "
        f"{loaded}, not loaded {missing}, kept {switch.kept})"
    )
    # Something was changed: whatever the rank called it, this is no rejection.
    kind = "RankFailure" if error.kind == "CommandRejected" else error.kind
    return msgspec.structs.replace(error, kind=kind, message=text)


def tick(state: PoolState, now: float) -> None:
    """Show who waits that the switch is alive, engine by engine."""
    for switch in state.switches:
        if switch.client is None or now < switch.next_progress:
            continue
        switch.next_progress = now + PROGRESS_INTERVAL_S
        for engine in (*switch.incoming, *switch.outgoing):
            if engine.phase not in (*ENGINE_GONE, *_STEADY):
                report_progress(state, switch, engine, now)


def client_gone(state: PoolState, client: bytes) -> None:
    """What was begun goes on; nobody is told."""
    for switch in state.switches:
        if switch.client == client:
            switch.client = None
