"""Drives the controller's state machine by hand: no sockets, no clock, no sleep."""

from __future__ import annotations

import copy

from vllm_resident.controller.effects import Effect, SendToClient, SendToRank
from vllm_resident.controller.pool import new_pool
from vllm_resident.controller.state import Engine, PoolState
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    PROTOCOL_VERSION,
    ApplyLayout,
    AwaitEngine,
    BuildEngine,
    CallFailed,
    ClientMessage,
    CloseEngine,
    DropEngine,
    EndAwait,
    EngineBuilt,
    EngineClosed,
    EngineFailed,
    EngineMemory,
    EnginePrepared,
    EngineResumed,
    EngineSpec,
    EngineStatus,
    EngineSuspended,
    FrontendRequests,
    Generate,
    GetStatus,
    Heartbeat,
    Hello,
    LoadEngine,
    PoolStatus,
    PrepareEngine,
    RankGauges,
    RankMessage,
    ResumeEngine,
    SleepEngine,
    StatusReported,
    SuspendEngine,
    SwitchEngines,
    ToClientMessage,
    ToRankMessage,
    UnloadEngine,
    WakeUpEngine,
)

HOST_ID = "boot:1"
GAUGES = RankGauges(10, 100, 20, 5, 1)
ARGS = [
    "model", "max_model_len", "dtype", "tensor_parallel_size",
    "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
]  # fmt: skip
FRONTEND_ARGS = ["chat_template", "tool_call_parser", "lora_modules"]
# What every engine of these tests has on each rank, in bytes.
WEIGHTS = 100
ALICE, BOB = b"\x00alice", b"\x00bob"


def hello(rank: int, world_size: int, **changes: object) -> Hello:
    fields: dict[str, object] = {
        "rank": rank,
        "protocol_version": PROTOCOL_VERSION,
        "world_size": world_size,
        "local_rank": rank,
        "host": "node0",
        "host_id": HOST_ID,
        "pid": 1000 + rank,
        "incarnation": 0,
        "device": "cpu",
        "gauges": GAUGES,
        "vllm_version": "0",
        "torch_version": "0",
        "engine_arg_names": ARGS,
        "frontend_arg_names": FRONTEND_ARGS,
        "generations": [],
    }
    return Hello(**(fields | changes))  # type: ignore[arg-type]


def spec(name: str, ranks: list[int] | int | None = None, **engine_args) -> EngineSpec:
    return EngineSpec(name, f"/models/{name}", ranks, engine_args)


