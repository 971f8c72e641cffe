"""What a switch took and what the pool looks like, as the messages clients get."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vllm_resident.config import adapters
from vllm_resident.controller.state import (
    ENGINE_MOVING,
    Engine,
    EnginePhase,
    Move,
    PoolState,
    Rank,
    RankPhase,
    Switch,
)
from vllm_resident.messages import (
    EngineBuilt,
    EngineClosed,
    EngineReport,
    EngineResumed,
    EngineStatus,
    EngineSuspended,
    MoveStatus,
    PhaseBegan,
    PoolStatus,
    RankGauges,
    RankStatus,
    SwitchReport,
    SwitchStatus,
)

_NO_GAUGES = RankGauges(0, 0, 0, 0, 0)


def of_moves(switch: Switch, now: float) -> list[EngineReport]:
    """Of the engines that the switch loaded and unloaded; of those that slept or woke
    it has the reports already."""
    reports = []
    for move in switch.moves:
        engine = move.engine
        is_new = move.before is None or move.rebuilt
        if is_new and engine.ready_at is not None and engine.build_began is not None:
            reports.append(_load_report(engine, switch))
        elif engine.phase is EnginePhase.CLOSED and engine.close_began is not None:
            reports.append(_unload_report(engine, switch, now))
    return reports


def _load_report(engine: Engine, switch: Switch) -> EngineReport:
    """The phases add up to `seconds`: "prepare", then "wait" for what goes in the same
    switch, then the slowest rank's own, then what no rank accounts for."""
    assert engine.prepared_at is not None
    assert engine.build_began is not None
    assert engine.ready_at is not None
    before = {
        "prepare": engine.prepared_at - engine.started,
        "wait": engine.build_began - engine.prepared_at,
    }
    report = _report(
        engine, "load", before, engine.built, engine.ready_at - engine.started
    )
    return msgspec.structs.replace(report, began_s=engine.started - switch.started)


def _unload_report(engine: Engine, switch: Switch, now: float) -> EngineReport:
    began = now if engine.close_began is None else engine.close_began
    report = _report(engine, "unload", {}, engine.closed, engine.since - began)
    return msgspec.structs.replace(report, began_s=began - switch.started)


def sleep_report(engine: Engine, switch: Switch, now: float) -> EngineReport:
    return _motion_report(engine, switch, "sleep", engine.suspended, now)


def wake_report(engine: Engine, switch: Switch, now: float) -> EngineReport:
    return _motion_report(engine, switch, "wake_up", engine.resumed, now)


def _motion_report(
    engine: Engine,
    switch: Switch,
    action: str,
    answers: Mapping[int, EngineSuspended] | Mapping[int, EngineResumed],
    now: float,
) -> EngineReport:
    report = _report(engine, action, {}, answers, now - engine.motion_began)
    return msgspec.structs.replace(
        report,
        began_s=engine.motion_began - switch.started,
        moved_bytes=sum(answer.moved_bytes for answer in answers.values()),
        moved_s=max((answer.moved_s for answer in answers.values()), default=0.0),
        link_bytes_per_s=sum(answer.link_bytes_per_s for answer in answers.values()),
        sleep_level=engine.sleep_level,
    )


def _report(
    engine: Engine,
    action: str,
    phases: dict[str, float],
    answers: Mapping[int, EngineBuilt]
    | Mapping[int, EngineClosed]
    | Mapping[int, EngineSuspended]
    | Mapping[int, EngineResumed],
    seconds: float,
) -> EngineReport:
    slowest: dict[str, float] = max(
        (answer.phases for answer in answers.values()),
        key=lambda phases: sum(phases.values()),
        default={},
    )
    phases = phases | slowest
    phases["coordinate"] = max(0.0, seconds - sum(phases.values()))
    return EngineReport(
        name=engine.name,
        action=action,
        generation=engine.generation,
        ranks=engine.ranks,
        seconds=seconds,
        phases=phases,
        memory_before_bytes={r: a.memory_before_bytes for r, a in answers.items()},
        memory_after_bytes={r: a.memory_after_bytes for r, a in answers.items()},
        rank_phases={r: a.phases for r, a in answers.items()},
    )


def switch_report(switch: Switch, now: float) -> SwitchReport:
    reports = sorted(switch.reports, key=lambda report: report.began_s)
    phases: dict[str, float] = {}
    for report in reports:
        prefix = f"{report.name}." if report.action in ("unload", "sleep") else ""
        for phase, seconds in report.phases.items():
            phases[prefix + phase] = phases.get(prefix + phase, 0.0) + seconds
    return SwitchReport(
        action=switch.action,
        seconds=now - switch.started,
        phases=phases,
        engines=reports,
        kept=switch.kept,
        path=switch.path,
        unavailable_s=_unavailable_s(switch),
        error=switch.error.message if switch.error else "",
    )


def _unavailable_s(switch: Switch) -> float:
    if switch.aside_began is None or switch.up_at is None:
        return 0.0
    return switch.up_at - switch.aside_began


