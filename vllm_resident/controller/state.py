"""The pool's state as data: phases, their legal transitions, and all that is known.

Pure: no sockets, no clock (`now` is monotonic seconds, handed in), no policy. The
modules beside it are functions over `PoolState`; a phase changes only through
`move_rank` and `move_engine`, which check it against the tables.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_resident.controller.effects import (
    Effect,
    PhaseChanged,
    SendToClient,
    SendToRank,
)
from vllm_resident.controller.tally import Tally
from vllm_resident.controller.usage import Demand
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    AddRequest,
    Completion,
    EngineBuilt,
    EngineClosed,
    EngineMemory,
    EngineReport,
    EngineResumed,
    EngineSpec,
    EngineSuspended,
    Hello,
    Progress,
    RankGauges,
    SwitchReport,
    SwitchStatus,
    ToClientMessage,
    ToRankMessage,
)

if TYPE_CHECKING:
    from vllm_resident.controller.prefetch import Prefetch


class RankPhase(Enum):
    EXPECTED = "expected"  # has not said Hello in this life of the controller
    JOINING = "joining"  # greeted; gives up what it held before
    READY = "ready"
    LOST = "lost"


class EnginePhase(Enum):
    PREPARING = "preparing"
    PREPARED = "prepared"  # waits for the other engines of its switch
    BUILDING = "building"
    READY = "ready"
    DRAINING = "draining"  # finishes what it has; what comes in is held
    SUSPENDING = "suspending"
    ASLEEP = "asleep"
    RESUMING = "resuming"
    CLOSING = "closing"
    UNWINDING = "unwinding"  # failed or cut short: every rank drops it
    LOST = "lost"  # a rank is gone; restored when all are back
    CLOSED = "closed"  # nothing is left of it
    FAILED = "failed"  # nothing is left of it but the error


class SwitchStage(Enum):
    PREPARING = "preparing"  # what comes is checked; nothing was changed
    STAGING = "staging"  # what comes is built and put to sleep, what goes serves
    MAKING_ROOM = "making_room"  # sleepers give up host memory
    DRAINING = "draining"  # what goes finishes its requests
    SETTING_ASIDE = "setting_aside"  # what goes falls asleep or is unloaded
    BRINGING_UP = "bringing_up"  # what comes is built or woken
    COMMITTING = "committing"  # what was set aside for good is unloaded
    GOING_BACK = "going_back"  # something failed: all is made as it was
    DONE = "done"


class PoolPhase(Enum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"


RANK_TRANSITIONS: dict[RankPhase, frozenset[RankPhase]] = {
    RankPhase.EXPECTED: frozenset({RankPhase.JOINING, RankPhase.READY}),
    RankPhase.JOINING: frozenset({RankPhase.READY, RankPhase.LOST}),
    RankPhase.READY: frozenset({RankPhase.LOST}),
    RankPhase.LOST: frozenset({RankPhase.JOINING, RankPhase.READY}),
}

_P = EnginePhase
ENGINE_TRANSITIONS: dict[EnginePhase, frozenset[EnginePhase]] = {
    _P.PREPARING: frozenset({_P.PREPARED, _P.UNWINDING, _P.LOST}),
    _P.PREPARED: frozenset({_P.BUILDING, _P.UNWINDING, _P.LOST}),
    _P.BUILDING: frozenset({_P.READY, _P.UNWINDING, _P.LOST}),
    _P.READY: frozenset(
        {_P.DRAINING, _P.SUSPENDING, _P.CLOSING, _P.UNWINDING, _P.LOST}
    ),
    _P.DRAINING: frozenset(
        {_P.READY, _P.SUSPENDING, _P.CLOSING, _P.UNWINDING, _P.LOST}
    ),
    # READY: its ranks refused, and are as they were.
    _P.SUSPENDING: frozenset({_P.ASLEEP, _P.READY, _P.UNWINDING, _P.LOST}),
    _P.ASLEEP: frozenset(
        {_P.SUSPENDING, _P.RESUMING, _P.CLOSING, _P.UNWINDING, _P.LOST}
    ),
    _P.RESUMING: frozenset({_P.READY, _P.UNWINDING, _P.LOST}),
    _P.CLOSING: frozenset({_P.CLOSED, _P.UNWINDING}),
    _P.UNWINDING: frozenset({_P.CLOSED, _P.FAILED, _P.LOST}),
    _P.LOST: frozenset({_P.CLOSED, _P.UNWINDING}),
    _P.CLOSED: frozenset(),
    _P.FAILED: frozenset(),
}

_S = SwitchStage
_ORDER = (_S.PREPARING, _S.STAGING, _S.MAKING_ROOM, _S.DRAINING, _S.SETTING_ASIDE,
          _S.BRINGING_UP, _S.COMMITTING, _S.DONE)  # fmt: skip
# Forward stage by stage; back from each that may fail, and then it is over.
SWITCH_TRANSITIONS: dict[SwitchStage, frozenset[SwitchStage]] = {
    stage: frozenset({following, _S.GOING_BACK})
    for stage, following in pairwise(_ORDER)
}
SWITCH_TRANSITIONS[_S.COMMITTING] = frozenset({_S.DONE})
SWITCH_TRANSITIONS[_S.GOING_BACK] = frozenset({_S.DONE})
SWITCH_TRANSITIONS[_S.DONE] = frozenset()

ENGINE_GONE = frozenset({EnginePhase.CLOSED, EnginePhase.FAILED})
# On its ranks whole: it was built and has not begun to go.
ENGINE_BUILT = frozenset({_P.READY, _P.DRAINING, _P.SUSPENDING, _P.ASLEEP, _P.RESUMING})
# Somebody has to answer before anything else can be asked of it.
ENGINE_MOVING = frozenset(
    {_P.PREPARING, _P.BUILDING, _P.SUSPENDING, _P.RESUMING, _P.CLOSING, _P.UNWINDING}
)
RANK_ATTACHED = frozenset({RankPhase.JOINING, RankPhase.READY})


class IllegalTransition(RuntimeError):
    """A bug of the controller: the phase was not changed."""


@dataclass
class Rank:
    """One rank. `silent_s` is the time without a message, counted by ticks."""

    rank: int
    phase: RankPhase = RankPhase.EXPECTED
    since: float = 0.0
    hello: Hello | None = None
    gauges: RankGauges | None = None
    local: bool = False
    silent_s: float = 0.0
    # Generations of an earlier life it is giving up, with the deadline of each.
    leftovers: dict[int, float] = field(default_factory=dict)
    # Told to exit because it did not answer: this process is not taken back.
    evicted: bool = False

    @property
    def pid(self) -> int:
        return self.hello.pid if self.hello else 0

    @property
    def host(self) -> str:
        return self.hello.host if self.hello else ""


@dataclass
class Engine:
    """One engine of one generation. `waiting` are the ranks whose answer to the
    present phase is missing, `deadline` is when they are given up."""

    spec: EngineSpec
    ranks: list[int]
    generation: int
    load_timeout_s: float
    started: float
    since: float
    phase: EnginePhase = EnginePhase.PREPARING
    waiting: set[int] = field(default_factory=set)
    deadline: float | None = None
    error: ErrorInfo | None = None
    progress: list[str] = field(default_factory=list)
    # What each rank has begun in its present switch, and when.
    rank_phases: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
    prepared_at: float | None = None
    build_began: float | None = None
    ready_at: float | None = None
    close_began: float | None = None
    built: dict[int, EngineBuilt] = field(default_factory=dict)
    closed: dict[int, EngineClosed] = field(default_factory=dict)
    # Of the present suspend or resume, and when it began.
    suspended: dict[int, EngineSuspended] = field(default_factory=dict)
    resumed: dict[int, EngineResumed] = field(default_factory=dict)
    refusal: ErrorInfo | None = None
    motion_began: float = 0.0
    # How deep it sleeps (0: awake), and where a restore takes it: what the last
    # finished command made of it.
    sleep_level: int = 0
    home_level: int = 0
    memory: dict[int, EngineMemory] = field(default_factory=dict)
    # What it needs to be awake: estimated at prepare, then as it was.
    awake_memory: dict[int, EngineMemory] = field(default_factory=dict)
    last_used: float = 0.0
    # Its weights cannot be read again (made up, not loaded): no level 2.
    keeps_weights: bool = False
    # Restored by the pool itself: nobody waits for it, a failure is kept.
    num_restores: int = 0
    keeps_failure: bool = False
    # When the requests of an engine that failed in a step are told (engines.py).
    fail_requests_at: float | None = None
    # Those of frontends, as its leader last said (frontends.py).
    num_frontend_requests: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def leader(self) -> int:
        return self.ranks[0]

    @property
    def is_restoring(self) -> bool:
        return self.num_restores > 0 and self.ready_at is None


@dataclass
class Request:
    """One accepted generate call on its engine's leader."""

    number: int
    client: bytes
    call: int
    engine: str
    generation: int
    stream: bool
    started: float
    deadline: float
    timeout_s: float
    next_progress: float
    completions: list[Completion] = field(default_factory=list)
    # Not sent to the leader yet: its engine is being moved (requests.py).
    held: AddRequest | None = None


