"""No call for a model is lost, left hanging or answered for another, whatever happens.

The controller's machine (`test_state_machine.py`), with calls that come and go beside
the commands: hypothesis decides who calls what, who leaves, which rank answers, fails,
dies or comes back, and when time passes.
"""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import initialize, precondition, rule

from tests.unit.controller_harness import WEIGHTS, Harness, answer
from tests.unit.test_state_machine import CLIENTS, ControllerMachine
from vllm_resident.controller import outlook, policy
from vllm_resident.controller.effects import Effect, SendToClient, SendToRank
from vllm_resident.controller.policy import Limits
from vllm_resident.controller.state import EnginePhase
from vllm_resident.messages import (
    AwaitEngine,
    CallFailed,
    EndAwait,
    EngineAwake,
    EngineRefused,
    EngineSpec,
    FrontendRequests,
    Progress,
)

# Besides those of the commands, "a" to "c", which may be declared too.
MODELS = st.sampled_from(["a", "b", "c", "d", "wide"])
DECLARED = {
    "a": EngineSpec("a", "/m", 1),
    "d": EngineSpec("d", "/m", [0]),
    "wide": EngineSpec("wide", "/m", [0, 1], {"tensor_parallel_size": 2}),
}


class DemandMachine(ControllerMachine):
    def __init__(self) -> None:
        super().__init__()
        # By call: the model and when it came; then the generation it was told.
        self.waiting: dict[tuple[bytes, int], tuple[str, float]] = {}
        self.told: dict[tuple[bytes, int], int] = {}

    @initialize(
        max_queue=st.sampled_from([1, 100]),
        max_wait_s=st.sampled_from([5.0, 60.0]),
        idle_ttl_s=st.sampled_from([None, 2.0]),
    )
    def declare(
        self, max_queue: int, max_wait_s: float, idle_ttl_s: float | None
    ) -> None:
        self.pool.state.models = dict(DECLARED)
        limits = Limits(max_queue, max_wait_s, idle_ttl_s)
        self.pool.state.demand.default_limits = limits
        self.pool.state.demand.drain_s = 2.0

    # ------------------------------------------------------------ what comes out

    def note_answer(self, effect: SendToClient) -> None:
        message, key = effect.message, (effect.client, effect.message.call)
        if isinstance(message, EngineAwake):
            # One answer per call: a second one finds it not waiting.
            name, _ = self.waiting.pop(key)
            engine = self.pool.state.engines[message.generation]
            assert (engine.name, engine.phase) == (name, EnginePhase.READY)
            self.told[key] = message.generation
        elif isinstance(message, EngineRefused):
            del self.waiting[key]
        elif key in self.waiting:
            assert isinstance(message, Progress | CallFailed)
            if isinstance(message, CallFailed):
                del self.waiting[key]
        else:
            super().note_answer(effect)

    # ------------------------------------------------------------ calls

    @rule(client=st.sampled_from(CLIENTS), name=MODELS)
    def call_model(self, client: bytes, name: str) -> None:
        call = self.next_call()
        self.waiting[client, call] = (name, self.now)
        message = AwaitEngine(call=call, engine=name)
        self.take(self.pool.client_message(client, message, self.now))

    @precondition(lambda self: self.waiting or self.told)
    @rule(data=st.data())
    def end_call(self, data: st.DataObject) -> None:
        self.end_one(data.draw(st.sampled_from(sorted({*self.waiting, *self.told}))))

    def end_one(self, key: tuple[bytes, int]) -> None:
        self.waiting.pop(key, None)
        self.told.pop(key, None)
        client, call = key
        self.take(self.pool.client_message(client, EndAwait(call=call), self.now))

    @precondition(lambda self: self.pool.state.engines)
    @rule(data=st.data(), number=st.integers(0, 3))
    def leader_has_requests(self, data: st.DataObject, number: int) -> None:
        """Those that were told to come, or too late for an engine that sleeps now."""
        generation = data.draw(st.sampled_from(sorted(self.pool.state.engines)))
        self.say_requests(generation, number)

    def say_requests(self, generation: int, number: int) -> None:
        engine = self.pool.state.engines[generation]
        leader = self.ranks[engine.leader]
        is_there = leader.is_alive and leader.is_known and generation in leader.held
        if is_there and engine.phase in (EnginePhase.READY, EnginePhase.ASLEEP):
            self.say(
                FrontendRequests(
                    rank=leader.rank, generation=generation, num_requests=number
                )
            )

    def client_gone(self, client: bytes) -> None:  # type: ignore[override]
        raise NotImplementedError

    @rule(client=st.sampled_from(CLIENTS))
    def caller_gone(self, client: bytes) -> None:
        self.take(self.pool.client_gone(client))
        self.open_calls = {call for call in self.open_calls if call[0] != client}
        for calls in (self.waiting, self.told):
            for key in [key for key in calls if key[0] == client]:
                del calls[key]
        self.take(self.pool.look_again(self.now))

    # ------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.01, 0.5, 3.0]))
    def a_look_is_due(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.pool.look_again(self.now))

    @rule(seconds=st.sampled_from([0.25, 1.0, 10.0]))
    def nobody_waits_too_long(self, seconds: float) -> None:
        self.time_passes_for(seconds)
        limit_s = self.pool.state.demand.default_limits.max_wait_s
        assert limit_s is not None
        for name, came in self.waiting.values():
            assert self.now - came < limit_s, name

    def time_passes_for(self, seconds: float) -> None:
        ControllerMachine.time_passes(self, seconds, alive=True)

    # ------------------------------------------------------------ at the end

    def teardown(self) -> None:
        """Peace: then all who wait are answered, and whoever calls now is served,
        unless he is told why not."""
        for number, rank in enumerate(self.ranks):
            self.rank_comes_back(number)
            if not rank.is_known:
                self.greet(rank)
        self.live_in_peace(70.0)
        assert self.waiting == {}
        if not self.pool.state.was_started:
            super().teardown()
            return
        for name in sorted(self.pool.state.models):
            call = self.next_call()
            self.waiting[CLIENTS[0], call] = (name, self.now)
            message = AwaitEngine(call=call, engine=name)
            self.take(self.pool.client_message(CLIENTS[0], message, self.now))
        self.live_in_peace(70.0)
        assert self.waiting == {}
        super().teardown()

    def live_in_peace(self, seconds: float) -> None:
        """Ranks answer, requests end, time passes."""
        until = self.now + seconds
        while self.now < until:
            self.everyone_answers()
            for rank in self.ranks:
                for request in sorted(rank.requests):
                    self.finish_request(rank, request)
            for key in list(self.told):
                self.end_one(key)
            for generation in list(self.pool.state.engines):
                if generation in self.pool.state.engines:
                    self.say_requests(generation, 0)
            self.everyone_answers()
            self.time_passes_for(2.0)
        self.everyone_answers()


