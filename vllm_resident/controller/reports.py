"""What a switch took and what the pool looks like, as the messages clients get."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_resident.controller.state import (
    Engine,
    EnginePhase,
    PoolState,
    Rank,
    RankPhase,
    Switch,
)
from vllm_resident.messages import (
    EngineBuilt,
    EngineClosed,
    EngineReport,
    EngineStatus,
    PoolStatus,
    RankGauges,
    RankStatus,
    SwitchReport,
)

_NO_GAUGES = RankGauges(0, 0, 0, 0, 0)


def load_report(engine: Engine) -> EngineReport:
    """Of an engine that became ready. The phases add up to `seconds`: "prepare", then
    "wait" for the unloads of the same switch, then the slowest rank's own, then what
    no rank accounts for."""
    assert engine.prepared_at is not None
    assert engine.build_began is not None
    assert engine.ready_at is not None
    before = {
        "prepare": engine.prepared_at - engine.started,
        "wait": engine.build_began - engine.prepared_at,
    }
    return _report(
        engine, "load", before, engine.built, engine.ready_at - engine.started
    )


def unload_report(engine: Engine, now: float) -> EngineReport:
    """Of an engine of which nothing is left."""
    began = now if engine.close_began is None else engine.close_began
    return _report(engine, "unload", {}, engine.closed, now - began)


def _report(
    engine: Engine,
    action: str,
    phases: dict[str, float],
    answers: Mapping[int, EngineBuilt] | Mapping[int, EngineClosed],
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
    )


def switch_report(switch: Switch, now: float) -> SwitchReport:
    phases: dict[str, float] = {}
    for report in switch.reports:
        prefix = f"{report.name}." if report.action == "unload" else ""
        for phase, seconds in report.phases.items():
            phases[prefix + phase] = phases.get(prefix + phase, 0.0) + seconds
    return SwitchReport(
        action=switch.action,
        seconds=now - switch.started,
        phases=phases,
        engines=switch.reports,
        kept=switch.kept,
    )


def pool_status(state: PoolState, now: float) -> PoolStatus:
    return PoolStatus(
        pool=state.name,
        phase=state.phase.value,
        world_size=state.world_size,
        controller_pid=state.controller_pid,
        uptime_s=now - state.started,
        ranks=[_rank_status(state, rank) for rank in state.ranks.values()],
        engines=_engine_rows(state),
        num_stale_messages=state.num_stale_messages,
        num_protocol_errors=state.num_protocol_errors,
    )


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
    )


def _engine_rows(state: PoolState) -> list[EngineStatus]:
    """One row per name: the engine that has it now, else its last failure."""
    rows: dict[str, Engine] = {}
    for engine in (*state.engines.values(), *state.failed.values()):
        rows.setdefault(engine.name, engine)
    return [_engine_status(state, engine) for engine in rows.values()]


def _engine_status(state: PoolState, engine: Engine) -> EngineStatus:
    is_moving = engine.phase not in (
        EnginePhase.READY, EnginePhase.LOST, EnginePhase.FAILED,
    )  # fmt: skip
    requests = [r for r in state.requests.values() if r.generation == engine.generation]
    return EngineStatus(
        name=engine.name,
        model=engine.spec.model,
        phase=engine.phase.value,
        generation=engine.generation,
        ranks=engine.ranks,
        engine_args=engine.spec.engine_args,
        num_requests=len(requests),
        progress=engine.progress[-1] if is_moving and engine.progress else "",
        error=engine.error.message if engine.error else "",
    )
