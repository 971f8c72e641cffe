"""The judgements of the soak: what it takes for lost, for grown and for given away."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import soak
from benchmarks.soak import MODELS, Outcome, Rest
from vllm_resident import PoolStatus
from vllm_resident.config import read_pool
from vllm_resident.journal import Journal, Transition
from vllm_resident.messages import EngineReport, RankStatus, SwitchReport

REST = Rest(
    [700 << 20, 710 << 20], [60, 60], [20, 20], [9, 9], [0, 0], [0, 0],
    900 << 20, 40, 30, 60 << 20,
)  # fmt: skip


def test_the_pool_file_declares_every_model(tmp_path: Path) -> None:
    declared = read_pool(soak.pool_file(tmp_path)).models
    assert set(declared) == set(MODELS)
    assert len({spec.model for spec in declared.values()}) == len(MODELS)
    wide = [s for s in declared.values() if s.engine_args.get("tensor_parallel_size")]
    assert len(wide) == 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_sockets": [9, 10]}, "num_sockets"),
        ({"memory_bytes": [700 << 20, 770 << 20]}, "memory_bytes"),
        ({"gateway_bytes": 1000 << 20}, "gateway_bytes"),
        ({"gateway_files": 41}, "gateway_files"),
        ({"gateway_threads": 35}, "gateway_threads"),
    ],
)
def test_what_grew_is_named(changes: dict[str, Any], what: str) -> None:
    outcome = Outcome()
    soak.check_memory([REST, replace(REST, **changes)], outcome)
    (found,) = outcome.wrong
    assert found.startswith(f"{what} grew")


def test_noise_and_less_are_no_growth() -> None:
    outcome = Outcome()
    last = replace(
        REST,
        memory_bytes=[710 << 20, 300 << 20],
        num_threads=[19, 20],
        gateway_threads=34,
    )
    soak.check_memory([REST, last], outcome)
    assert outcome.wrong == []


RANK = RankStatus(0, "ready", 41, "host", "cpu", 0, [], 1, 2, 0.1, 3, 4, 0)


def pool_status(**changes: Any) -> PoolStatus:
    """Of two ranks, the second changed."""
    second = msgspec.structs.replace(RANK, rank=1, pid=42)
    ranks = [RANK, msgspec.structs.replace(second, **changes)]
    return PoolStatus("p", "ready", 2, 7, 1.0, ranks, [])


@pytest.mark.parametrize("changes", [{"pid": 1}, {"incarnation": 1}, {"phase": "lost"}])
def test_a_lost_rank_is_found_out(changes: dict[str, Any]) -> None:
    outcome = Outcome()
    soak.check_processes(pool_status(), pool_status(), outcome)
    assert outcome.wrong == []
    soak.check_processes(pool_status(), pool_status(**changes), outcome)
    assert "rank 1" in outcome.wrong[0]


def test_switches_are_counted_by_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the ranks did since then, but for the steps to a stop and the rests."""
    monkeypatch.setattr(soak, "pool_directory", lambda _: tmp_path)

    def engine(action: str, **phases: float) -> EngineReport:
        by_rank = {0: phases, 1: phases}
        return EngineReport("m", action, 1, [0, 1], 1.0, phases, {}, {}, by_rank)

    def switch(action: str, *engines: EngineReport, error: str = "") -> SwitchReport:
        return SwitchReport(action, 1.0, {}, list(engines), error=error)

    asleep = engine("sleep", stop=5.0, free_weights=0.5)
    journal = Journal(tmp_path)
    for at, report in (
        (1.0, switch("wake_up", engine("wake_up", resume=9.0))),
        (11.0, switch("wake_up", asleep, engine("wake_up", resume=1.0))),
        (12.0, switch("apply", engine("unload", release=1.0))),
    ):
        journal.append(Transition(at, "p", "on demand", report))
    outcome = Outcome(seconds=10.0)
    soak.count_switches("p", 10.0, outcome)
    assert outcome.num_switches == Counter(sleep=1, wake_up=1)
    assert outcome.lost_share == pytest.approx(3.0 / 20.0)
    assert outcome.wrong == []
    journal.append(Transition(13.0, "p", "", switch("load", error="no memory")))
    soak.count_switches("p", 10.0, outcome)
    assert "no memory" in outcome.wrong[0]


def test_the_summary_says_it_all() -> None:
    outcome = Outcome(
        num_calls=3,
        by_manner=Counter(whole=2),
        refusals=Counter({"full": 1}),
        answer_s=[0.1, 0.3],
        seconds=60.0,
        rests=[REST, REST],
        num_switches=Counter(load=8),
        lost_share=0.125,
        wrong=["a wrong answer"],
    )
    text = soak.summary(outcome)
    for part in (
        "3 calls in 60 s: 2 whole, 1 refused",
        "8 load",
        "12.5%",
        "p95 0.300 s",
        "rank 1 710",
        "refused 1 times: full",
        "a wrong answer",
    ):
        assert part in text
    assert outcome.as_json()["rests"][0]["gateway_files"] == 40
