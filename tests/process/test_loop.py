"""What a rank does with commands that come while it is busy: `loop_rank.py`.

The process starts once and goes through every scenario; each test looks at some.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.members import by_scenario, run

START_AND_RUN_S = 100.0
SCENARIOS = [
    "drop_of_nothing",
    "drop_of_prepared",
    "drop_of_built",
    "drop_of_what_is_building",
    "drop_behind_what_was_heard",
    "drop_behind_what_came_with_the_build",
    "sleep_while_held",
    "drop_while_held",
    "hold_beside_a_build",
    "sleep_refused_too_late",
]
BUILT, OTHER, LAST = 1, 2, 3

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    """What each scenario gave."""
    statuses, texts = run(
        "tests.process.loop_rank", *SCENARIOS, num_ranks=1, timeout_s=START_AND_RUN_S
    )
    assert statuses == [0], texts[0][-4000:]
    return {name: result for name, (result,) in by_scenario(texts).items()}


@pytest.mark.parametrize("what", ["nothing", "prepared"])
def test_what_is_not_built_here_is_given_up_beside_a_build(
    results: Results, what: str
) -> None:
    """The controller waits for the answer, and would end a rank that owes it."""
    result = results[f"drop_of_{what}"]
    assert result["meanwhile"] == [[OTHER], [BUILT]]
    assert result["afterwards"] == [[], []]
    assert result["left"] == []


@pytest.mark.parametrize("what", ["built", "what_is_building"])
def test_what_is_built_here_is_given_up_after_the_build(
    results: Results, what: str
) -> None:
    """Until then the rank says that it is at work on another."""
    result = results[f"drop_of_{what}"]
    assert result["meanwhile"] == [[], [BUILT]]
    assert result["afterwards"] == [[OTHER], []]
    assert result["left"] == []


@pytest.mark.parametrize("what", ["was_heard", "came_with_the_build"])
def test_what_is_given_up_beside_a_build_does_not_come_back_after_it(
    results: Results, what: str
) -> None:
    result = results[f"drop_behind_what_{what}"]
    assert result["told"] == [["build", BUILT], ["prepare", LAST]]
    assert result["closed"] == [OTHER]


def test_an_engine_that_is_held_sleeps_when_it_is_free(results: Results) -> None:
    """Until then its leader does what else there is to do."""
    result = results["sleep_while_held"]
    assert result["held"] == [[], 3, False]
    assert result["free"] == [["EngineSuspended"], 0, True]
    assert result["level"] == 1


def test_an_engine_held_by_a_dead_follower_can_be_given_up(results: Results) -> None:
    result = results["drop_while_held"]
    assert result["said"] == ["EngineClosed"]
    assert result["left"] == []


def test_a_follower_that_forms_a_world_does_not_wait_for_its_leaders_build(
    results: Results,
) -> None:
    """The engine is held for that build already; the follower is told so at once."""
    result = results["hold_beside_a_build"]
    assert result["held"] == [LAST]
    assert result["num_steps"] == 3


def test_a_refusal_in_the_middle_of_falling_asleep_is_a_failure(
    results: Results,
) -> None:
    """The engine does not go on: what only refuses is taken to be as it was."""
    result = results["sleep_refused_too_late"]
    assert result["errors"] == [["RankFailure", "free_weights"]]
