"""Clients that watch: told of every switch, whoever caused it, as it gets on.

What a watcher knows is compared with what is, after every event, so that nothing else
has to think of watchers. Nothing is computed while nobody watches.
"""

from __future__ import annotations

import msgspec

from vllm_resident.controller import reports
from vllm_resident.controller.state import PROGRESS_INTERVAL_S, PoolState, Watcher
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    CallFailed,
    Progress,
    SwitchEnded,
    SwitchMoved,
    SwitchStatus,
    WatchPool,
)


def watch(state: PoolState, client: bytes, command: WatchPool, now: float) -> None:
    """From now on; what there was already follows at once (`settle`)."""
    next_progress = now + PROGRESS_INTERVAL_S
    watcher = Watcher(client, command.call, now, next_progress)
    watcher.num_ended = state.history.num_past - len(state.history.past)
    state.watchers.append(watcher)


def end(state: PoolState, client: bytes, call: int) -> None:
    """As asked for. No-op for one that has ended."""
    state.watchers = [
        each for each in state.watchers if (each.client, each.call) != (client, call)
    ]


def client_gone(state: PoolState, client: bytes) -> None:
    state.watchers = [each for each in state.watchers if each.client != client]


def fail_all(state: PoolState, error: ErrorInfo) -> None:
    for watcher in state.watchers:
        state.send_to_client(watcher.client, CallFailed(call=watcher.call, error=error))
    state.watchers.clear()


def settle(state: PoolState, now: float) -> None:
    """After every event: tell what is new."""
    if not state.watchers:
        return
    switches = [reports.switch_status(state, each, now) for each in state.switches]
    for watcher in state.watchers:
        _tell_ended(state, watcher, now)
        _tell_moved(state, watcher, switches)


def tick(state: PoolState, now: float) -> None:
    """Show that the pool is alive, and find out whether the client is."""
    for watcher in state.watchers:
        if now < watcher.next_progress:
            continue
        watcher.next_progress = now + PROGRESS_INTERVAL_S
        progress = Progress(
            call=watcher.call,
            engine="",
            phase="watch",
            elapsed_s=now - watcher.started,
        )
        state.send_to_client(watcher.client, progress)


def _tell_ended(state: PoolState, watcher: Watcher, now: float) -> None:
    history = state.history
    num_new = min(history.num_past - watcher.num_ended, len(history.past))
    watcher.num_ended = history.num_past
    for index in range(-num_new, 0):
        past = history.past[index]
        message = SwitchEnded(
            call=watcher.call,
            session=state.session,
            sequence=history.num_past + index + 1,
            number=past.number,
            age_s=now - past.began,
            cause=past.cause,
            engines=list(past.engines),
            report=past.report,
        )
        state.send_to_client(watcher.client, message)


def _tell_moved(
    state: PoolState, watcher: Watcher, switches: list[SwitchStatus]
) -> None:
    known, watcher.known = watcher.known, {}
    for switch in switches:
        # That time passes is not news.
        timeless = msgspec.structs.replace(switch, elapsed_s=0.0)
        watcher.known[switch.number] = timeless
        if known.get(switch.number) != timeless:
            message = SwitchMoved(call=watcher.call, switch=switch)
            state.send_to_client(watcher.client, message)
