"""Frontends: vLLM's own, in another process, attached to an engine's leader.

An attachment is a call that stays open. Its client is told the engine's phase, each
second and whenever it changes, so that it can hold back what the engine cannot take; a
client that does not listen any more is detached. Requests and outputs do not come by
here: the frontend and the leader have sockets of their own.
"""

from __future__ import annotations

from vllm_resident.controller.state import (
    ENGINE_BUILT,
    PROGRESS_INTERVAL_S,
    Engine,
    Frontend,
    PoolState,
)
from vllm_resident.errors import CommandRejected, ErrorInfo, RankTimeout, from_info
from vllm_resident.messages import (
    AttachFrontend,
    CallFailed,
    ConnectFrontend,
    DisconnectFrontend,
    FrontendAttached,
    FrontendConnected,
    FrontendDetached,
    FrontendRequests,
    Progress,
)
from vllm_resident.transport import check_bindable


def attach(
    state: PoolState, client: bytes, command: AttachFrontend, now: float
) -> None:
    """Have the engine's leader connect; raises what the caller is answered."""
    for address in (command.input_address, command.output_address):
        check_bindable(address, has_key=state.has_key)
    engine = state.engine_named(command.engine)
    if engine is None:
        names = sorted(e.name for e in state.engines.values())
        known = f"there are {names}" if names else "none is loaded"
        raise CommandRejected(f"no engine {command.engine!r}: {known}")
    if engine.phase not in ENGINE_BUILT:
        if engine.error is not None:
            raise from_info(engine.error)
        raise CommandRejected(
            f"engine {engine.name!r} is {engine.phase.value}: try again"
        )
    frontend = Frontend(
        number=state.next_frontend,
        client=client,
        call=command.call,
        engine=engine.name,
        generation=engine.generation,
        started=now,
        deadline=now + command.timeout_s,
        next_progress=now + PROGRESS_INTERVAL_S,
    )
    state.next_frontend += 1
    state.frontends[frontend.number] = frontend
    state.send_to_rank(
        engine.leader,
        ConnectFrontend(
            generation=engine.generation,
            frontend=frontend.number,
            input_address=command.input_address,
            output_address=command.output_address,
        ),
    )


def detach(state: PoolState, client: bytes, call: int) -> None:
    """As asked for. No-op for an attachment that has ended."""
    for frontend in _of_client(state, client):
        if frontend.call == call:
            _disconnect(state, frontend)
            _end(state, frontend, "as asked for")


def client_gone(state: PoolState, client: bytes) -> None:
    for frontend in _of_client(state, client):
        _disconnect(state, frontend)
        del state.frontends[frontend.number]


def on_connected(
    state: PoolState, engine: Engine, message: FrontendConnected, now: float
) -> None:
    """The leader's answer; of one detached meanwhile, nothing."""
    frontend = state.frontends.get(message.frontend)
    if frontend is None or frontend.generation != engine.generation:
        return
    if message.error is not None:
        _fail(state, frontend, message.error)
        return
    frontend.is_connected = True
    frontend.phase = engine.phase
    state.send_to_client(
        frontend.client,
        FrontendAttached(
            call=frontend.call,
            generation=engine.generation,
            spec=engine.spec,
            phase=engine.phase.value,
        ),
    )
    frontend.next_progress = now + PROGRESS_INTERVAL_S


def on_requests(state: PoolState, engine: Engine, message: FrontendRequests) -> None:
    engine.last_used = state.now
    engine.num_frontend_requests = message.num_requests


def settle(state: PoolState, now: float) -> None:
    """After every event: end what is attached to an engine that is gone, tell the
    others of a phase that has changed."""
    for frontend in list(state.frontends.values()):
        engine = state.engines.get(frontend.generation)
        if engine is None:
            _end(state, frontend, f"engine {frontend.engine!r} was unloaded")
        elif engine.error is not None and engine.phase not in ENGINE_BUILT:
            _fail(state, frontend, engine.error)
        elif frontend.is_connected and engine.phase is not frontend.phase:
            _report(state, frontend, engine, now)


def tick(state: PoolState, now: float) -> None:
    """Show that the pool is alive, and find out whether the client is."""
    for frontend in list(state.frontends.values()):
        engine = state.engines[frontend.generation]
        if not frontend.is_connected and now >= frontend.deadline:
            _disconnect(state, frontend)
            error = RankTimeout(
                f"the leader of {frontend.engine!r} did not connect in time",
                rank=engine.leader,
                generation=engine.generation,
                phase="attach",
            )
            _fail(state, frontend, error.to_info())
        elif now >= frontend.next_progress:
            _report(state, frontend, engine, now)


def fail_all(state: PoolState, error: ErrorInfo) -> None:
    for frontend in list(state.frontends.values()):
        _fail(state, frontend, error)


def _of_client(state: PoolState, client: bytes) -> list[Frontend]:
    return [f for f in state.frontends.values() if f.client == client]


def _report(state: PoolState, frontend: Frontend, engine: Engine, now: float) -> None:
    frontend.phase = engine.phase
    frontend.next_progress = now + PROGRESS_INTERVAL_S
    state.send_to_client(
        frontend.client,
        Progress(
            call=frontend.call,
            engine=frontend.engine,
            phase=engine.phase.value,
            elapsed_s=now - frontend.started,
        ),
    )


def _disconnect(state: PoolState, frontend: Frontend) -> None:
    engine = state.engines.get(frontend.generation)
    if engine is not None and state.is_attached(engine.leader):
        state.send_to_rank(
            engine.leader,
            DisconnectFrontend(
                generation=frontend.generation, frontend=frontend.number
            ),
        )


def _end(state: PoolState, frontend: Frontend, reason: str) -> None:
    del state.frontends[frontend.number]
    state.send_to_client(
        frontend.client, FrontendDetached(call=frontend.call, reason=reason)
    )


def _fail(state: PoolState, frontend: Frontend, error: ErrorInfo) -> None:
    del state.frontends[frontend.number]
    state.send_to_client(frontend.client, CallFailed(call=frontend.call, error=error))
