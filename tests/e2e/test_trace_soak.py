"""Eight models on two ranks under a mixed trace of calls: every answer is the model's
own, nobody is lost, nothing is left (`benchmarks/soak.py`, of which this is a short one
and a long one)."""

from __future__ import annotations

import pytest

from benchmarks import soak
from benchmarks.mixed import MANNERS
from benchmarks.soak import MODELS, Answers, Outcome


def check(outcome: Outcome) -> None:
    assert outcome.wrong == [], soak.summary(outcome)
    assert set(outcome.by_manner) == set(MANNERS)
    # No limit of the pool's is near: whoever asks for what can be is answered.
    assert outcome.num_refused == 0
    # All of them came up, and made room for others.
    assert outcome.num_switches["load"] >= len(MODELS)
    assert outcome.num_switches["wake_up"] > 0
    assert 0.0 < outcome.lost_share < 1.0


@pytest.mark.timeout(600)
def test_a_minute_of_mixed_calls(plain: Answers) -> None:
    check(soak.soak(num_rounds=2, round_s=20.0, seed=1, answers=plain))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_mixed_calls(plain: Answers) -> None:
    check(soak.soak(num_rounds=10, round_s=60.0, seed=2, answers=plain))