class Harness:
    """A pool of `num_ready` greeted ranks, and shorthands for its events.

    `effects` are those of the last event.
    """

    def __init__(self, world_size: int = 4, num_ready: int | None = None) -> None:
        self.now = 100.0
        self.world_size = world_size
        self.calls = 0
        self.effects: list[Effect] = []
        self.pool = new_pool(
            name="test", session="s1", host_id=HOST_ID, controller_pid=1,
            heartbeat_timeout_s=4.0, now=self.now,
        )  # fmt: skip
        for rank in range(world_size if num_ready is None else num_ready):
            self.rank(hello(rank, world_size))

    @property
    def state(self) -> PoolState:
        return self.pool.state

    def snapshot(self) -> PoolState:
        return copy.deepcopy(self.state)

    # ------------------------------------------------------------ events

    def client(self, message: ClientMessage, client: bytes = ALICE) -> list[Effect]:
        self.effects = self.pool.client_message(client, message, self.now)
        return self.effects

    def rank(self, message: RankMessage) -> list[Effect]:
        self.effects = self.pool.rank_message(message, self.now)
        return self.effects

    def kill(self, rank: int) -> list[Effect]:
        pid = self.state.ranks[rank].pid
        self.effects = self.pool.rank_ended(rank, pid, self.now)
        return self.effects

    def tick(self, seconds: float) -> list[Effect]:
        self.now += seconds
        self.effects = self.pool.tick(self.now)
        return self.effects

    def heartbeats(self) -> list[Effect]:
        self.effects = []
        for rank in self.state.ranks:
            if self.state.is_attached(rank):
                self.effects += self.pool.rank_message(
                    Heartbeat(rank=rank, incarnation=0, gauges=GAUGES), self.now
                )
        return self.effects

    # ------------------------------------------------------------ shorthands

    def call(self) -> int:
        self.calls += 1
        return self.calls

    def load(self, wanted: EngineSpec, timeout_s: float = 60.0) -> int:
        call = self.call()
        self.client(LoadEngine(call=call, spec=wanted, timeout_s=timeout_s))
        return call

    def unload(self, name: str, timeout_s: float = 60.0, drain_s: float = 0.0) -> int:
        call = self.call()
        self.client(
            UnloadEngine(call=call, name=name, drain_s=drain_s, timeout_s=timeout_s)
        )
        return call

    def apply(self, *wanted: EngineSpec, timeout_s: float = 60.0) -> int:
        call = self.call()
        self.client(ApplyLayout(call=call, engines=list(wanted), timeout_s=timeout_s))
        return call

    def sleep(self, name: str, level: int = 1, drain_s: float = 0.0) -> int:
        call = self.call()
        self.client(
            SleepEngine(
                call=call, name=name, level=level, drain_s=drain_s, timeout_s=60.0
            )
        )
        return call

    def wake_up(self, name: str, drain_s: float = 0.0) -> int:
        call = self.call()
        self.client(WakeUpEngine(call=call, name=name, drain_s=drain_s, timeout_s=60.0))
        return call

    def switch(
        self, old: str, new: EngineSpec, strategy: str = "sleep", drain_s: float = 0.0
    ) -> int:
        call = self.call()
        self.client(
            SwitchEngines(
                call=call, old=old, new=new, strategy=strategy, drain_s=drain_s,
                timeout_s=60.0,
            )
        )  # fmt: skip
        return call

    def generate(self, name: str, stream: bool = False, timeout_s: float = 60.0) -> int:
        call = self.call()
        self.client(
            Generate(
                call=call, engine=name, prompts=["hi"], sampling_params={},
                stream=stream, timeout_s=timeout_s,
            )
        )  # fmt: skip
        return call

    def await_engine(
        self,
        name: str,
        client: bytes = ALICE,
        waited_s: float = 0.0,
        *,
        is_held: bool = False,
    ) -> int:
        call = self.call()
        message = AwaitEngine(
            call=call, engine=name, waited_s=waited_s, is_held=is_held
        )
        self.client(message, client)
        return call

    def end_await(self, call: int, client: bytes = ALICE) -> None:
        self.client(EndAwait(call=call), client)

    def frontend_requests(self, name: str, num_requests: int) -> None:
        """The leader says how many requests of frontends it has."""
        engine = self.engine(name)
        self.rank(
            FrontendRequests(
                rank=engine.leader, generation=engine.generation,
                num_requests=num_requests,
            )
        )  # fmt: skip

    def look(self, seconds: float) -> list[Effect]:
        """Let time pass as the service does: a look whenever one is asked for, ticks
        a few times a second, all answered at once. Returns all effects."""
        end, seen = self.now + seconds, list[Effect]()
        while self.now < end:
            at = min(end, self.now + 0.25, max(self.now, self.pool.look_again_at))
            is_look, self.now = at == self.pool.look_again_at, at
            self.heartbeats()
            seen += self.answer_all()
            self.effects = (self.pool.look_again if is_look else self.pool.tick)(at)
            seen += self.answer_all()
        self.effects = seen
        return seen

    def load_ready(self, wanted: EngineSpec) -> Engine:
        """Load and have every rank answer at once."""
        self.load(wanted)
        self.answer_all()
        engine = self.engine(wanted.name)
        assert engine.phase.value == "ready"
        return engine

    def answer_all(self, *, skip: tuple[int, ...] = ()) -> list[Effect]:
        """Answer every command in the last effects, and those that they lead to,
        as ranks do where nothing goes wrong. Returns all effects on the way."""
        seen: list[Effect] = []
        pending = list(self.effects)
        while pending:
            effect = pending.pop(0)
            seen.append(effect)
            if isinstance(effect, SendToRank) and effect.rank not in skip:
                reply = answer(effect.rank, effect.message)
                if reply is not None:
                    pending.extend(self.rank(reply))
        self.effects = seen
        return seen

    def engine(self, name: str) -> Engine:
        engine = self.state.engine_named(name)
        assert engine is not None
        return engine

    def to_ranks(self, kind: type | None = None) -> list[tuple[int, ToRankMessage]]:
        return [
            (effect.rank, effect.message)
            for effect in self.effects
            if isinstance(effect, SendToRank)
            and (kind is None or isinstance(effect.message, kind))
        ]

    def to_clients(self, kind: type | None = None) -> list[ToClientMessage]:
        return [
            effect.message
            for effect in self.effects
            if isinstance(effect, SendToClient)
            and (kind is None or isinstance(effect.message, kind))
        ]

    def error(self) -> ErrorInfo:
        """The error of the one call that failed with the last event."""
        (failed,) = self.to_clients(CallFailed)
        assert isinstance(failed, CallFailed)
        return failed.error

    def status(self) -> PoolStatus:
        effects = self.pool.client_message(BOB, GetStatus(call=-5), self.now)
        (effect,) = effects
        assert isinstance(effect, SendToClient)
        assert isinstance(effect.message, StatusReported)
        return effect.message.status

    def row(self, name: str) -> EngineStatus | None:
        return next((e for e in self.status().engines if e.name == name), None)


def answer(rank: int, message: ToRankMessage) -> RankMessage | None:
    """What a rank says to a command that it can carry out."""
    match message:
        case PrepareEngine(generation=generation):
            return EnginePrepared(
                rank=rank, generation=generation, seconds=0.1,
                memory=EngineMemory(device_bytes=WEIGHTS, weight_bytes=WEIGHTS),
            )  # fmt: skip
        case BuildEngine(generation=generation):
            return EngineBuilt(
                rank=rank, generation=generation, phases={"form": 0.1, "build": 0.2},
                memory_before_bytes=1, memory_after_bytes=2,
                memory=EngineMemory(device_bytes=WEIGHTS, weight_bytes=WEIGHTS),
            )  # fmt: skip
        case SuspendEngine(generation=generation, level=level):
            return EngineSuspended(
                rank=rank, generation=generation, level=level, phases={"stop": 0.01},
                memory_before_bytes=2, memory_after_bytes=1,
                memory=EngineMemory(
                    host_bytes=WEIGHTS if level == 1 else 0, weight_bytes=WEIGHTS
                ),
            )  # fmt: skip
        case ResumeEngine(generation=generation):
            return EngineResumed(
                rank=rank, generation=generation, phases={"resume": 0.01},
                memory_before_bytes=1, memory_after_bytes=2,
                memory=EngineMemory(device_bytes=WEIGHTS, weight_bytes=WEIGHTS),
            )  # fmt: skip
        case CloseEngine(generation=generation) | DropEngine(generation=generation):
            return EngineClosed(
                rank=rank, generation=generation, phases={"close": 0.1},
                memory_before_bytes=2, memory_after_bytes=1,
            )  # fmt: skip
    return None


def failed(rank: int, generation: int, kind: str = "RankFailure", **more: object):
    error = ErrorInfo(kind, f"{kind} on rank {rank}", **more)  # type: ignore[arg-type]
    return EngineFailed(rank=rank, generation=generation, error=error)
