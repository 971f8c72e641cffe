"""Communicators that are kept: `communicator_member.py` four times, over a SIMULATED
device backend whose communicators cost 330 ms each.

The processes start once for each plan and go through its scenarios; each test looks at
one. The times are logged; what is asserted are ratios, and deadlines of seconds.
"""

from __future__ import annotations

import json
import logging
import statistics
from typing import Any

import pytest

from tests import members

NUM_RANKS = 4
CREATION_S = 0.33
# For a group whose time-out is 2 s, or whose world is aborted after half a second.
DEADLINE_S = 10.0
SMALL_BUDGET = 20
LAYOUTS_BUDGET = 1000
SCENARIOS = [
    "layouts", "without_pool", "interleaved", "budget", "ascend", "lost_on_one_side",
    "broken_while_kept", "of_another_layout", "vllms_own", "hangs_until_abort",
    "hangs_until_time_out", "dies",
]  # fmt: skip
SURVIVORS = range(NUM_RANKS - 1)

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]

log = logging.getLogger(__name__)

Results = dict[str, list[dict[str, Any]]]


def run(plan: dict[str, Any], scenarios: list[str]) -> Results:
    """What each scenario gave, by its name and in the order of ranks."""
    statuses, texts = members.run(
        "tests.process.communicator_member",
        json.dumps(plan),
        *scenarios,
        num_ranks=NUM_RANKS,
        timeout_s=380.0,
    )
    last = -9 if "dies" in scenarios else 0
    expected = [0] * (NUM_RANKS - 1) + [last]
    assert statuses == expected, [text[-2000:] for text in texts]
    assert all("SIMULATED" in text for text in texts)
    return members.by_scenario(texts)


@pytest.fixture(scope="module")
def results() -> Results:
    plan = {
        "creation_s": CREATION_S,
        "num_layouts": 10,
        "num_distinct": 3,
        "seed": 7,
        "num_worlds": 16,
        "num_small": 6,
        "small_budget": SMALL_BUDGET,
    }
    return run(plan, SCENARIOS)


def check_layouts(results: Results) -> None:
    """What is asserted holds however slow the machine is: nothing is made, no more is
    checked than is taken, and an entry costs far less than making one group would."""
    rows = [row for result in results["layouts"] for row in result["rows"]]
    rows = [row for row in rows if row["ranks"] > 1]
    assert all(row["right"] and row["kept"] <= LAYOUTS_BUDGET for row in rows)
    anew = [row for row in rows if not row["is_known"]]
    again = [row for row in rows if row["is_known"]]
    assert again
    assert all(row["made"] > 0 for row in anew)
    assert all(row["made"] == 0 for row in again)
    assert all(0 < row["checked"] <= row["reused"] for row in again)
    for what in ("took_s", "formed_s"):
        of_all = sorted(row[what] for row in again)
        most_s = of_all[int(0.95 * (len(of_all) - 1))]
        log.info(
            "%s",
            f"{what}: anew {statistics.median(row[what] for row in anew):.3f} s, "
            f"again median {statistics.median(of_all) * 1000:.1f} ms, "
            f"p95 {most_s * 1000:.1f} ms, most {of_all[-1] * 1000:.1f} ms, "
            f"{len(again)} times",
        )
        # Not the slowest: those are the machine's.
        assert statistics.median(of_all) < CREATION_S / 2


def test_a_layout_seen_before_is_entered_without_making_anything(
    results: Results,
) -> None:
    check_layouts(results)


def check_interleaved(results: Results, num_worlds: int) -> None:
    assert len(results["interleaved"]) == NUM_RANKS
    for result in results["interleaved"]:
        assert result["right"]
        assert result["formed"] > num_worlds / 4
        assert result["most"] > 1


def test_worlds_over_overlapping_ranks_come_and_go(results: Results) -> None:
    check_interleaved(results, 16)


@pytest.mark.slow
def test_two_thousand_worlds_over_overlapping_ranks() -> None:
    """What the model in `tests/unit/test_forming.py` says of the order, done."""
    plan = {"creation_s": 0.0, "num_worlds": 2000}
    check_interleaved(run(plan, ["interleaved"]), 2000)


