"""No sequence of events may bring the controller into an illegal state.

Ranks are modelled by what they were sent and what they hold; hypothesis decides who
does what next. What must hold is checked on the messages, not on the state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.unit.controller_harness import GAUGES, HOST_ID, answer, failed, hello
from vllm_resident.controller.effects import (
    Effect,
    SendToClient,
    SendToRank,
    StopController,
)
from vllm_resident.controller.pool import new_pool
from vllm_resident.controller.state import EnginePhase, RankPhase
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    AbortRequest,
    AddRequest,
    ApplyLayout,
    BuildEngine,
    CallFailed,
    CancelGenerate,
    ClientMessage,
    Completion,
    DropEngine,
    EngineClosed,
    EngineSpec,
    EngineSuspended,
    ExitRank,
    Generate,
    GenerateOutput,
    Heartbeat,
    HelloAgain,
    LoadEngine,
    PhaseStarted,
    PoolStopped,
    PrepareEngine,
    Progress,
    RankMessage,
    RequestFailed,
    RequestOutput,
    ResumeEngine,
    ShutdownPool,
    SleepEngine,
    SuspendEngine,
    SwitchDone,
    SwitchEngines,
    ToRankMessage,
    UnloadEngine,
    WakeUpEngine,
    Welcome,
)

WORLD_SIZE = 4
CLIENTS = (b"\x00a", b"\x00b")
NAMES = st.sampled_from(["a", "b", "c"])
RANKS = st.integers(0, WORLD_SIZE - 1)
SPECS = st.builds(
    EngineSpec,
    name=NAMES,
    model=st.sampled_from(["/m", "/n"]),
    ranks=st.one_of(
        st.integers(1, WORLD_SIZE),
        st.lists(RANKS, min_size=1, max_size=3, unique=True),
    ),
    asleep=st.booleans(),
    pinned=st.sampled_from([False, False, True]),
)
DRAINS = st.sampled_from([0.0, 2.0])
TIMEOUTS = st.sampled_from([1.0, 20.0, 300.0])


@dataclass
class ModelRank:
    """A rank's process: what it was sent and has not answered, and what it holds."""

    rank: int
    pid: int
    incarnation: int = 0
    is_alive: bool = False
    is_known: bool = False  # greeted, and not given up since
    inbox: list[ToRankMessage] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    # Of those held: what has the rank to itself, or soon will.
    awake: set[int] = field(default_factory=set)
    requests: set[tuple[int, int]] = field(default_factory=set)


class ControllerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.pool = new_pool(
            name="test", session="s", host_id=HOST_ID, controller_pid=1,
            heartbeat_timeout_s=4.0, now=self.now,
        )  # fmt: skip
        self.ranks = [ModelRank(rank, 1000 + rank) for rank in range(WORLD_SIZE)]
        self.generations: list[int] = []
        self.call = 0
        self.open_calls: set[tuple[bytes, int]] = set()
        self.is_stopped = False

    # ------------------------------------------------------------ what comes out

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendToRank):
                self.deliver(self.ranks[effect.rank], effect.message)
            elif isinstance(effect, SendToClient):
                self.note_answer(effect)
            elif isinstance(effect, StopController):
                self.is_stopped = True

    def note_answer(self, effect: SendToClient) -> None:
        message = effect.message
        if isinstance(message, SwitchDone):
            assert "go_back" not in message.report.path, "undone is not done"
        if isinstance(message, Progress):
            assert (effect.client, message.call) in self.open_calls
        elif isinstance(message, SwitchDone | CallFailed | PoolStopped) or (
            isinstance(message, GenerateOutput) and message.done
        ):
            # One final answer per call: a second one finds the call not open.
            self.open_calls.remove((effect.client, message.call))

    def deliver(self, rank: ModelRank, message: ToRankMessage) -> None:
        if isinstance(message, ExitRank):
            if rank.is_alive:
                self.end(rank)
            return
        if isinstance(message, Welcome):
            rank.is_known = True
        assert rank.is_alive, f"{message} to a dead rank"
        assert rank.is_known or isinstance(message, HelloAgain), "to a lost rank"
        if isinstance(message, PrepareEngine):
            self.note_generation(message.generation)
        if isinstance(message, BuildEngine):
            rank.held.add(message.generation)
            if self.is_to_serve(message.generation):
                self.take_rank(rank, message.generation)
        elif isinstance(message, ResumeEngine):
            self.take_rank(rank, message.generation)
        rank.inbox.append(message)

    def is_to_serve(self, generation: int) -> bool:
        """Whether an engine is built to be awake at once."""
        state = self.pool.state
        switch = state.switch_of(state.engines[generation])
        assert switch is not None
        move = switch.moves_to(state.engines[generation])
        assert move is not None
        if move.rebuilt:
            return move.before == 0
        return move.after == 0 and switch.strategy != "stage"

    def take_rank(self, rank: ModelRank, generation: int) -> None:
        assert rank.awake <= {generation}, f"rank {rank.rank} is in two engines"
        rank.awake.add(generation)

    def note_generation(self, generation: int) -> None:
        if generation not in self.generations:
            assert all(generation > other for other in self.generations)
            self.generations.append(generation)

    def end(self, rank: ModelRank) -> None:
        rank.is_alive = rank.is_known = False
        rank.inbox.clear()
        rank.held.clear()
        rank.awake.clear()
        rank.requests.clear()
        self.take(self.pool.rank_ended(rank.rank, rank.pid, self.now))

    def say(self, message: RankMessage) -> None:
        self.take(self.pool.rank_message(message, self.now))

    def greet(self, rank: ModelRank) -> None:
        self.say(
            hello(
                rank.rank,
                WORLD_SIZE,
                pid=rank.pid,
                incarnation=rank.incarnation,
                generations=sorted(rank.held),
            )
        )

    # ------------------------------------------------------------ clients

    def command(self, client: bytes, message: ClientMessage) -> None:
        before = copy.deepcopy(self.pool.state)
        self.open_calls.add((client, message.call))
        effects = self.pool.client_message(client, message, self.now)
        if (
            len(effects) == 1
            and isinstance(effects[0], SendToClient)
            and isinstance(effects[0].message, CallFailed)
        ):
            before.now = self.now
            assert self.pool.state == before, "a rejected command changed something"
        self.take(effects)

    def next_call(self) -> int:
        self.call += 1
        return self.call

    @initialize(
        number=st.integers(WORLD_SIZE - 1, WORLD_SIZE),
        host_memory_bytes=st.sampled_from([None, 0, 150, 450]),
        device_memory_bytes=st.sampled_from([None, None, 50, 100]),
    )
    def start(
        self,
        number: int,
        host_memory_bytes: int | None,
        device_memory_bytes: int | None,
    ) -> None:
        self.pool.state.host_memory_bytes = host_memory_bytes
        self.pool.state.device_memory_bytes = device_memory_bytes
        for rank in self.ranks[:number]:
            rank.is_alive = True
            self.greet(rank)

    @rule(client=st.sampled_from(CLIENTS), spec=SPECS, timeout_s=TIMEOUTS)
    def load(self, client: bytes, spec: EngineSpec, timeout_s: float) -> None:
        call = self.next_call()
        self.command(client, LoadEngine(call=call, spec=spec, timeout_s=timeout_s))

    @rule(client=st.sampled_from(CLIENTS), name=NAMES, timeout_s=TIMEOUTS)
    def unload(self, client: bytes, name: str, timeout_s: float) -> None:
        call = self.next_call()
        self.command(client, UnloadEngine(call=call, name=name, timeout_s=timeout_s))

    @rule(
        client=st.sampled_from(CLIENTS),
        specs=st.lists(SPECS, max_size=3),
        timeout_s=TIMEOUTS,
        drain_s=DRAINS,
    )
    def apply(
        self, client: bytes, specs: list[EngineSpec], timeout_s: float, drain_s: float
    ) -> None:
        message = ApplyLayout(
            call=self.next_call(), engines=specs, timeout_s=timeout_s, drain_s=drain_s
        )
        self.command(client, message)

    @rule(
        client=st.sampled_from(CLIENTS),
        name=NAMES,
        level=st.integers(1, 2),
        timeout_s=TIMEOUTS,
        drain_s=DRAINS,
    )
    def sleep(
        self, client: bytes, name: str, level: int, timeout_s: float, drain_s: float
    ) -> None:
        message = SleepEngine(
            call=self.next_call(), name=name, level=level, timeout_s=timeout_s,
            drain_s=drain_s,
        )  # fmt: skip
        self.command(client, message)

    @rule(client=st.sampled_from(CLIENTS), name=NAMES, timeout_s=TIMEOUTS)
    def wake_up(self, client: bytes, name: str, timeout_s: float) -> None:
        message = WakeUpEngine(
            call=self.next_call(), name=name, timeout_s=timeout_s, drain_s=0.0
        )
        self.command(client, message)

    @rule(
        client=st.sampled_from(CLIENTS),
        old=NAMES,
        new=st.one_of(SPECS, st.builds(EngineSpec, name=NAMES)),
        strategy=st.sampled_from(["sleep", "unload", "stage"]),
        timeout_s=TIMEOUTS,
        drain_s=DRAINS,
    )
    def switch(
        self, client: bytes, old: str, new: EngineSpec, strategy: str,
        timeout_s: float, drain_s: float,
    ) -> None:  # fmt: skip
        message = SwitchEngines(
            call=self.next_call(), old=old, new=new, strategy=strategy,
            timeout_s=timeout_s, drain_s=drain_s,
        )  # fmt: skip
        self.command(client, message)

    @rule(
        client=st.sampled_from(CLIENTS),
        name=NAMES,
        stream=st.booleans(),
        timeout_s=TIMEOUTS,
    )
    def generate(
        self, client: bytes, name: str, stream: bool, timeout_s: float
    ) -> None:
        message = Generate(
            call=self.next_call(), engine=name, prompts=["x"], sampling_params={},
            stream=stream, timeout_s=timeout_s,
        )  # fmt: skip
        self.command(client, message)

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        client, call = data.draw(st.sampled_from(sorted(self.open_calls)))
        self.take(self.pool.client_message(client, CancelGenerate(call=call), self.now))

    @rule(client=st.sampled_from(CLIENTS))
    def client_gone(self, client: bytes) -> None:
        self.take(self.pool.client_gone(client))
        self.open_calls = {call for call in self.open_calls if call[0] != client}

    # ------------------------------------------------------------ ranks

    def reply(self, rank: ModelRank, message: ToRankMessage) -> None:
        """Carry a command out, as it is when nothing goes wrong."""
        if isinstance(message, AddRequest):
            rank.requests.add((message.generation, message.request))
            return
        if isinstance(message, AbortRequest):
            self.finish_request(rank, (message.generation, message.request))
            return
        reply = answer(rank.rank, message)
        if isinstance(reply, EngineClosed):
            rank.held.discard(reply.generation)
            rank.awake.discard(reply.generation)
            rank.requests = {r for r in rank.requests if r[0] != reply.generation}
        if isinstance(reply, EngineSuspended):
            rank.awake.discard(reply.generation)
            for request in sorted(rank.requests):
                if request[0] == reply.generation:
                    self.finish_request(rank, request)
        if reply is not None:
            self.say(reply)

    def finish_request(self, rank: ModelRank, request: tuple[int, int]) -> None:
        rank.requests.discard(request)
        self.say(
            RequestOutput(
                rank=rank.rank,
                generation=request[0],
                request=request[1],
                completions=[Completion(0, 0, "x", [1], "stop")],
                done=True,
            )
        )

    def with_inbox(self) -> list[ModelRank]:
        return [rank for rank in self.ranks if rank.inbox]

    @precondition(lambda self: self.with_inbox())
    @rule(data=st.data(), number=st.integers(1, 6))
    def rank_answers(self, data: st.DataObject, number: int) -> None:
        for _ in range(number):
            if not self.with_inbox():
                return
            rank = data.draw(st.sampled_from(self.with_inbox()))
            self.reply(rank, rank.inbox.pop(0))

    @rule()
    def everyone_answers(self) -> None:
        while ranks := self.with_inbox():
            self.reply(ranks[0], ranks[0].inbox.pop(0))

    @precondition(lambda self: self.with_inbox())
    @rule(data=st.data(), kind=st.sampled_from(["CommandRejected", "RankFailure"]))
    def rank_fails(self, data: st.DataObject, kind: str) -> None:
        rank = data.draw(st.sampled_from(self.with_inbox()))
        message = rank.inbox.pop(0)
        generation = getattr(message, "generation", None)
        if generation is None:
            return
        if isinstance(message, AddRequest):
            error = ErrorInfo(kind, "no")
            self.say(
                RequestFailed(
                    rank=rank.rank,
                    generation=generation,
                    request=message.request,
                    error=error,
                )
            )
        elif isinstance(message, DropEngine):
            self.reply(rank, message)  # always carried out
        elif not isinstance(message, AbortRequest):
            if not isinstance(message, SuspendEngine | ResumeEngine):
                rank.held.discard(generation)
                rank.awake.discard(generation)
            self.say(failed(rank.rank, generation, kind))

    @precondition(lambda self: any(rank.held for rank in self.ranks))
    @rule(data=st.data(), kind=st.sampled_from(["RankDiverged", "RankFailure"]))
    def step_fails(self, data: st.DataObject, kind: str) -> None:
        rank = data.draw(st.sampled_from([rank for rank in self.ranks if rank.held]))
        generation = data.draw(st.sampled_from(sorted(rank.held)))
        # A step can fail only where the build was answered.
        if not any(isinstance(m, BuildEngine) for m in rank.inbox):
            self.say(failed(rank.rank, generation, kind, phase="step"))

    @precondition(lambda self: any(rank.requests for rank in self.ranks))
    @rule(data=st.data())
    def request_finishes(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from([r for r in self.ranks if r.requests]))
        self.finish_request(rank, data.draw(st.sampled_from(sorted(rank.requests))))

    @rule(number=RANKS, generation=st.integers(0, 12), kind=st.integers(0, 4))
    def stray_message(self, number: int, generation: int, kind: int) -> None:
        """Late or stale: about a generation that the rank does not hold."""
        rank = self.ranks[number]
        about = {getattr(message, "generation", None) for message in rank.inbox}
        if not rank.is_alive or generation in rank.held | about:
            return
        engine = self.pool.state.engines.get(generation)
        if engine is not None and number in engine.ranks:
            return
        stray: list[RankMessage] = [
            failed(number, generation),
            PhaseStarted(rank=number, generation=generation, phase="x"),
            answer(number, BuildEngine(generation=generation, timeout_s=1)),
            answer(number, DropEngine(generation=generation, reason="", timeout_s=1)),
            RequestOutput(
                rank=number, generation=generation, request=1, completions=[], done=True
            ),
        ]  # type: ignore[list-item]
        before = copy.deepcopy(self.pool.state)
        assert self.pool.rank_message(stray[kind], self.now) == []
        before.num_stale_messages += 1
        before.now = self.now
        before.ranks[number].silent_s = self.pool.state.ranks[number].silent_s
        assert self.pool.state == before, "a stale message changed something"

    @rule(number=RANKS)
    def rank_dies(self, number: int) -> None:
        if self.ranks[number].is_alive:
            self.end(self.ranks[number])

    @rule(number=RANKS)
    def rank_comes_back(self, number: int) -> None:
        rank = self.ranks[number]
        if not rank.is_alive:
            rank.is_alive = True
            rank.pid += 1000
            rank.incarnation += 1
            self.greet(rank)

    @rule(number=RANKS)
    def connection_breaks(self, number: int) -> None:
        """The process lives on, with all it holds; what was sent to it is lost."""
        rank = self.ranks[number]
        if rank.is_alive and rank.is_known:
            rank.is_known = False
            rank.inbox.clear()
            self.take(self.pool.rank_unreachable(number, self.now))
            self.greet(rank)

    # ------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.25, 1.0, 15.0, 400.0]), alive=st.booleans())
    def time_passes(self, seconds: float, alive: bool) -> None:
        self.now += seconds
        for rank in self.ranks:
            if rank.is_alive and alive:
                beat = Heartbeat(
                    rank=rank.rank, incarnation=rank.incarnation, gauges=GAUGES
                )
                self.say(beat)
        self.take(self.pool.tick(self.now))
        for rank in self.ranks:  # lost by silence
            if self.pool.state.ranks[rank.rank].phase is RankPhase.LOST:
                rank.is_known = False

    # ------------------------------------------------------------ always, at the end

    @invariant()
    def engines_and_switches_belong_together(self) -> None:
        state = self.pool.state
        for engine in state.engines.values():
            assert engine.phase not in (EnginePhase.CLOSED, EnginePhase.FAILED)
            is_steady = engine.phase in (
                EnginePhase.READY,
                EnginePhase.ASLEEP,
                EnginePhase.LOST,
                EnginePhase.UNWINDING,
            )
            assert is_steady or state.switch_of(engine) is not None
            # Whatever waits has a deadline.
            assert not engine.waiting or engine.deadline is not None
        for request in state.requests.values():
            assert request.generation in state.engines or (
                # Its engine broke in a switch that will bring it back, or fail this.
                request.held is not None and state.switches
            )
        assert state.effects == []

    def teardown(self) -> None:
        """Everybody answers and comes back: then every call has had its answer."""
        for _ in range(3):
            self.everyone_answers()
            for number, rank in enumerate(self.ranks):
                self.rank_comes_back(number)
                if not rank.is_known:
                    self.greet(rank)
            while running := [rank for rank in self.ranks if rank.requests]:
                self.finish_request(running[0], next(iter(running[0].requests)))
            self.everyone_answers()
            for _ in range(8):
                self.time_passes(1.0, alive=True)
        self.everyone_answers()
        assert self.open_calls == set()
        assert {e.phase for e in self.pool.state.engines.values()} <= {
            EnginePhase.READY,
            EnginePhase.ASLEEP,
        }
        assert not self.pool.state.switches
        self.check_host_memory()
        self.command(CLIENTS[0], ShutdownPool(call=self.next_call(), timeout_s=5))
        assert self.is_stopped
        assert self.open_calls == set()

    def check_host_memory(self) -> None:
        """Over the budget only by what may not be moved."""
        state = self.pool.state
        budget = state.host_memory_bytes
        sleepers = [e for e in state.engines.values() if e.sleep_level == 1]
        if budget is None or all(e.spec.pinned for e in sleepers):
            return
        kept = sum(m.host_bytes for e in sleepers for m in e.memory.values())
        assert kept <= budget


TestControllerMachine = ControllerMachine.TestCase
# Passing takes seconds; finding the shortest failing sequence may take minutes.
TestControllerMachine.pytestmark = [pytest.mark.timeout(600)]
TestControllerMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_what_comes_waits_until_the_others_have_dropped_a_lost_engine() -> None:
    machine = ControllerMachine()
    machine.start(number=3, host_memory_bytes=None, device_memory_bytes=None)
    wide = EngineSpec(name="a", model="/m", ranks=3)
    machine.load(client=CLIENTS[0], spec=wide, timeout_s=1.0)
    machine.everyone_answers()
    machine.apply(
        client=CLIENTS[0],
        specs=[EngineSpec(name="a", model="/m", ranks=[1])],
        timeout_s=1.0,
        drain_s=0.0,
    )
    machine.connection_breaks(number=0)
    # Rank 1 is told to drop the wide one, then prepares the narrow one: `take_rank`
    # fails if it is to be built before it says that it has.
    machine.everyone_answers()
    engine = machine.pool.state.engine_named("a")
    assert engine is not None
    assert (engine.ranks, engine.phase) == ([1], EnginePhase.READY)
