"""Greetings, heartbeats and losses of ranks."""

from __future__ import annotations

from vllm_resident.controller import engines, losses, prefetch, tally
from vllm_resident.controller.effects import Note, WatchProcess
from vllm_resident.controller.state import Engine, PoolState, Rank, RankPhase, move_rank
from vllm_resident.errors import RankFailure
from vllm_resident.messages import (
    PROTOCOL_VERSION,
    DropCommunicators,
    DropEngine,
    EngineClosed,
    ExitRank,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    Welcome,
)

# A process of this host that is alive but silent: C code can hold the interpreter's
# lock for seconds on a loaded machine. Its death is seen at once by other means.
LOCAL_SILENCE_S = 30.0
# More time than this between two ticks was the controller's own pause, not a rank's.
MAX_TICK_S = 1.0
MAX_WORLD_SIZE = 65_536


def on_hello(state: PoolState, hello: Hello, now: float) -> None:
    """Take a rank in, or tell it to exit when it cannot belong to this pool."""
    end = _end_of_pool(state, hello)
    if reason := end or _refusal(state, hello):
        state.effects.append(Note(f"rank {hello.rank} (pid {hello.pid}): {reason}"))
        state.send_to_rank(
            hello.rank, ExitRank(reason=reason, failed=not end, pid=hello.pid)
        )
        return
    if not state.world_size:
        state.world_size = hello.world_size
        state.ranks = {
            number: Rank(number, since=now) for number in range(hello.world_size)
        }
    rank = state.ranks[hello.rank]
    if state.is_attached(rank.rank) and not _is_same_process(rank, hello):
        lose(state, rank, "a new process took its place", now)
    _greet(state, rank, hello)
    _give_up_leftovers(state, rank, now)
    if rank.phase is not RankPhase.READY:
        joins = RankPhase.JOINING if rank.leftovers else RankPhase.READY
        if rank.phase is not joins:
            move_rank(state, rank, joins, now)
    _note_complete(state)


def _end_of_pool(state: PoolState, hello: Hello) -> str:
    """Why the pool that the rank was launched for is over: it has not failed, and must
    not be started anew."""
    if state.stop is not None:
        return f"pool {state.name!r} is stopping"
    is_here = hello.host_id == state.host_id and hello.launcher_pid
    if is_here and state.owner_pid not in (None, hello.launcher_pid):
        return (
            f"was launched by process {hello.launcher_pid}, pool {state.name!r} by "
            f"{state.owner_pid}"
        )
    return ""


def _refusal(state: PoolState, hello: Hello) -> str:
    if hello.protocol_version != PROTOCOL_VERSION:
        return (
            f"speaks protocol {hello.protocol_version}, the controller "
            f"{PROTOCOL_VERSION}: install the same vllm-resident on both sides"
        )
    if not 0 <= hello.rank < hello.world_size <= MAX_WORLD_SIZE:
        return f"rank {hello.rank} is not in a world of size {hello.world_size}"
    if state.world_size and hello.world_size != state.world_size:
        return (
            f"was launched with world size {hello.world_size}, pool {state.name!r} has "
            f"{state.world_size}: shut the pool down first"
        )
    rank = state.ranks.get(hello.rank)
    if rank is not None and rank.evicted and _is_same_process(rank, hello):
        return "did not answer in time and was told to exit"
    return ""


def _is_same_process(rank: Rank, hello: Hello) -> bool:
    return rank.hello is not None and (
        (rank.hello.pid, rank.hello.incarnation, rank.hello.host_id)
        == (hello.pid, hello.incarnation, hello.host_id)
    )


def _greet(state: PoolState, rank: Rank, hello: Hello) -> None:
    if not _is_same_process(rank, hello):
        rank.leftovers.clear()
        tally.note_process(state.history.tally, rank.rank, is_first=rank.hello is None)
    rank.hello = hello
    rank.gauges = hello.gauges
    tally.note_steps(state.history.tally, rank.rank, hello.gauges.steps)
    rank.local = hello.host_id == state.host_id
    rank.silent_s = 0.0
    rank.evicted = False
    state.send_to_rank(
        rank.rank,
        Welcome(
            session=state.session,
            pool=state.name,
            max_communicators=state.num_communicators,
            max_communicator_bytes=state.communicator_memory_bytes,
        ),
    )
    if rank.local:
        state.effects.append(WatchProcess(rank.rank, hello.pid))