TestDemandMachine = DemandMachine.TestCase
# Passing takes seconds; finding the shortest failing sequence may take minutes.
TestDemandMachine.pytestmark = [pytest.mark.timeout(600)]
TestDemandMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# ------------------------------------------------------------ nobody starves

STEP_S = 0.5
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 6)), max_size=60
)


@settings(max_examples=40, deadline=None)
@given(arrivals=ARRIVALS, hot=st.integers(0, 3))
def test_nobody_starves(arrivals: list[tuple[int, int, int]], hot: int) -> None:
    """Four models on two ranks, one of them called all the time: each call is served
    within the policy's bound. `arrivals`: model, steps since the one before, steps that
    it takes."""
    there = Harness(2)
    names = ["a", "b", "c", "wide"]
    there.state.models = {
        "a": EngineSpec("a", "/m", [0]),
        "b": EngineSpec("b", "/m", [1]),
        "c": EngineSpec("c", "/m", 1),
        "wide": EngineSpec("wide", "/m", [0, 1], {"tensor_parallel_size": 2}),
    }
    there.state.demand.default_limits = Limits()
    there.state.demand.drain_s = 4.0
    coming: dict[int, list[tuple[str, int]]] = {}
    step = 0
    for model, later, length in arrivals:
        step += later
        coming.setdefault(step, []).append((names[model], length))
    for each in range(step + 1):
        coming.setdefault(each, []).append((names[hot], 2))
    lengths: dict[int, int] = {}
    step, longest_s = 0, 0.0
    while step <= max(coming) or there.state.demand.callers:
        for name, length in coming.get(step, []):
            lengths[there.await_engine(name)] = length
            there.answer_all()
        there.look(STEP_S)
        step += 1
        for caller in list(there.state.demand.callers.values()):
            longest_s = max(longest_s, (caller.told_at or there.now) - caller.arrived)
            if caller.told_at is None:
                continue
            lengths[caller.call] -= 1
            if not lengths[caller.call]:
                there.end_await(caller.call)
                there.answer_all()
        for name, running in running_by_model(there).items():
            there.frontend_requests(name, running)
            there.answer_all()
        bound_s = policy.starvation_bound_s(outlook.draw(there.state, there.now))
        assert longest_s <= bound_s


