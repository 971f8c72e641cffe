"""Who gives up memory for whom: the policy alone, then as the pool carries it out."""

from __future__ import annotations

import pytest

from tests.unit.controller_harness import WEIGHTS, Harness, spec
from vllm_resident.controller.memory import (
    Demotion,
    Holder,
    demotions,
    device_shortage,
)
from vllm_resident.messages import EngineSpec, SwitchDone

HOSTS = {0: "x", 1: "x", 2: "y"}


def sleeper(name: str, last_used: float, *ranks: int, level: int = 1, size: int = 10):
    return Holder(
        name, level, last_used, is_free=True, host_bytes=dict.fromkeys(ranks, size)
    )


@pytest.mark.parametrize(
    ("budget", "wanted", "chosen"),
    [
        (None, {0: 1000}, []),
        (30, {0: 10}, []),
        # The least recently used first, one level at a time.
        (20, {0: 10}, [Demotion("old", 2)]),
        (10, {0: 10}, [Demotion("old", 2), Demotion("new", 2)]),
        # Only the crowded machine's count.
        (20, {2: 10}, []),
    ],
)
def test_demotions(budget, wanted, chosen):
    sleepers = [sleeper("new", 2, 1), sleeper("old", 1, 0)]
    assert demotions(sleepers, HOSTS, budget, wanted) == (chosen, True)


def test_what_does_not_fit_whatever_goes():
    sleepers = [sleeper("new", 2, 1), sleeper("old", 1, 0)]
    chosen, fits = demotions(sleepers, HOSTS, 5, {0: 10})
    assert [each.name for each in chosen] == ["old", "new"]
    assert not fits


def test_what_may_not_be_moved_stays():
    pinned = Holder("pinned", 1, 0.0, is_free=False, host_bytes={0: 10})
    assert demotions([pinned, sleeper("b", 1, 0)], HOSTS, 10, {}) == (
        [Demotion("b", 2)],
        True,
    )
    assert demotions([pinned], HOSTS, 5, {}) == ([], False)


def test_what_cannot_drop_its_weights_is_unloaded():
    made_up = Holder("m", 1, 0.0, is_free=True, can_drop=False, host_bytes={0: 10})
    assert demotions([made_up], HOSTS, 5, {}) == ([Demotion("m", None)], True)


def test_level_2_that_keeps_something_is_unloaded_last():
    deep = sleeper("deep", 1, 0, level=2, size=4)
    light = sleeper("light", 2, 0, size=10)
    assert demotions([deep, light], HOSTS, 10, {}) == ([Demotion("light", 2)], True)
    assert demotions([deep, light], HOSTS, 3, {}) == (
        [Demotion("light", 2), Demotion("deep", None)],
        True,
    )


def awake(name: str, last_used: float, size: int) -> Holder:
    return Holder(name, 0, last_used, is_free=True, device_bytes={0: size << 20})


@pytest.mark.parametrize(
    ("needed", "says"),
    [
        (10, ""),
        (25, "needs 25 MiB on rank 0, where 10 MiB of 50 MiB are free: 'old' would"),
        (45, "'old', 'new' would have to sleep"),
        (51, "does not fit even alone"),
    ],
)
def test_device_shortage(needed, says):
    others = [awake("new", 2, 20), awake("old", 1, 20)]
    text = device_shortage("a", {0: needed << 20}, others, 50 << 20)
    assert says in text
    assert bool(text) is bool(says)


# ------------------------------------------------------------ carried out


def levels(harness: Harness) -> dict[str, int]:
    return {e.name: e.sleep_level for e in harness.status().engines}


def test_rotation_demotes_the_least_recently_used():
    """Room for three sleepers, six models in rotation."""
    harness = Harness(1)
    harness.state.host_memory_bytes = 3 * WEIGHTS
    harness.load_ready(spec("m0"))
    for number in range(1, 6):
        harness.tick(1)
        harness.heartbeats()
        harness.switch(f"m{number - 1}", spec(f"m{number}"))
        harness.answer_all()
        assert harness.to_clients(SwitchDone)
        kept = sum(
            memory.host_bytes
            for engine in harness.status().engines
            for memory in engine.memory.values()
        )
        assert kept <= harness.state.host_memory_bytes
    assert levels(harness) == {"m0": 2, "m1": 2, "m2": 1, "m3": 1, "m4": 1, "m5": 0}
    # m2 is used again; then m3 is the oldest at level 1.
    for name, other in (("m5", "m2"), ("m2", "m0")):
        harness.tick(1)
        harness.heartbeats()
        harness.switch(name, EngineSpec(other))
        harness.answer_all()
    assert levels(harness) == {"m0": 0, "m1": 2, "m2": 1, "m3": 2, "m4": 1, "m5": 1}


def test_what_does_not_fit_at_all_drops_its_weights():
    harness = Harness(1)
    harness.state.host_memory_bytes = WEIGHTS - 1
    harness.load_ready(spec("a"))
    harness.sleep("a", 1)
    assert "level 2 drops" in harness.error().message
    harness.switch("a", spec("b"))
    harness.answer_all()
    assert harness.to_clients(SwitchDone)
    assert levels(harness) == {"a": 2, "b": 0}


def test_load_that_does_not_fit_says_what_would_have_to_sleep():
    harness = Harness(1)
    harness.state.awake_per_rank = 2
    harness.state.device_memory_bytes = 2 * WEIGHTS - 1
    harness.load_ready(spec("a"))
    harness.load(spec("b"))
    harness.answer_all()
    error = harness.error()
    assert error.kind == "CommandRejected"
    assert "'a' would have to sleep" in error.message
    assert levels(harness) == {"a": 0}
    harness.sleep("a")
    harness.answer_all()
    harness.load_ready(spec("b"))
    harness.wake_up("a")
    assert "'b' would have to sleep" in harness.error().message


def test_a_layout_that_does_not_fit_changes_nothing():
    """Neither what is kept nor what was to be loaded beside."""
    harness = Harness(2)
    sleeper = EngineSpec("a", "/models/a", [0], {}, asleep=True)
    harness.load_ready(spec("b", [1]))
    harness.load(sleeper)
    harness.answer_all()
    harness.state.device_memory_bytes = WEIGHTS - 1
    before = harness.status()
    pinned = EngineSpec("a", "/models/a", [0], {}, pinned=True)
    harness.apply(pinned, spec("c", [1]))
    assert harness.error().kind == "CommandRejected"
    assert harness.to_ranks() == []
    after = harness.status()
    assert after.engines == before.engines
    assert not harness.engine("a").spec.pinned