def _give_up_leftovers(state: PoolState, rank: Rank, now: float) -> None:
    """A rank that greets holds nothing this controller counts on, except where it
    said Hello twice. Numbers it knows from an earlier controller are not used again."""
    assert rank.hello is not None
    for generation in rank.hello.generations:
        engine = state.engines.get(generation)
        is_known = rank.phase is RankPhase.READY and _is_on(engine, rank.rank)
        if is_known or generation in rank.leftovers:
            continue
        state.next_generation = max(state.next_generation, generation + 1)
        rank.leftovers[generation] = (
            now + engines.DROP_TIMEOUT_S + engines.ANSWER_GRACE_S
        )
        state.send_to_rank(
            rank.rank,
            DropEngine(
                generation=generation,
                reason="from before this rank joined the pool",
                timeout_s=engines.DROP_TIMEOUT_S,
            ),
        )


def _is_on(engine: Engine | None, rank: int) -> bool:
    return engine is not None and rank in engine.ranks


def on_leftover_closed(
    state: PoolState, rank: Rank, message: EngineClosed, now: float
) -> bool:
    """Whether the message answers the giving up of an earlier generation."""
    if rank.leftovers.pop(message.generation, None) is None:
        return False
    if rank.phase is RankPhase.JOINING and not rank.leftovers:
        move_rank(state, rank, RankPhase.READY, now)
        _note_complete(state)
    return True


def _note_complete(state: PoolState) -> None:
    state.was_complete = state.was_complete or all(
        rank.phase is RankPhase.READY for rank in state.ranks.values()
    )


def on_heartbeat(state: PoolState, message: Heartbeat) -> None:
    rank = state.ranks.get(message.rank)
    if rank is not None and rank.evicted and _incarnation(rank) == message.incarnation:
        _end(state, rank, "it did not answer in time")
    elif (
        rank is None
        or not state.is_attached(rank.rank)
        or _incarnation(rank) != message.incarnation
    ):
        if state.stop is None:
            state.send_to_rank(message.rank, HelloAgain())
    else:
        rank.gauges = message.gauges
        tally.note_steps(state.history.tally, rank.rank, message.gauges.steps)
        state.send_to_rank(rank.rank, HeartbeatAck())


def _incarnation(rank: Rank) -> int | None:
    return rank.hello.incarnation if rank.hello else None


def lose(
    state: PoolState, rank: Rank, what: str, now: float, *, evicted: bool = False
) -> None:
    """The rank is gone, and with it its part of every engine on it."""
    move_rank(state, rank, RankPhase.LOST, now, what)
    rank.leftovers.clear()
    rank.evicted = evicted
    if state.stop is not None:
        return
    tally.note_loss(state.history.tally, rank.rank)
    prefetch.on_rank_lost(state, rank, now)
    _give_up_communicators(state, rank)
    for engine in list(state.engines.values()):
        if rank.rank in engine.ranks:
            losses.on_rank_lost(state, engine, rank, what, now, evicted=evicted)


def _give_up_communicators(state: PoolState, lost: Rank) -> None:
    """What the others keep of worlds that it was in serves nobody any more."""
    for rank in state.ranks.values():
        keeps = rank.gauges is not None and rank.gauges.num_kept_communicators
        if keeps and state.is_attached(rank.rank):
            state.send_to_rank(rank.rank, DropCommunicators(lost_rank=lost.rank))


def evict(state: PoolState, rank: Rank, error: RankFailure, now: float) -> None:
    """Give up a rank that does not answer; its launcher starts it again."""
    _end(state, rank, error.message)
    lose(state, rank, error.message, now, evicted=True)


def _end(state: PoolState, rank: Rank, reason: str) -> None:
    pid = rank.hello.pid if rank.hello else 0
    state.send_to_rank(rank.rank, ExitRank(reason=reason, failed=True, pid=pid))


def tick(state: PoolState, elapsed_s: float, now: float) -> None:
    """Count silence; `elapsed_s` since the tick before."""
    for rank in state.ranks.values():
        if not state.is_attached(rank.rank):
            continue
        rank.silent_s += min(elapsed_s, MAX_TICK_S)
        limit_s = LOCAL_SILENCE_S if rank.local else state.heartbeat_timeout_s
        if rank.silent_s > limit_s:
            lose(state, rank, f"no heartbeat for {rank.silent_s:.1f} s", now)
        elif any(now >= deadline for deadline in rank.leftovers.values()):
            error = RankFailure(
                f"rank {rank.rank} did not give up generations "
                f"{sorted(rank.leftovers)} of an earlier life",
                rank=rank.rank,
                phase="join",
            )
            evict(state, rank, error, now)