def running_by_model(there: Harness) -> dict[str, int]:
    """What the leaders of those that are awake have, as they would say it."""
    names = [
        engine.name
        for engine in there.state.engines.values()
        if engine.phase in (EnginePhase.READY, EnginePhase.DRAINING)
    ]
    callers = there.state.demand.callers.values()
    return {
        name: sum(c.engine == name and c.told_at is not None for c in callers)
        for name in names
    }


# ------------------------------------------------------------ nobody is turned away

NUM_MODELS = 8
NUM_STEPS = 400
# How often what happens.
WHAT = {"call": 5, "end": 5, "answer": 8, "wait": 2}


class Slow:
    """A pool whose ranks answer when they are told to, each in its order, and callers
    that are told their model is up."""

    def __init__(self, host_memory_bytes: int | None) -> None:
        self.there = Harness(2)
        wide = {"tensor_parallel_size": 2}
        self.names = [f"m{number}" for number in range(NUM_MODELS)]
        self.there.state.models = {
            name: EngineSpec(name, "/m", 2 if is_wide else 1, wide if is_wide else {})
            for name in self.names
            for is_wide in [name in ("m0", "m1")]
        }
        self.there.state.demand.default_limits = Limits()
        self.there.state.host_memory_bytes = host_memory_bytes
        self.unanswered: list[SendToRank] = []
        self.told: list[int] = []

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendToRank):
                self.unanswered.append(effect)
            elif isinstance(effect, SendToClient):
                assert not isinstance(effect.message, EngineRefused), effect.message
                if isinstance(effect.message, EngineAwake):
                    self.told.append(effect.message.call)

    def do(self, what: str, number: int) -> None:
        there = self.there
        if what == "call":
            there.await_engine(self.names[number % NUM_MODELS])
            self.take(there.effects)
        elif what == "end" and self.told:
            there.end_await(self.told.pop(number % len(self.told)))
            self.take(there.effects)
        elif what == "answer" and self.unanswered:
            rank = self.unanswered[number % len(self.unanswered)].rank
            first = next(each for each in self.unanswered if each.rank == rank)
            self.unanswered.remove(first)
            if (reply := answer(rank, first.message)) is not None:
                self.take(there.rank(reply))
        elif what == "wait":
            there.now += number / 3000
            self.take(there.heartbeats())
            self.take(there.pool.look_again(there.now))
            self.take(there.pool.tick(there.now))


@pytest.mark.parametrize("host_memory_bytes", [None, 5 * WEIGHTS])
@pytest.mark.parametrize("seed", range(6))
def test_nobody_is_refused_where_nothing_fails(
    seed: int, host_memory_bytes: int | None
) -> None:
    """However many switches run at once, on whichever ranks. Not hypothesis: it takes
    long sequences, which it would shrink for minutes."""
    rng = random.Random(seed)
    slow = Slow(host_memory_bytes)
    kinds = [what for what, weight in WHAT.items() for _ in range(weight)]
    for _ in range(NUM_STEPS):
        slow.do(rng.choice(kinds), rng.randrange(1000))