@dataclass
class Frontend:
    """One attachment of a frontend to an engine's leader; `phase` is what its client
    was last told of the engine."""

    number: int
    client: bytes
    call: int
    engine: str
    generation: int
    started: float
    deadline: float
    next_progress: float
    is_connected: bool = False
    phase: EnginePhase | None = None


@dataclass
class Move:
    """What a switch does to one engine. `before` and `after` are sleep levels (0 is
    awake); None is for not being there. `engine` is the one that has the name now: one
    built anew, on the way back, is another."""

    engine: Engine
    before: int | None
    after: int | None
    # One that was set aside at level 1 on its way to be unloaded or to level 2.
    parked: bool = False
    # Not asked for: makes room in host memory for what is set aside.
    demotion: bool = False
    # Tried on the way back, so that it is tried once.
    rebuilt: bool = False


@dataclass
class Switch:
    """One command that moves engines, or one of the pool's own (restore, demotion).
    `client` is None when nobody waits for it."""

    action: str
    client: bytes | None
    call: int
    started: float
    deadline: float
    next_progress: float
    moves: list[Move]
    number: int = 0
    cause: str = ""
    drain_s: float = 0.0
    # "sleep": what goes is set aside so that it can come back; "unload": it is given up
    # first; "stage": what comes is built first.
    strategy: str = "sleep"
    kept: list[str] = field(default_factory=list)
    # Whether engines were pinned before, and are to be when it is done; until then
    # those are that are in either, so that nothing else moves them.
    pins: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    stage: SwitchStage = SwitchStage.PREPARING
    drain_until: float = 0.0
    # When what goes stopped serving and what comes began to.
    aside_began: float | None = None
    up_at: float | None = None
    # Why it cannot be done: the engine that failed first, or what the pool itself
    # found.
    failed: Engine | None = None
    refusal: ErrorInfo | None = None
    is_undone: bool = False
    # The model that is moved because it is called, or is not (`demand.py`).
    on_demand: str = ""
    path: list[str] = field(default_factory=list)
    reports: list[EngineReport] = field(default_factory=list)

    @property
    def error(self) -> ErrorInfo | None:
        """The first error. An engine's may still change: what failed may turn out to
        be the echo of a lost rank."""
        return self.failed.error if self.failed else self.refusal

    def moves_to(self, engine: Engine) -> Move | None:
        return next((move for move in self.moves if move.engine is engine), None)