@pytest.mark.slow
def test_a_hundred_random_layouts() -> None:
    plan = {
        "creation_s": CREATION_S,
        "num_layouts": 100,
        "num_distinct": 100,
        "seed": 23,
    }
    check_layouts(run(plan, ["layouts"]))


def test_without_a_pool_every_world_is_made_anew(results: Results) -> None:
    for result in results["without_pool"]:
        first, second = result["made"]
        assert first == second > 0
        assert min(result["rows"]) > first * CREATION_S


def test_the_budget_holds_and_what_is_given_up_is_gone(results: Results) -> None:
    for result in results["budget"]:
        assert result["most"] <= SMALL_BUDGET
        assert result["destroyed"] > 0
        # Measured as the process's memory, in which other things come and go.
        assert 0.5 < result["told"] < 2
        assert result["within"]
        assert result["open"] == 0
        # Descriptors, threads, groups; a thread may have been about to end before.
        more = [
            now - then
            for now, then in zip(result["after"], result["before"], strict=True)
        ]
        assert max(more) <= 0, more


def test_what_one_rank_gave_up_all_give_up(results: Results) -> None:
    for rank, result in enumerate(results["lost_on_one_side"]):
        assert result["right"]
        made, reused = result["counts"]
        assert (result["kept"] == 0) == (rank == 1)
        # Groups of one rank are its own affair; all others were made by all.
        assert made >= 7
        assert rank != 1 or reused == 0


def test_a_kept_communicator_that_broke_is_found_out(results: Results) -> None:
    for result in results["broken_while_kept"]:
        assert result["right"]
        assert result["made"] == 1


def test_what_another_layout_left_is_checked_when_it_is_taken(results: Results) -> None:
    """One group by each rank; where that is broken the next one, by its members: the
    other half follows without having it."""
    for result in results["of_another_layout"]:
        assert result["right"]
        assert result["made"] == [0, 0]
        assert result["checked"] == [1, 2 if result["rank"] < NUM_RANKS // 2 else 1]


def test_vllms_own_communicators_are_kept_and_checked_too(results: Results) -> None:
    """Of its three groups the stages' is over other ranks than the worlds before; the
    two others were theirs."""
    for result in results["vllms_own"]:
        assert result["right"]
        has_broken = result["rank"] < NUM_RANKS // 2
        assert result["made"] == [1, 2 if has_broken else 0, 2]
        assert result["checked"] == [2, 3, 1]
        assert result["open"] == 0
        assert result["gone"]


@pytest.mark.parametrize("name", ["hangs_until_abort", "hangs_until_time_out", "dies"])
def test_who_is_in_a_collective_with_the_lost_gets_out(
    results: Results, name: str
) -> None:
    """Within the deadline, with its world closed and nothing of it kept."""
    assert [each["rank"] for each in results[name]][: len(SURVIVORS)] == [*SURVIVORS]
    for result in results[name]:
        assert result["error"]
        assert result["out_s"] < DEADLINE_S
        assert result["closed"]
        assert not result["entered"]
        assert result["kept_of_it"] == []
        assert result["kept_after"] <= result["kept_before"]
    for result in results[f"next_{name}"]:
        assert result["right"]
        assert result["made"] > 0


def test_an_ascend_platforms_groups_are_the_worlds(results: Results) -> None:
    for result in results["ascend"]:
        what = {key: value for key, value in result.items() if key != "rank"}
        assert what == {
            "scenario": "ascend",
            "absent": True,
            "first begins empty": True,
            "second begins empty": True,
            "first is swapped in": True,
            "second is swapped in": True,
            "first adds up": 15.0,
            "second adds up": 15.0,
            "outside is empty": True,
            "they share none": True,
            "kept": True,
            "bytes by options": [6, 200],
            "second goes on": 15.0,
            "destroyed": 2,
            "empty at the end": True,
            "made with 3 MB": 0,
            "made with 4 MB": 1,
        }
