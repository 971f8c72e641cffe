"""Worlds over real gloo between real processes: `world_member.py`, four times.

The processes start once and go through every scenario; each test looks at one.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import NO_SHARED_MEMORY
from tests.members import by_scenario, run

NUM_RANKS = 4
START_AND_RUN_S = 280.0
SCENARIOS = [
    "overlapping",
    "outside",
    "twenty",
    "similar_identities",
    "abort_a_meeting",
    "abort_and_close_at_once",
    "absent_member",
    "crossed",
    "closed_on_one_side",
]
MEMBERS = {"left": [0, 1], "middle": [1, 2], "right": [2, 3], "all": [0, 1, 2, 3]}

pytestmark = [pytest.mark.process, pytest.mark.timeout(310)]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results() -> Results:
    """What each scenario gave, by rank."""
    statuses, texts = run(
        "tests.process.world_member",
        *SCENARIOS,
        num_ranks=NUM_RANKS,
        timeout_s=START_AND_RUN_S,
    )
    assert statuses == [0] * NUM_RANKS, [text[-2000:] for text in texts]
    return by_scenario(texts)


def expected_sums(names: list[str]) -> dict[str, list[float]]:
    """Five ways to add 2**rank over the members of each world."""
    return {name: [float(sum(2**rank for rank in MEMBERS[name]))] * 5 for name in names}


@pytest.mark.parametrize("moment", ["first", "again"])
def test_overlapping_worlds_are_alive_together(results: Results, moment: str) -> None:
    for rank, result in enumerate(results["overlapping"]):
        mine = [name for name, members in MEMBERS.items() if rank in members]
        assert result[moment] == expected_sums(mine)


@pytest.mark.parametrize(
    ("closed", "gone"), [("left", ["left"]), ("all", ["left", "all"])]
)
def test_closing_one_world_leaves_the_others_working(
    results: Results, closed: str, gone: list[str]
) -> None:
    for rank, result in enumerate(results["overlapping"]):
        mine = [
            name
            for name, members in MEMBERS.items()
            if rank in members and name not in gone
        ]
        assert result[f"without {closed}"] == expected_sums(mine)


def test_names_agree_whatever_each_rank_formed_before(results: Results) -> None:
    for world, members in MEMBERS.items():
        names = [set(results["overlapping"][rank]["names"][world]) for rank in members]
        everywhere = set.intersection(*names)
        # vLLM's own two, the default group and those of the whole world.
        assert {"tp:0", "pp:0"} < everywhere
        assert len(everywhere) >= 5
    for result in results["overlapping"]:
        numbers = [set(names) - {"tp:0", "pp:0"} for names in result["names"].values()]
        assert sum(map(len, numbers)) == len(set.union(*numbers))


def test_outside_a_world_the_process_is_its_own_again(results: Results) -> None:
    for rank, result in enumerate(results["outside"]):
        assert result["inside"] == {"RANK": str(3 - rank), "WORLD_SIZE": "4"}
        assert result["after"]
        assert result["rng"]
        assert result["hook"]
        assert not result["default_group"]


def test_twenty_worlds_leave_nothing(results: Results) -> None:
    """Descriptors, threads, shared-memory mappings and keys in the store."""
    for result in results["twenty"]:
        assert result["right"]
        # A thread may have been about to end before.
        pairs = zip(result["after"], result["before"], strict=True)
        assert max(now - then for now, then in pairs) <= 0, result
        assert result["files"] == []


def test_a_live_world_holds_keys_and_shared_memory(results: Results) -> None:
    """Otherwise that nothing is left would say nothing."""
    for result in results["overlapping"]:
        assert result["num_store_keys"] > 0
    for result in results["similar_identities"]:
        if not result["shares_memory"]:
            pytest.skip(NO_SHARED_MEMORY)
        assert result["before"] > 0


def test_closing_world_1_leaves_the_memory_of_world_12_alone(results: Results) -> None:
    for result in results["similar_identities"]:
        assert result["after"] == result["before"]
        assert result["sums"] == [15.0] * 5


def test_an_abort_ends_a_wait_in_the_store(results: Results) -> None:
    result = results["abort_a_meeting"][0]
    assert result["seconds"] < 18  # of twenty
    assert not result["entered"]
    assert result["num_store_keys"] == 0


def test_an_abort_in_the_middle_of_a_close_is_none(results: Results) -> None:
    for result in results["abort_and_close_at_once"]:
        assert result["errors"] == []
        assert result["num_groups"] == 0


def test_a_member_that_does_not_come_is_named(results: Results) -> None:
    for result in results["absent_member"][:3]:
        assert "ranks [3] of world incomplete did not come" in result["message"]
        assert 15 <= result["seconds"] < 40


def test_worlds_that_need_each_others_leaders_form(results: Results) -> None:
    for rank, result in enumerate(results["crossed"]):
        assert result["sums"] == [9.0 if rank in (0, 3) else 6.0] * 5


def test_a_world_closed_on_one_side_fails_on_the_other(results: Results) -> None:
    assert results["closed_on_one_side"][0]["seconds"] < 18