@dataclass(frozen=True)
class PastSwitch:
    """One that is over, as those who watch are told of it."""

    number: int
    began: float
    cause: str
    engines: tuple[str, ...]
    report: SwitchReport


@dataclass
class Watcher:
    """A client that is told of every switch: what it knows of those under way, by
    number, and how many that have ended."""

    client: bytes
    call: int
    started: float
    next_progress: float
    known: dict[int, SwitchStatus] = field(default_factory=dict)
    num_ended: int = 0


# So many switches that are over are kept for who comes to watch.
MAX_PAST = 100


@dataclass
class History:
    """What is remembered of what is over; nothing is decided by it. `past` are the last
    switches, of `num_past` in all."""

    next_number: int = 1
    past: deque[PastSwitch] = field(default_factory=lambda: deque(maxlen=MAX_PAST))
    num_past: int = 0
    tally: Tally = field(default_factory=Tally)


# A caller that hears nothing for some of these gives the controller up.
PROGRESS_INTERVAL_S = 1.0


@dataclass
class Stop:
    """The pool is stopping: who waits for it, and until when."""

    started: float
    deadline: float
    timeout_s: float
    next_progress: float
    callers: list[tuple[bytes, int]] = field(default_factory=list)
    is_over: bool = False


@dataclass
class PoolState:
    name: str
    session: str
    host_id: str
    controller_pid: int
    started: float
    heartbeat_timeout_s: float
    # The launcher whose pool it is: the controller ends with it.
    owner_pid: int | None = None
    # Whether peers on other machines may be told to listen to each other.
    has_key: bool = False
    world_size: int = 0  # 0: no rank has said Hello yet
    was_complete: bool = False
    ranks: dict[int, Rank] = field(default_factory=dict)
    engines: dict[int, Engine] = field(default_factory=dict)  # by generation
    failed: dict[str, Engine] = field(default_factory=dict)  # by name
    switches: list[Switch] = field(default_factory=list)
    history: History = field(default_factory=History)
    watchers: list[Watcher] = field(default_factory=list)
    requests: dict[int, Request] = field(default_factory=dict)
    frontends: dict[int, Frontend] = field(default_factory=dict)
    # What pool.toml declares (`commands.declared`), and what it allows (`memory.py`).
    models: dict[str, EngineSpec] = field(default_factory=dict)
    # vLLM's server options of all models that do not say otherwise.
    frontend_args: dict[str, Any] = field(default_factory=dict)
    host_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    awake_per_rank: int = 1
    num_communicators: int | None = None
    communicator_memory_bytes: int | None = None
    # Who waits for a model, and what was learned of them all.
    demand: Demand = field(default_factory=Demand)
    # Switches that have ended and were not looked at (`demand.settle`).
    ended: list[Switch] = field(default_factory=list)
    # Those to load, once, when the pool is complete (`own_switches.start_declared`).
    start_up: list[EngineSpec] = field(default_factory=list)
    was_started: bool = False
    prefetches: list[Prefetch] = field(default_factory=list)
    next_generation: int = 1
    next_request: int = 1
    next_frontend: int = 1
    # Of what ranks are told to form: all do it in this order (`engines.build`).
    next_turn: int = 1
    stop: Stop | None = None
    last_tick: float | None = None
    now: float = 0.0  # of the event being handled
    num_stale_messages: int = 0
    num_protocol_errors: int = 0
    effects: list[Effect] = field(default_factory=list)

    @property
    def phase(self) -> PoolPhase:
        phases = {rank.phase for rank in self.ranks.values()}
        if self.stop is not None:
            return PoolPhase.STOPPING
        if phases == {RankPhase.READY}:
            return PoolPhase.READY
        if self.was_complete or RankPhase.LOST in phases:
            return PoolPhase.DEGRADED
        return PoolPhase.STARTING

    def is_attached(self, rank: int) -> bool:
        """Whether the rank is there to be sent anything."""
        return rank in self.ranks and self.ranks[rank].phase in RANK_ATTACHED

    def engine_named(self, name: str) -> Engine | None:
        """The engine the name stands for now: one that an apply prepares in its place
        is hidden until the old one is gone."""
        return next((e for e in self.engines.values() if e.name == name), None)

    def switch_of(self, engine: Engine) -> Switch | None:
        return next((s for s in self.switches if s.moves_to(engine)), None)

    def open_switch(self, switch: Switch) -> None:
        switch.number = self.history.next_number
        self.history.next_number += 1
        self.switches.append(switch)

    def send_to_rank(self, rank: int, message: ToRankMessage) -> None:
        self.effects.append(SendToRank(rank, message))

    def send_to_client(self, client: bytes | None, message: ToClientMessage) -> None:
        if client is not None:
            self.effects.append(SendToClient(client, message))


