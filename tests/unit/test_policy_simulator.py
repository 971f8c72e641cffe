"""The simulator of `benchmarks.policy`: small traces whose course is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import policy as simulator
from benchmarks import traces
from benchmarks.policy import CONTENDERS, Contender, Row, Simulation, beats, simulate
from benchmarks.traces import RECIPES, Call, Model, Scale, Trace, make
from vllm_resident.controller.policy import Decision, Limits

SCALE = Scale("test", wake_s=1.0, load_s=3.0, service_s=1.0, num_slots=2)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def trace(*calls: tuple[float, str, float], num_ranks: int = 1, **changes: object):
    names = sorted({name for _, name, _ in calls})
    models = tuple(Model(name, SCALE.costs, num_slots=2) for name in names)
    listed = tuple(Call(*call) for call in calls)
    return replace(Trace("test", num_ranks, models, listed, 1.0), **changes)


def waits(name: str, given: Trace) -> list[float]:
    return Simulation(given, BY_NAME[name]).run().waits


@pytest.mark.parametrize("name", BY_NAME)
def test_every_call_is_answered_once(name: str) -> None:
    for recipe in RECIPES:
        small = make(replace(recipe, num_calls=60), SCALE, seed=3)
        done = Simulation(small, BY_NAME[name]).run()
        assert len(done.waits) == done.num_answered == len(small.calls)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_load_a_wake_up_and_no_switch_cost_what_they_should(name: str) -> None:
    given = trace((0, "a", 1), (10, "a", 1), (20, "b", 1), (40, "a", 1))
    # The first goes to a free rank: nothing has to fall asleep. The policy waits a
    # little for another call of a before it lets it go.
    patience_s = [0, 0, 1.0, 0] if name == "policy" else [0, 0, 0, 0]
    for waited, least_s, more_s in zip(
        waits(name, given), [2.6, 0, 3.0, 1.0], patience_s, strict=True
    ):
        assert least_s - 1e-6 <= waited <= least_s + more_s + 1e-6


@pytest.mark.parametrize("name", BY_NAME)
def test_an_engine_with_a_free_slot_lets_nobody_wait(name: str) -> None:
    given = trace((0, "a", 5), (0, "a", 5), (5, "a", 5))
    assert waits(name, given) == pytest.approx([2.6, 2.6, 2.6])


def test_fifo_keeps_the_order_and_drains() -> None:
    given = trace((0, "a", 10), (4, "b", 1), (5, "a", 1))
    # b comes up when a's call has ended, the second a after b's.
    waited = waits("fifo", given)
    assert waited == pytest.approx([2.6, 12.6 + 3 - 4, 15.6 + 1 + 1 - 5])


def test_lru_lets_the_busy_go_on_and_takes_the_least_recently_used() -> None:
    given = trace((0, "a", 10), (4, "b", 1), (5, "a", 1))
    # In order of their starts: the second a does not wait for b.
    assert waits("lru", given) == pytest.approx([2.6, 0.0, 12.6 + 3 - 4])
    given = trace((0, "a", 1), (1, "b", 1), (10, "a", 1), (20, "c", 1), num_ranks=2)
    done = Simulation(given, BY_NAME["lru"]).run()
    assert [e.view.name for e in done.engines.values() if e.view.is_placed] == [
        "a",
        "c",
    ]


def test_only_the_baseline_that_moves_loads_a_sleeper_elsewhere() -> None:
    calls = [(0, "a", 1), (0, "b", 1), (9, "c", 60), (10, "a", 1)]
    moved = {
        name: Simulation(trace(*calls, num_ranks=2), BY_NAME[name]).run().num_loads
        for name in ("lru", "lru-moves")
    }
    assert moved == {"lru": 3, "lru-moves": 4}


def test_the_same_seed_gives_the_same_rows() -> None:
    recipe = replace(RECIPES[0], num_calls=200)
    first, again, other = (make(recipe, SCALE, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.calls != other.calls
    own = BY_NAME["policy"]
    assert simulate(first, own) == simulate(again, own)


def test_a_policy_that_starves_a_model_is_found() -> None:
    idle = Contender("idle", lambda _pool, _now: Decision())
    with pytest.raises(AssertionError, match="starved"):
        Simulation(trace((0, "a", 1)), idle).run()


def test_refusals_are_counted_and_wait_for_ever() -> None:
    given = trace(*[(0, "a", 1)] * 10)
    limited = replace(given.models[0], limits=Limits(max_queue=4))
    row = simulate(replace(given, models=(limited,)), BY_NAME["policy"])
    assert (row.num_calls, row.num_refused) == (10, 6)
    assert row.p95_s == math.inf
    assert row.goodput_share < 0.5


def test_idle_engines_are_put_to_sleep() -> None:
    given = trace((0, "a", 1), (100, "a", 1))
    limited = replace(given.models[0], limits=Limits(idle_ttl_s=5.0))
    done = Simulation(replace(given, models=(limited,)), BY_NAME["policy"]).run()
    assert done.num_idled == 2
    assert done.waits[1] == pytest.approx(0.6)


def row(policy: str, p95_s: float, num_refused: int = 0) -> Row:
    return Row("t", policy, 9, 0, p95_s, 0, 0, 0, 0, 0.0, 1.0, num_refused)


def test_to_beat_is_to_be_below_both_and_to_refuse_no_more() -> None:
    others = [row("fifo", 9.0), row("lru", 5.0)]
    assert beats([row("policy", 4.0), *others], needs_switches=True)
    assert not beats([row("policy", 5.0), *others], needs_switches=True)
    assert beats([row("policy", 5.0), *others], needs_switches=False)
    assert not beats([row("policy", 4.0, num_refused=1), *others], needs_switches=True)


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(value) for value in range(1, 101)]
    found = [simulator.percentile(values, share) for share in (0.5, 0.95, 1.0)]
    assert found == [50.0, 95.0, 100.0]


def test_traces_are_as_described() -> None:
    by_name = {recipe.name: make(recipe, SCALE, seed=0) for recipe in RECIPES}
    for recipe in RECIPES:
        made = by_name[recipe.name]
        assert len(made.calls) == pytest.approx(recipe.num_calls, rel=0.3)
        assert [call.at for call in made.calls] == sorted(c.at for c in made.calls)
        assert all(call.service_s <= traces.LONGEST for call in made.calls)
    called = [call.model for call in by_name["alternating"].calls]
    assert all(before != after for before, after in pairwise(called))
    assert not by_name["resident"].needs_switches
    assert {model.num_ranks for model in by_name["wide"].models} == {1, 2, 4}


def test_the_policy_beats_both_on_a_shipped_trace() -> None:
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == "alternating")
    given = make(recipe, simulator.measured(), seed=0)
    rows = [simulate(given, BY_NAME[name]) for name in ("policy", "fifo", "lru")]
    assert beats(rows, needs_switches=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_policy_beats_both_on_every_shipped_trace() -> None:
    """As `python -m benchmarks.policy` says by its exit status; it starves nobody on
    the way (`Simulation.run`)."""
    assert simulator.main([]) == 0


def test_the_command_prints_a_table_and_writes_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "policy.json"
    assert simulator.main(["--trace", "resident", "--json", str(file)]) == 0
    assert "resident-large" in capsys.readouterr().out
    document = json.loads(file.read_text())
    assert len(document["rows"]) == 2 * len(CONTENDERS)
    assert document["beaten_on"] == []


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--wake", "40"], ["--wake", "-1"], ["--trace", "none"]):
        with pytest.raises(SystemExit):
            simulator.main(argv)
        assert argv[0].removeprefix("--") in capsys.readouterr().err
