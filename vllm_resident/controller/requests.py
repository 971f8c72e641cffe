"""Generate calls: from the client to an engine's leader and back.

A request is forgotten with its final answer; what a leader says of it afterwards is
ignored quietly, because an abort and the last output may cross on the wire.
"""

from __future__ import annotations

from vllm_resident.controller.state import (
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

_SERVING = (EnginePhase.READY, EnginePhase.CLOSING)


def generate(state: PoolState, client: bytes, command: Generate, now: float) -> None:
    """Hand the call to the engine's leader; raises what the caller is answered."""
    engine = _serving_engine(state, command.engine)
    if not command.prompts:
        raise CommandRejected("no prompts: give at least one text or token id list")
    number = state.next_request
    state.next_request += 1
    state.requests[number] = Request(
        number=number,
        client=client,
        call=command.call,
        generation=engine.generation,
        stream=command.stream,
        started=now,
        deadline=now + command.timeout_s,
        timeout_s=command.timeout_s,
        next_progress=now + PROGRESS_INTERVAL_S,
    )
    state.send_to_rank(
        engine.leader,
        AddRequest(
            generation=engine.generation,
            request=number,
            prompts=command.prompts,
            sampling_params=command.sampling_params,
            stream=command.stream,
        ),
    )


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
    if engine.phase is not EnginePhase.READY:
        raise CommandRejected(f"engine {name!r} is {engine.phase.value}: try again")
    return engine


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
        del state.requests[request.number]
    state.send_to_client(
        request.client,
        GenerateOutput(call=request.call, completions=completions, done=message.done),
    )


def on_failed(state: PoolState, message: RequestFailed) -> None:
    if request := state.requests.get(message.request):
        fail(state, request, message.error)


def fail(state: PoolState, request: Request, error: ErrorInfo) -> None:
    del state.requests[request.number]
    state.send_to_client(request.client, CallFailed(call=request.call, error=error))


def fail_all(state: PoolState, generation: int, error: ErrorInfo) -> None:
    """The engine cannot answer any more: neither is its leader asked to abort."""
    for request in of_engine(state, generation):
        fail(state, request, error)


def of_engine(state: PoolState, generation: int) -> list[Request]:
    return [r for r in state.requests.values() if r.generation == generation]


def cancel(state: PoolState, client: bytes, call: int) -> None:
    """Abort; the leader's last output ends the call. No-op for an ended call."""
    for request in state.requests.values():
        if (request.client, request.call) == (client, call):
            _abort(state, request)


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
        engine = state.engines[request.generation]
        if now >= request.deadline:
            _abort(state, request)
            error = RankTimeout(
                f"generate on {engine.name!r} took longer than {request.timeout_s:g} s",
                rank=engine.leader,
                generation=engine.generation,
                phase="generate",
            )
            fail(state, request, error.to_info())
        elif now >= request.next_progress:
            request.next_progress = now + PROGRESS_INTERVAL_S
            state.send_to_client(
                request.client,
                Progress(
                    call=request.call,
                    engine=engine.name,
                    phase="generate",
                    elapsed_s=now - request.started,
                ),
            )


def _abort(state: PoolState, request: Request) -> None:
    engine = state.engines[request.generation]
    if engine.phase in _SERVING and state.is_attached(engine.leader):
        state.send_to_rank(
            engine.leader,
            AbortRequest(generation=engine.generation, request=request.number),
        )