def move_rank(
    state: PoolState, rank: Rank, phase: RankPhase, now: float, error: str = ""
) -> None:
    """Change a rank's phase, or raise `IllegalTransition` and change nothing."""
    if phase not in RANK_TRANSITIONS[rank.phase]:
        raise IllegalTransition(f"rank {rank.rank}: {rank.phase} -> {phase}")
    state.effects.append(
        PhaseChanged(
            "rank", rank.host, (rank.rank,), None, rank.phase.value, phase.value,
            now - rank.since, error,
        )
    )  # fmt: skip
    rank.phase, rank.since = phase, now


def move_engine(
    state: PoolState, engine: Engine, phase: EnginePhase, now: float
) -> None:
    """Change an engine's phase, or raise `IllegalTransition` and change nothing.

    An engine of which nothing is left is taken out of `state.engines`.
    """
    if phase not in ENGINE_TRANSITIONS[engine.phase]:
        raise IllegalTransition(f"engine {engine.name}: {engine.phase} -> {phase}")
    old, seconds = engine.phase, now - engine.since
    engine.phase, engine.since = phase, now
    log_engine(state, engine, old.value, seconds)
    if phase in ENGINE_GONE:
        del state.engines[engine.generation]
    if phase is EnginePhase.FAILED:
        state.failed[engine.name] = engine


def pin(engine: Engine, is_pinned: bool) -> None:
    engine.spec = msgspec.structs.replace(engine.spec, pinned=is_pinned)


def log_engine(state: PoolState, engine: Engine, old: str, seconds: float) -> None:
    state.effects.append(
        PhaseChanged(
            "engine", engine.name, tuple(engine.ranks), engine.generation, old,
            engine.phase.value, seconds, engine.error.message if engine.error else "",
        )
    )  # fmt: skip


def move_switch(switch: Switch, stage: SwitchStage) -> None:
    """Change a switch's stage, or raise `IllegalTransition` and change nothing."""
    if stage not in SWITCH_TRANSITIONS[switch.stage]:
        raise IllegalTransition(f"{switch.action}: {switch.stage} -> {stage}")
    switch.stage = stage


def note_progress(state: PoolState, engine: Engine, phase: str, now: float) -> None:
    """The engine reached a phase of work: tell who waits, once per phase."""
    if phase in engine.progress:
        return
    engine.progress.append(phase)
    if switch := state.switch_of(engine):
        report_progress(state, switch, engine, now)


def report_progress(
    state: PoolState, switch: Switch, engine: Engine, now: float
) -> None:
    state.send_to_client(
        switch.client,
        Progress(
            call=switch.call,
            engine=engine.name,
            phase=engine.progress[-1] if engine.progress else engine.phase.value,
            elapsed_s=now - switch.started,
        ),
    )
