"""The on-demand policy: each rule by example, then a search for a counterexample."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from benchmarks.policy import Contender, Simulation
from benchmarks.traces import LONGEST, Call, Model, Trace
from vllm_resident.controller import policy
from vllm_resident.controller.policy import (
    BringUp,
    Costs,
    Decision,
    GiveUp,
    Limits,
    ModelView,
    Phase,
    PoolView,
    PutToSleep,
)

NOW = 100.0
COSTS = Costs(sleep_s=1.0, wake_up_s={1: 2.0, 2: 8.0}, load_s=10.0)
LONG_AGO = -1e6


def absent(name: str, *queue: float, **changes: Any) -> ModelView:
    return replace(ModelView(name, COSTS, queue=queue, service_s=1.0), **changes)


def asleep(name: str, *queue: float, ranks: tuple[int, ...] = (0,), **changes: Any):
    changes = {"sleep_level": 1, "down_since": LONG_AGO, **changes}
    return absent(name, *queue, phase=Phase.ASLEEP, ranks=ranks, **changes)


def awake(name: str, *queue: float, ranks: tuple[int, ...] = (0,), **changes: Any):
    changes = {"num_ranks": len(ranks), "last_call": LONG_AGO, **changes}
    return absent(name, *queue, phase=Phase.AWAKE, ranks=ranks, **changes)


def pool(*models: ModelView, num_ranks: int = 1, **changes: Any) -> PoolView:
    return replace(PoolView(tuple(range(num_ranks)), models), **changes)


def decided(*models: ModelView, num_ranks: int = 1, **changes: Any) -> Decision:
    return policy.decide(pool(*models, num_ranks=num_ranks, **changes), NOW)


# ------------------------------------------------------------------ who comes up, where


def test_nothing_waits_nothing_happens() -> None:
    assert decided(awake("a"), asleep("b")) == Decision()


def test_free_ranks_come_first() -> None:
    found = decided(awake("a"), absent("b", NOW), num_ranks=2)
    assert found.actions == (BringUp("b", (1,)),)


def test_a_sleeper_wakes_where_it_is() -> None:
    found = decided(asleep("b", NOW, ranks=(1,)), num_ranks=2)
    assert found.actions == (BringUp("b", (1,)),)


def test_a_sleeper_moves_when_its_own_rank_is_busy_for_long() -> None:
    busy = awake("a", in_flight=1, awake_since=NOW, service_s=30.0)
    found = decided(busy, asleep("b", NOW - 1), num_ranks=2)
    assert found.actions == (BringUp("b", (1,), is_move=True),)


def test_one_that_is_bound_does_not_move() -> None:
    busy = awake("a", in_flight=1, awake_since=NOW, service_s=30.0)
    found = decided(busy, asleep("b", NOW - 1, is_bound=True), num_ranks=2)
    assert found.actions == ()
    assert found.look_again_at is not None


def test_the_least_valuable_idle_engine_sleeps() -> None:
    hot = awake("hot", last_call=NOW - 1, gap_s=0.5)
    cold = awake("cold", ranks=(1,), last_call=NOW, gap_s=900.0)
    found = decided(hot, cold, absent("b", NOW - 5), num_ranks=2)
    assert found.actions == (BringUp("b", (1,), sleep=("cold",)),)


def test_one_request_waits_a_little_for_a_hot_model_that_is_idle() -> None:
    hot = awake("hot", last_call=NOW, gap_s=1.0)
    found = decided(hot, asleep("b", NOW))
    assert found.actions == ()
    # Away for 1 + 2 + 1 + 2 s, called once a second: 6 * 6 / 2.
    assert found.look_again_at == pytest.approx(NOW + 18, abs=0.1)
    later = policy.decide(pool(hot, asleep("b", NOW)), NOW + 19)
    assert later.actions == (BringUp("b", (0,), sleep=("hot",)),)


def test_a_long_queue_waits_less() -> None:
    hot = awake("hot", last_call=NOW, gap_s=1.0)
    found = decided(hot, asleep("b", *[NOW] * 18))
    assert found.look_again_at == pytest.approx(NOW + 1, abs=0.1)


def test_busy_engines_keep_their_residency() -> None:
    busy = awake("a", in_flight=1, awake_since=NOW - 1)
    view = pool(busy, asleep("b", NOW - 1000))
    left_s = policy.residency_s(view, busy) - 1
    found = policy.decide(view, NOW)
    assert found.actions == ()
    assert found.look_again_at == pytest.approx(NOW + left_s, abs=0.1)


def test_busy_engines_are_drained_after_it_for_one_that_waited_its_share() -> None:
    busy = awake("a", in_flight=3, last_call=NOW, gap_s=0.1)
    new, old = asleep("b", NOW), asleep("b", NOW - 1000)
    assert decided(busy, new).actions == ()
    assert decided(busy, old).actions == (BringUp("b", (0,), drain=("a",)),)


def test_no_model_is_too_hot_to_go() -> None:
    hot = awake("hot", in_flight=1, last_call=NOW, gap_s=0.001, service_s=1.0)
    waiting = asleep("b", NOW)
    view = pool(hot, waiting)
    found = policy.decide(view, NOW)
    share_s = policy.fair_share_s(view, waiting)
    assert found.look_again_at == pytest.approx(NOW + share_s, abs=0.1)
    later = replace(hot, last_call=NOW + share_s + 1)
    found = policy.decide(pool(later, waiting), NOW + share_s + 1)
    assert found.actions == (BringUp("b", (0,), drain=("hot",)),)


def test_pinned_models_stay() -> None:
    found = decided(awake("a", pinned=True), asleep("b", NOW - 1000))
    assert found == Decision()


def test_overdue_models_go_by_age_and_keep_their_ranks() -> None:
    older = asleep("older", NOW - 2000)
    longer = asleep("longer", *[NOW - 1000] * 50)
    found = decided(awake("a"), longer, older)
    assert found.actions == (BringUp("older", (0,), sleep=("a",)),)
    waits = replace(older, ranks=(0, 1), num_ranks=2)
    busy = awake("a", in_flight=1, awake_since=NOW)
    younger = absent("younger", NOW)
    assert decided(busy, waits, younger, num_ranks=2).actions == ()


def test_what_was_left_over_waits_behind_those_that_had_no_turn() -> None:
    left = asleep("left", NOW - 900, down_since=NOW - 700)
    other = asleep("other", NOW - 800)
    found = decided(awake("a"), left, other)
    assert [action.model for action in found.actions] == ["other"]


def test_nothing_comes_up_over_what_moves() -> None:
    going = awake("a", phase_until=NOW - 1)
    for phase in (Phase.COMING, Phase.GOING):
        found = decided(replace(going, phase=phase), asleep("b", NOW - 1000))
        assert found.actions == ()


def test_engines_that_share_a_rank_share_their_leader() -> None:
    first = awake("a", ranks=(0, 1, 2, 3))
    second = absent("b", NOW - 1000, num_ranks=2)
    found = decided(first, second, num_ranks=4, awake_per_rank=2)
    assert found.actions == (BringUp("b", (0, 1)),)
    elsewhere = replace(second, ranks=(2, 3), is_bound=True)
    found = decided(first, elsewhere, num_ranks=4, awake_per_rank=2)
    assert found.actions == (BringUp("b", (2, 3), sleep=("a",)),)


def test_lost_ranks_are_not_used() -> None:
    found = policy.decide(PoolView((1,), (absent("b", NOW),)), NOW)
    assert found.actions == (BringUp("b", (1,)),)
    assert policy.decide(PoolView((1,), (asleep("b", NOW),)), NOW) == Decision()


# ------------------------------------------------------------------ limits


def test_idle_engines_sleep_after_their_ttl() -> None:
    idle = awake("a", limits=Limits(idle_ttl_s=60.0), idle_since=NOW - 50)
    assert decided(idle).look_again_at == pytest.approx(NOW + 10, abs=0.1)
    old = replace(idle, idle_since=NOW - 60)
    assert decided(old).actions == (PutToSleep("a"),)
    assert decided(replace(old, pinned=True)).actions == ()
    assert decided(replace(old, in_flight=1)).actions == ()


def test_what_waited_too_long_is_given_up() -> None:
    limited = asleep("b", NOW - 70, NOW - 60, NOW - 5, limits=Limits(max_wait_s=60.0))
    (given_up,) = decided(awake("a", pinned=True), limited).actions
    assert isinstance(given_up, GiveUp)
    assert (given_up.model, given_up.num_requests) == ("b", 2)
    assert "max_wait_s" in given_up.refusal.reason


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    refused = policy.admit(pool(awake("a"), asleep("b")), "c", NOW)
    assert refused is not None
    assert refused.is_unknown
    assert "['a', 'b']" in refused.reason


def test_a_full_queue_is_refused() -> None:
    full = asleep("b", NOW - 1, NOW, limits=Limits(max_queue=2))
    refused = policy.admit(pool(full), "b", NOW)
    assert refused is not None
    assert "max_queue" in refused.reason
    assert refused.retry_after_s > 0
    room = replace(full, queue=(NOW,))
    assert policy.admit(pool(room), "b", NOW) is None


def test_what_cannot_be_served_in_time_is_refused() -> None:
    patient = absent("b", limits=Limits(max_wait_s=11.0))
    assert policy.admit(pool(patient), "b", NOW) is None
    hurried = absent("b", limits=Limits(max_wait_s=9.0))
    refused = policy.admit(pool(hurried), "b", NOW)
    assert refused is not None
    assert "max_wait_s" in refused.reason
    assert refused.retry_after_s == pytest.approx(1.0)


def test_no_rank_to_be_had_is_refused() -> None:
    refused = policy.admit(pool(awake("a", pinned=True), asleep("b")), "b", NOW)
    assert refused is not None
    assert "no room" in refused.reason
    assert math.isfinite(refused.retry_after_s)


@pytest.mark.parametrize("phase", [Phase.COMING, Phase.GOING])
def test_a_moving_engine_admits_for_when_it_is_there(phase: Phase) -> None:
    moving = replace(awake("a", phase_until=NOW + 5), phase=phase)
    wait_s = policy.expected_wait_s(pool(moving), moving, NOW)
    assert wait_s == pytest.approx(5.0 if phase is Phase.COMING else 7.0)


def test_the_rate_falls_while_nobody_calls() -> None:
    model = absent("a", last_call=NOW - 1, gap_s=1.0)
    assert policy.rate(model, NOW) == pytest.approx(1.0)
    assert policy.rate(model, NOW + 9) == pytest.approx(0.1)
    assert policy.average_gap(math.inf, -math.inf, NOW) == math.inf
    assert policy.average_gap(math.inf, NOW - 1, NOW) == 1.0
    assert policy.average_gap(1.0, NOW - 6, NOW) == pytest.approx(2.0)


def test_calls_that_came_together_count_as_if_one_by_one() -> None:
    gap_s, at = 5.0, NOW
    for _ in range(4):
        at += 0.5
        gap_s = policy.average_gap(gap_s, at - 0.5, at)
    assert policy.average_gap(5.0, NOW, NOW + 2, 4) == pytest.approx(gap_s)


# ------------------------------------------------------------------ any sequence


def checked(view: PoolView, now: float) -> Decision:
    """`decide`, with what may never be decided asserted on what it was shown."""
    before = replace(view)
    decision = policy.decide(view, now)
    assert view == before
    assert decision.look_again_at is None or decision.look_again_at > now
    models = {model.name: model for model in view.models}
    named: list[str] = []
    for action in decision.actions:
        match action:
            case BringUp():
                named += [action.model, *action.sleep, *action.drain]
                check_bring_up(view, models, action, now)
            case PutToSleep():
                named.append(action.model)
                assert not models[action.model].is_busy
                assert not models[action.model].pinned
    assert len(named) == len(set(named))
    return decision


def check_bring_up(
    view: PoolView, models: dict[str, ModelView], action: BringUp, now: float
) -> None:
    model = models[action.model]
    assert model.is_down
    assert model.queue
    assert len(action.ranks) == model.num_ranks
    assert set(action.ranks) <= set(view.ranks)
    for name in (*action.sleep, *action.drain):
        victim = models[name]
        assert victim.phase is Phase.AWAKE
        assert not victim.pinned
        assert (victim.in_flight > 0) == (name in action.drain)
        if victim.is_busy:
            assert now >= victim.awake_since + view.min_residency_s
    gone = {*action.sleep, *action.drain}
    stay = [m for m in view.models if m.is_placed and m.name not in gone]
    for rank in action.ranks:
        assert sum(rank in m.ranks for m in stay) < view.awake_per_rank
    for other in stay:
        if len(other.ranks) > 1 and len(action.ranks) > 1:
            is_shared = not set(other.ranks).isdisjoint(action.ranks)
            assert not is_shared or other.ranks[0] == action.ranks[0]


class AnyCalls(RuleBasedStateMachine):
    """Calls of any kind at any time; the simulator asserts that each is answered by
    its own model, on ranks where no more than allowed are awake."""

    @initialize(
        num_ranks=st.sampled_from([1, 2, 4]),
        awake_per_rank=st.integers(1, 2),
        widths=st.lists(st.sampled_from([1, 1, 2]), min_size=2, max_size=6),
        is_pinned=st.booleans(),
        idle_ttl_s=st.sampled_from([None, 3.0]),
        wake_s=st.sampled_from([0.1, 3.0]),
        num_slots=st.integers(1, 3),
    )
    def start(
        self, num_ranks: int, awake_per_rank: int, widths: list[int], is_pinned: bool,
        idle_ttl_s: float | None, wake_s: float, num_slots: int,
    ) -> None:  # fmt: skip
        costs = Costs(wake_s / 2, {1: wake_s / 2}, wake_s * 5)
        models = [
            Model(
                f"m{number}", costs, min(width, num_ranks), num_slots,
                limits=Limits(idle_ttl_s=idle_ttl_s),
            )
            for number, width in enumerate(widths)
        ]  # fmt: skip
        if is_pinned:
            models[0] = replace(models[0], pinned=True, num_ranks=1)
        trace = Trace("any", num_ranks, tuple(models), (), 1.0, awake_per_rank)
        self.sim = Simulation(trace, Contender("checked", checked))
        self.names = [model.name for model in models]
        # A pinned one that is up before the others call: what then has no room is
        # refused.
        self.sim.add(Call(0.0, "m0", 1.0))
        self.sim.advance(20.0)

    @rule(number=st.integers(0, 5), calls=st.integers(1, 6), share=st.floats(0.01, 1))
    def call(self, number: int, calls: int, share: float) -> None:
        name = self.names[number % len(self.names)]
        if policy.admit(self.sim.pool, name, self.sim.now) is None:
            for _ in range(calls):
                self.sim.add(Call(self.sim.now, name, share * LONGEST))
            self.sim.advance(self.sim.now)

    @rule(seconds=st.sampled_from([0.05, 0.5, 2.0, 10.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.sim.advance(self.sim.now + seconds)

    @precondition(lambda self: self.waiting())
    @rule(number=st.integers(0, 5), gap_s=st.sampled_from([0.5, 2.0]))
    def keep_one_busy(self, number: int, gap_s: float) -> None:
        """What starves others, if anything does: one that never is idle, for as long
        as the others may wait."""
        until = self.sim.now + self.sim.bound_s * 1.01
        waiting = self.waiting()
        while self.sim.now < until and waiting <= self.waiting():
            self.call(number, 1, 1.0)
            self.wait(gap_s)
        self.nobody_starves()

    def waiting(self) -> set[float]:
        """Since when those that are down and are called have waited."""
        engines = self.sim.engines.values()
        return {e.head_since for e in engines if e.queue and e.view.is_down}

    @invariant()
    def nobody_starves(self) -> None:
        if not hasattr(self, "sim"):
            return
        for engine in self.sim.engines.values():
            if engine.queue:
                assert self.sim.now - engine.head_since <= self.sim.bound_s
        assert self.sim.longest_head_s <= self.sim.bound_s

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.advance(math.inf)
            assert not any(engine.queue for engine in self.sim.engines.values())


AnyCalls.TestCase.settings = settings(
    max_examples=150, stateful_step_count=20, deadline=None
)
TestAnyCalls = AnyCalls.TestCase
