"""Calls for models that are not awake: queued, and brought to their models on demand.

An open call (`AwaitEngine`) waits here until its model is up or it is refused. After
every event `policy.decide` says which model comes up next and what sleeps for it; the
pool's own switches carry that out (`own_switches.py`). Engines that a command moves are
left alone until it is done. Calls for engines that are awake do not come by here: their
number is reported.
"""

from __future__ import annotations

import math

from vllm_resident.controller import outlook, own_switches, policy, usage
from vllm_resident.controller.effects import Note
from vllm_resident.controller.policy import (
    BringUp,
    GiveUp,
    PoolView,
    PutToSleep,
    Refused,
)
from vllm_resident.controller.state import Engine, EnginePhase, PoolState, Switch
from vllm_resident.controller.usage import Caller
from vllm_resident.errors import CommandRejected, ErrorInfo
from vllm_resident.messages import (
    AwaitEngine,
    CallFailed,
    EngineAwake,
    EngineRefused,
    Progress,
    ReportCalls,
)

# Who waits hears so often that the pool is alive, and if not is found out.
PROGRESS_INTERVAL_S = 3.0
# Ranks that are starting are worth asking for again after so long.
STARTING_S = 5.0


# ------------------------------------------------------------ who waits


def await_engine(
    state: PoolState, client: bytes, command: AwaitEngine, now: float
) -> None:
    """Queue the call, or refuse it at once."""
    name = command.engine
    waited_s = command.waited_s if 0 <= command.waited_s < math.inf else 0.0
    caller = Caller(
        client,
        command.call,
        name,
        now - waited_s,
        now + PROGRESS_INTERVAL_S,
        command.is_held,
    )
    is_up = _awake(state, name) is not None
    refused = None if is_up else _refusal(state, name, now, is_held=command.is_held)
    if refused:
        _answer_refused(state, caller, refused)
        return
    state.demand.callers[client, command.call] = caller
    if not waited_s:
        usage.note_calls(state.demand.usage(name), 1, now)


def _refusal(
    state: PoolState, name: str, now: float, *, is_held: bool = False
) -> Refused | None:
    failed = state.failed.get(name)
    is_known = name in _known(state)
    if failed and failed.error and not is_known:
        return Refused(
            f"model {name!r} failed and must be loaded again: {failed.error.message}",
            usage.MAX_BACK_OFF_S,
        )
    known = state.demand.usages.get(name)
    if known and now < known.retry_at and is_known:
        return _backing_off(name, known, now)
    view = outlook.draw(state, now)
    if not state.was_started and is_known:
        return Refused(
            f"the pool is starting: {len(view.ranks)} of {state.world_size} ranks are "
            "there",
            STARTING_S,
        )
    return policy.admit(view, name, now, is_queued=is_held)


def _backing_off(name: str, known: usage.Usage, now: float) -> Refused:
    text = f"model {name!r} could not be brought up: {known.error}"
    return Refused(text, known.retry_at - now)


def end(state: PoolState, client: bytes, call: int) -> None:
    """The caller was served or has gone. No-op for a call that has ended."""
    state.demand.callers.pop((client, call), None)


def client_gone(state: PoolState, client: bytes) -> None:
    for key in [key for key in state.demand.callers if key[0] == client]:
        del state.demand.callers[key]


def fail_all(state: PoolState, error: ErrorInfo) -> None:
    """The pool stops: everybody who waits is told."""
    for caller in state.demand.callers.values():
        if caller.is_waiting:
            state.send_to_client(
                caller.client, CallFailed(call=caller.call, error=error)
            )
    state.demand.callers.clear()


def note_calls(state: PoolState, report: ReportCalls, now: float) -> None:
    """What a gateway served without asking; of models that are not there, nothing."""
    there = _known(state)
    for name, calls in report.models.items():
        if name not in there:
            continue
        known = state.demand.usage(name)
        if calls.num_begun > 0:
            usage.note_calls(known, calls.num_begun, now)
        if calls.num_ended > 0 and 0 <= calls.service_s < math.inf:
            usage.note_service(known, calls.num_ended, calls.service_s)


def tick(state: PoolState, now: float) -> None:
    """Show who waits that the pool is alive; forget whom the leaders' counts have."""
    demand = state.demand
    for caller in list(demand.callers.values()):
        if caller.told_at is not None and now - caller.told_at >= outlook.TURN_S:
            end(state, caller.client, caller.call)
        if not caller.is_waiting or now < caller.next_progress:
            continue
        caller.next_progress = now + PROGRESS_INTERVAL_S
        progress = Progress(
            call=caller.call,
            engine=caller.engine,
            phase="queued",
            elapsed_s=now - caller.arrived,
        )
        state.send_to_client(caller.client, progress)
    if _has_idle_limits(state):
        demand.look_again_at = now


# ------------------------------------------------------------ what is decided


