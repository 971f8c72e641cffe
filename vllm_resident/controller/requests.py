"""Generate calls: from the client to an engine's leader and back.

A request is forgotten with its final answer; what a leader says of it afterwards is
ignored quietly, because an abort and the last output may cross on the wire. What comes
for an engine that a switch is moving is held: sent to the leader when the engine serves
again, refused when the switch leaves it asleep or gone.
"""

from __future__ import annotations

import msgspec

from vllm_resident.controller.state import (
    ENGINE_GONE,
    PROGRESS_INTERVAL_S,
    Engine,
    EnginePhase,
    PoolState,
    Request,
)
from vllm_resident.errors import (
    CommandRejected,
    ErrorInfo,
    RankTimeout,
    ResidentError,
    from_info,
)
from vllm_resident.messages import (
    AbortRequest,
    AddRequest,
    CallFailed,
    Generate,
    GenerateOutput,
    Progress,
    RequestFailed,
    RequestOutput,
)

_SERVING = (
    EnginePhase.READY,
    EnginePhase.DRAINING,
    EnginePhase.SUSPENDING,
    EnginePhase.CLOSING,
)
# Those that an engine may come out of ready, if a switch goes on or goes back.
_HOLDING = (
    EnginePhase.DRAINING,
    EnginePhase.SUSPENDING,
    EnginePhase.ASLEEP,
    EnginePhase.RESUMING,
)


def generate(state: PoolState, client: bytes, command: Generate, now: float) -> None:
    """Hand the call to the engine's leader; raises what the caller is answered."""
    engine = _serving_engine(state, command.engine)
    if not command.prompts:
        raise CommandRejected("no prompts: give at least one text or token id list")
    number = state.next_request
    state.next_request += 1
    request = Request(
        number=number,
        client=client,
        call=command.call,
        engine=engine.name,
        generation=engine.generation,
        stream=command.stream,
        started=now,
        deadline=now + command.timeout_s,
        timeout_s=command.timeout_s,
        next_progress=now + PROGRESS_INTERVAL_S,
        held=AddRequest(
            generation=engine.generation,
            request=number,
            prompts=command.prompts,
            sampling_params=command.sampling_params,
            stream=command.stream,
        ),
    )
    state.requests[number] = request
    if engine.phase is EnginePhase.READY:
        _send(state, engine, request)


def _send(state: PoolState, engine: Engine, request: Request) -> None:
    assert request.held is not None
    message = msgspec.structs.replace(request.held, generation=engine.generation)
    request.held = None
    request.generation = engine.generation
    state.send_to_rank(engine.leader, message)


def release(state: PoolState, engine: Engine) -> None:
    """The engine serves again: hand it what was held for it."""
    for request in of_engine(state, engine.generation):
        if request.held is not None:
            _send(state, engine, request)


def adopt(state: PoolState, old: Engine, new: Engine) -> None:
    """What is held for `old` is held for `new`, which takes its place."""
    for request in of_engine(state, old.generation):
        if request.held is not None:
            request.generation = new.generation


def refuse_held(state: PoolState, engine: Engine) -> None:
    """The switch is over and the engine does not serve."""
    error = _not_serving(engine).to_info()
    for request in of_engine(state, engine.generation):
        if request.held is not None:
            fail(state, request, error)


def in_flight(state: PoolState, engine: Engine) -> int:
    """How many requests its leader has, of clients and of frontends."""
    own = sum(r.held is None for r in of_engine(state, engine.generation))
    return own + engine.num_frontend_requests


def _serving_engine(state: PoolState, name: str) -> Engine:
    engine = state.engine_named(name)
    if engine is None and (failed := state.failed.get(name)) and failed.error:
        raise CommandRejected(
            f"engine {name!r} failed: {failed.error.message}; load it again"
        )
    if engine is None:
        names = sorted({e.name for e in state.engines.values()})
        known = f"there are {names}" if names else "none is loaded"
        raise CommandRejected(f"no engine {name!r}: {known}")
    if engine.phase is EnginePhase.LOST and engine.error:
        raise from_info(engine.error)
    is_held = engine.phase in _HOLDING and state.switch_of(engine) is not None
    if engine.phase is not EnginePhase.READY and not is_held:
        raise _not_serving(engine)
    return engine