def pool_status(state: PoolState, now: float) -> PoolStatus:
    return PoolStatus(
        pool=state.name,
        phase=state.phase.value,
        world_size=state.world_size,
        controller_pid=state.controller_pid,
        uptime_s=now - state.started,
        ranks=[_rank_status(state, rank) for rank in state.ranks.values()],
        engines=_engine_rows(state, now),
        num_stale_messages=state.num_stale_messages,
        num_protocol_errors=state.num_protocol_errors,
        host_memory_bytes=state.host_memory_bytes,
        device_memory_bytes=state.device_memory_bytes,
        max_communicators=state.num_communicators,
        max_communicator_bytes=state.communicator_memory_bytes,
        models=sorted(state.models),
        waiting=state.demand.num_waiting(),
        switches=[switch_status(state, each, now) for each in state.switches],
        adapters=_adapters(state),
    )


def switch_status(state: PoolState, switch: Switch, now: float) -> SwitchStatus:
    return SwitchStatus(
        number=switch.number,
        action=switch.action,
        cause=switch.cause,
        stage=switch.stage.value,
        elapsed_s=now - switch.started,
        expected_s=_expected_s(state, switch),
        path=list(switch.path),
        moves=[_move_status(switch, move) for move in switch.moves],
        error=switch.error.message if switch.error else "",
    )


def _move_status(switch: Switch, move: Move) -> MoveStatus:
    engine = move.engine
    return MoveStatus(
        name=engine.name,
        generation=engine.generation,
        ranks=engine.ranks,
        before=move.before,
        after=move.after,
        phase=engine.phase.value,
        waiting=sorted(engine.waiting),
        rank_phases={
            rank: [
                PhaseBegan(phase, began - switch.started)
                for phase, began in begun
                if began >= switch.started
            ]
            for rank, begun in sorted(engine.rank_phases.items())
        },
    )


def _expected_s(state: PoolState, switch: Switch) -> float:
    """What goes, then what comes: as it took each of these engines before, where it was
    done before. Draining is not in it."""
    going = [_learned_s(state, m) for m in switch.moves if m.before == 0]
    coming = [_learned_s(state, m) for m in switch.moves if m.before != 0]
    if None in (*going, *coming):
        return 0.0
    return sum(max((s or 0.0 for s in some), default=0.0) for some in (going, coming))


def _learned_s(state: PoolState, move: Move) -> float | None:
    """None where the model has not made the move yet."""
    if move.before is None:
        kind = "load"
    elif move.after == 0:
        kind = f"wake_up {move.before}"
    elif move.before == 0:
        kind = "sleep"
    else:
        return 0.0  # a sleeper that goes deeper, or away
    known = state.demand.usages.get(move.engine.name)
    return known.move_s.get(kind) if known else None


def _adapters(state: PoolState) -> dict[str, str]:
    """Whose each LoRA adapter is."""
    declared = {
        adapter: name
        for name, spec in state.models.items()
        for adapter in adapters({**spec.engine_args, **spec.frontend_args})
    }
    loaded = {
        adapter: engine.name
        for engine in state.engines.values()
        for adapter in adapters(engine.spec.frontend_args)
    }
    return {**declared, **loaded}


def _rank_status(state: PoolState, rank: Rank) -> RankStatus:
    gauges = rank.gauges or _NO_GAUGES
    # A rank that still gives up what it held before is not there for the caller yet.
    phase = RankPhase.EXPECTED if rank.phase is RankPhase.JOINING else rank.phase
    names = [e.name for e in state.engines.values() if rank.rank in e.ranks]
    return RankStatus(
        rank=rank.rank,
        phase=phase.value,
        pid=rank.pid,
        host=rank.host,
        device=rank.hello.device if rank.hello else "",
        incarnation=rank.hello.incarnation if rank.hello else 0,
        engines=list(dict.fromkeys(names)),
        memory_used_bytes=gauges.memory_used_bytes,
        memory_total_bytes=gauges.memory_total_bytes,
        heartbeat_age_s=rank.silent_s,
        num_file_descriptors=gauges.num_file_descriptors,
        num_threads=gauges.num_threads,
        num_shm_segments=gauges.num_shm_segments,
        num_sockets=gauges.num_sockets,
        num_process_groups=gauges.num_process_groups,
        num_engines=gauges.num_engines,
        num_kept_communicators=gauges.num_kept_communicators,
        kept_communicator_bytes=gauges.kept_communicator_bytes,
        num_suspended_communicators=gauges.num_suspended_communicators,
    )


def _engine_rows(state: PoolState, now: float) -> list[EngineStatus]:
    """One row per name: the engine that has it now, else its last failure."""
    rows: dict[str, Engine] = {}
    for engine in (*state.engines.values(), *state.failed.values()):
        rows.setdefault(engine.name, engine)
    return [_engine_status(state, engine, now) for engine in rows.values()]


def _engine_status(state: PoolState, engine: Engine, now: float) -> EngineStatus:
    is_moving = engine.phase in (*ENGINE_MOVING, EnginePhase.PREPARED)
    requests = [r for r in state.requests.values() if r.generation == engine.generation]
    num_requests = len(requests) + engine.num_frontend_requests
    return EngineStatus(
        name=engine.name,
        model=engine.spec.model,
        phase=engine.phase.value,
        generation=engine.generation,
        ranks=engine.ranks,
        engine_args={**engine.spec.engine_args, **engine.spec.frontend_args},
        num_requests=num_requests,
        progress=engine.progress[-1] if is_moving and engine.progress else "",
        error=engine.error.message if engine.error else "",
        sleep_level=engine.sleep_level,
        pinned=engine.spec.pinned,
        idle_s=now - engine.last_used if engine.ready_at and not num_requests else 0.0,
        memory=engine.memory,
    )