def settle(state: PoolState, now: float) -> None:
    """After every event: learn of what has ended, then do what the policy wants."""
    demand = state.demand
    _learn(state, now)
    _tell(state, now)
    if not state.was_started:
        demand.look_again_at = math.inf
        return
    if now < demand.look_again_at and not _is_anybody_called(state):
        return
    view = outlook.draw(state, now)
    decision = policy.decide(view, now)
    for action in decision.actions:
        match action:
            case BringUp():
                _bring_up(state, view, action, now)
            case PutToSleep():
                _put_to_sleep(state, action.model, now)
            case GiveUp():
                _give_up(state, action, now)
    retries = [u.retry_at for u in demand.usages.values() if u.retry_at > now]
    demand.look_again_at = min(decision.look_again_at or math.inf, *retries, math.inf)


def _tell(state: PoolState, now: float) -> None:
    """Call those whose model is up; refuse those whose model is no more."""
    for name, waiting in state.demand.waiting().items():
        if (engine := _awake(state, name)) is not None:
            for caller in waiting:
                caller.told_at, caller.generation = now, engine.generation
                answer = EngineAwake(call=caller.call, generation=engine.generation)
                state.send_to_client(caller.client, answer)
        elif name not in _known(state):
            refused = _refusal(state, name, now)
            assert refused is not None
            _refuse(state, waiting, refused)


def _bring_up(state: PoolState, view: PoolView, action: BringUp, now: float) -> None:
    queue = next(m.queue for m in view.models if m.name == action.model)
    cause = f"{len(queue)} waiting, for up to {now - min(queue):.2f} s"
    try:
        own_switches.bring_up(state, action, cause, now)
    except CommandRejected as error:
        _note_failure(state, action.model, error.message, now)


def _put_to_sleep(state: PoolState, name: str, now: float) -> None:
    ttl_s = state.demand.limits_of(name).idle_ttl_s
    try:
        own_switches.put_to_sleep(state, name, f"idle for {ttl_s:g} s", now)
    except CommandRejected as error:
        _note_failure(state, name, error.message, now)


def _give_up(state: PoolState, action: GiveUp, now: float) -> None:
    """Of those that wait at a leader, whoever announced them as held is told."""
    max_wait_s = state.demand.limits_of(action.model).max_wait_s
    assert max_wait_s is not None
    late = [
        caller
        for caller in state.demand.waiting().get(action.model, ())
        if caller.arrived + max_wait_s <= now
    ]
    _refuse(state, late, action.refusal)


def _is_anybody_called(state: PoolState) -> bool:
    return any(caller.is_waiting for caller in state.demand.callers.values()) or any(
        engine.phase is EnginePhase.ASLEEP and engine.num_frontend_requests
        for engine in state.engines.values()
    )


def _has_idle_limits(state: PoolState) -> bool:
    names = [e.name for e in state.engines.values() if e.phase is EnginePhase.READY]
    return any(state.demand.limits_of(n).idle_ttl_s is not None for n in names)


# ------------------------------------------------------------ what is learned


def _learn(state: PoolState, now: float) -> None:
    ended, state.ended = state.ended, []
    for switch in ended:
        _note_moves(state, switch)
        if switch.on_demand and switch.error:
            _note_failure(state, switch.on_demand, switch.error.message, now)
    for name, engine in state.failed.items():
        known = state.demand.usage(name)
        if known.failed_generation < engine.generation and engine.error:
            known.failed_generation = engine.generation
            _note_failure(state, name, engine.error.message, now)
    there = {*_known(state), *state.failed}
    for name in [name for name in state.demand.usages if name not in there]:
        del state.demand.usages[name]


def _note_moves(state: PoolState, switch: Switch) -> None:
    befores = {move.engine.name: move.before for move in switch.moves}
    for report in switch.reports:
        seconds = report.seconds - report.phases.get("wait", 0.0)
        move = report.action
        if move == "wake_up":
            move = f"wake_up {befores.get(report.name) or 1}"
        if move in usage.GUESSED_S:
            usage.note_move(state.demand, report.name, move, seconds)
        if report.action in ("load", "wake_up") and not switch.error:
            state.demand.usage(report.name).retry_at = -math.inf


def _note_failure(state: PoolState, name: str, error: str, now: float) -> None:
    """It is left alone for a while; who waits for it is told."""
    known = state.demand.usage(name)
    usage.note_failure(known, error, now)
    state.effects.append(
        Note(f"on demand: {name!r}: {error} (again in {known.retry_at - now:g} s)")
    )
    _refuse(state, state.demand.waiting().get(name, []), _backing_off(name, known, now))


# ------------------------------------------------------------ parts


def _refuse(state: PoolState, callers: list[Caller], refused: Refused) -> None:
    for caller in callers:
        end(state, caller.client, caller.call)
        _answer_refused(state, caller, refused)


def _answer_refused(state: PoolState, caller: Caller, refused: Refused) -> None:
    state.send_to_client(
        caller.client,
        EngineRefused(
            call=caller.call,
            reason=refused.reason,
            retry_after_s=max(0.0, refused.retry_after_s),
            is_unknown=refused.is_unknown,
        ),
    )


def _awake(state: PoolState, name: str) -> Engine | None:
    """Its engine, if that takes requests; in a move the old one hides the new."""
    engine = state.engine_named(name)
    return engine if engine and engine.phase is EnginePhase.READY else None


def _known(state: PoolState) -> set[str]:
    """What may be called: engines that are there, and declared models."""
    return {*state.models, *(engine.name for engine in state.engines.values())}