def _not_serving(engine: Engine) -> ResidentError:
    if engine.error is not None:
        return from_info(engine.error)
    if engine.phase in ENGINE_GONE:
        return CommandRejected(f"engine {engine.name!r} was unloaded")
    if engine.phase is EnginePhase.ASLEEP:
        return CommandRejected(
            f"engine {engine.name!r} is asleep (level {engine.sleep_level}): wake it up"
        )
    return CommandRejected(f"engine {engine.name!r} is {engine.phase.value}: try again")


def on_output(state: PoolState, message: RequestOutput) -> None:
    request = state.requests.get(message.request)
    if request is None:
        return
    completions = message.completions
    if not request.stream:
        request.completions.extend(completions)
        if not message.done:
            return
        completions = sorted(
            request.completions, key=lambda c: (c.prompt_index, c.index)
        )
    if message.done:
        _forget(state, request)
    state.send_to_client(
        request.client,
        GenerateOutput(call=request.call, completions=completions, done=message.done),
    )


def on_failed(state: PoolState, message: RequestFailed) -> None:
    if request := state.requests.get(message.request):
        fail(state, request, message.error)


def fail(state: PoolState, request: Request, error: ErrorInfo) -> None:
    _forget(state, request)
    state.send_to_client(request.client, CallFailed(call=request.call, error=error))


def _forget(state: PoolState, request: Request) -> None:
    del state.requests[request.number]
    if engine := state.engines.get(request.generation):
        engine.last_used = state.now


def fail_all(state: PoolState, generation: int, error: ErrorInfo) -> None:
    """The engine cannot answer any more: neither is its leader asked to abort. What is
    held waits for what the switch makes of it."""
    for request in of_engine(state, generation):
        if request.held is None:
            fail(state, request, error)


def of_engine(state: PoolState, generation: int) -> list[Request]:
    return [r for r in state.requests.values() if r.generation == generation]


def cancel(state: PoolState, client: bytes, call: int) -> None:
    """Abort; the leader's last output ends the call. No-op for an ended call."""
    for request in list(state.requests.values()):
        if (request.client, request.call) != (client, call):
            continue
        if request.held is None:
            _abort(state, request)
        else:
            fail(state, request, CommandRejected("cancelled before it began").to_info())


def client_gone(state: PoolState, client: bytes) -> None:
    """Abort what the client was waiting for and forget it."""
    for request in [r for r in state.requests.values() if r.client == client]:
        _abort(state, request)
        del state.requests[request.number]


def not_delivered(state: PoolState, number: int, error: ResidentError) -> None:
    """The request could not be sent to its leader (it is too large)."""
    if request := state.requests.get(number):
        fail(state, request, error.to_info())


def tick(state: PoolState, now: float) -> None:
    """End what is past its deadline; show the others that the pool is alive."""
    for request in list(state.requests.values()):
        if now >= request.deadline:
            _abort(state, request)
            fail(state, request, _too_late(state, request).to_info())
        elif now >= request.next_progress:
            request.next_progress = now + PROGRESS_INTERVAL_S
            state.send_to_client(
                request.client,
                Progress(
                    call=request.call,
                    engine=request.engine,
                    phase="generate" if request.held is None else "held",
                    elapsed_s=now - request.started,
                ),
            )


def _too_late(state: PoolState, request: Request) -> RankTimeout:
    engine = state.engines.get(request.generation)
    return RankTimeout(
        f"generate on {request.engine!r} took longer than {request.timeout_s:g} s",
        rank=engine.leader if engine else None,
        generation=request.generation,
        phase="generate",
    )


def _abort(state: PoolState, request: Request) -> None:
    engine = state.engines.get(request.generation)
    if engine is None or request.held is not None:
        return
    if engine.phase in _SERVING and state.is_attached(engine.leader):
        state.send_to_rank(
            engine.leader,
            AbortRequest(generation=engine.generation, request=request.number),
        )
