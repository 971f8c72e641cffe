"""Prefetches: one rank of each machine reads a checkpoint into the page cache.

Moves no engine and waits for none: it runs beside switches and generate calls. A rank
that is told to read cannot be told to stop; what it says after the call is over is
ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_resident.controller.state import (
    PROGRESS_INTERVAL_S,
    PoolState,
    Rank,
    RankPhase,
)
from vllm_resident.errors import CommandRejected, ErrorInfo, RankLost, RankTimeout
from vllm_resident.messages import (
    CallFailed,
    CheckpointPrefetched,
    CheckpointRead,
    PrefetchCheckpoint,
    Progress,
    ReadCheckpoint,
)


@dataclass
class Prefetch:
    """One call under way. `waiting` are the ranks that still read, `num_bytes` what
    each that is done has read; `client` is None when nobody waits any more."""

    read: int
    client: bytes | None
    call: int
    model: str
    started: float
    deadline: float
    timeout_s: float
    next_progress: float
    waiting: set[int]
    hosts: list[str]
    num_bytes: dict[int, int] = field(default_factory=dict)


def start(
    state: PoolState, client: bytes, command: PrefetchCheckpoint, now: float
) -> None:
    """Send the readers off; raises `CommandRejected`, then nobody reads."""
    declared = state.models.get(command.model)
    model = declared.model if declared else command.model
    if not model.strip():
        raise CommandRejected("no model: give a folder, or a name that pool.toml has")
    readers = _readers(state)
    # Requests and reads share their numbers: neither is ever used again.
    prefetch = Prefetch(
        read=state.next_request,
        client=client,
        call=command.call,
        model=model,
        started=now,
        deadline=now + command.timeout_s,
        timeout_s=command.timeout_s,
        next_progress=now + PROGRESS_INTERVAL_S,
        waiting={rank.rank for rank in readers},
        hosts=[rank.host for rank in readers],
    )
    state.next_request += 1
    state.prefetches.append(prefetch)
    for rank in readers:
        state.send_to_rank(rank.rank, ReadCheckpoint(read=prefetch.read, model=model))
    _report(state, prefetch, now)


def _readers(state: PoolState) -> list[Rank]:
    """The first ready rank of each machine that ever had one."""
    readers: dict[str, Rank] = {}
    known = [(r.hello.host_id, r) for r in state.ranks.values() if r.hello]
    for host_id, rank in known:
        if rank.phase is RankPhase.READY:
            readers.setdefault(host_id, rank)
    if not readers:
        raise CommandRejected(
            f"no rank of pool {state.name!r} is ready: wait until one is"
        )
    for host_id, rank in known:
        if host_id not in readers:
            raise CommandRejected(
                f"no rank on {rank.host} is ready (rank {rank.rank} is "
                f"{rank.phase.value}): wait until one is"
            )
    return list(readers.values())


def on_read(state: PoolState, message: CheckpointRead, now: float) -> bool:
    """A rank has read its machine's files, or could not; False if it is stale."""
    prefetch = next((p for p in state.prefetches if p.read == message.read), None)
    if prefetch is None or message.rank not in prefetch.waiting:
        return False
    if message.error is not None:
        _fail(state, prefetch, message.error)
        return True
    prefetch.waiting.discard(message.rank)
    prefetch.num_bytes[message.rank] = message.num_bytes
    if not prefetch.waiting:
        state.prefetches.remove(prefetch)
        state.send_to_client(
            prefetch.client,
            CheckpointPrefetched(
                call=prefetch.call,
                num_bytes=max(prefetch.num_bytes.values()),
                seconds=now - prefetch.started,
                hosts=prefetch.hosts,
            ),
        )
    return True


def on_rank_lost(state: PoolState, rank: Rank, now: float) -> None:
    """What it was reading will not be answered: those who wait for it are told."""
    del now
    for prefetch in list(state.prefetches):
        if rank.rank in prefetch.waiting:
            error = RankLost(
                f"rank {rank.rank} on {rank.host} is gone while it read "
                f"{prefetch.model}: prefetch again when it is back",
                rank=rank.rank,
                phase="prefetch",
            )
            _fail(state, prefetch, error.to_info())


def client_gone(state: PoolState, client: bytes) -> None:
    """Nobody is told any more; the ranks read on, which harms nobody."""
    for prefetch in state.prefetches:
        if prefetch.client == client:
            prefetch.client = None


def fail_all(state: PoolState, error: ErrorInfo) -> None:
    """The pool stops: everybody who waits is told."""
    for prefetch in list(state.prefetches):
        _fail(state, prefetch, error)


def is_call(state: PoolState, client: bytes, call: int) -> bool:
    """Whether a prefetch under way has this client's call number."""
    return any((p.client, p.call) == (client, call) for p in state.prefetches)


def tick(state: PoolState, now: float) -> None:
    """End what is past its deadline; show the others that the pool is alive."""
    for prefetch in list(state.prefetches):
        if now >= prefetch.deadline:
            silent = sorted(prefetch.waiting)
            error = RankTimeout(
                f"{prefetch.model} was not read within {prefetch.timeout_s:g} s on "
                f"rank {', '.join(map(str, silent))}",
                rank=silent[0],
                phase="prefetch",
            )
            _fail(state, prefetch, error.to_info())
        elif now >= prefetch.next_progress:
            prefetch.next_progress = now + PROGRESS_INTERVAL_S
            _report(state, prefetch, now)


def _report(state: PoolState, prefetch: Prefetch, now: float) -> None:
    state.send_to_client(
        prefetch.client,
        Progress(
            call=prefetch.call,
            engine="",
            phase="prefetch",
            elapsed_s=now - prefetch.started,
        ),
    )


def _fail(state: PoolState, prefetch: Prefetch, error: ErrorInfo) -> None:
    state.prefetches.remove(prefetch)
    state.send_to_client(prefetch.client, CallFailed(call=prefetch.call, error=error))
