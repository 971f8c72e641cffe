"""The timeline: Chrome's trace events, a track for each rank, slices that never cross.

The format is that of the Chromium project's "Trace Event Format": complete events have
`ph` "X", `ts` and `dur` in microseconds, `pid` and `tid`; metadata events name tracks.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vllm_resident import EngineReport, SwitchReport
from vllm_resident.cli import main
from vllm_resident.cli.trace import trace
from vllm_resident.journal import Journal, Transition


def engine(
    name: str, action: str, ranks: list[int], began_s: float, **phases: float
) -> EngineReport:
    return EngineReport(
        name, action, 7, ranks, sum(phases.values()), dict(phases), {0: 10}, {0: 20},
        rank_phases={rank: dict(phases) for rank in ranks}, began_s=began_s,
        moved_bytes=5, sleep_level=int(action == "sleep"),
    )  # fmt: skip


def switch(began: float, seconds: float = 1.0, *engines: EngineReport) -> Transition:
    report = SwitchReport(
        "switch", seconds, {}, list(engines), kept=["third"], path=["drain", "sleep"],
        unavailable_s=0.5, error="rank 1: no",
    )  # fmt: skip
    return Transition(began, "default", "switch by client 7", report)


ONE = switch(
    1000.0,
    1.0,
    engine("chat", "sleep", [0, 1], 0.1, stop=0.1, offload=0.2),
    engine("tiny", "wake_up", [0], 0.4, wait=0.1, transfer=0.25, kv_cache=0.05),
)


def slices(document: dict[str, Any], track: str) -> list[dict[str, Any]]:
    names = {
        e["tid"]: e["args"]["name"]
        for e in document["traceEvents"]
        if e["name"] == "thread_name"
    }
    return [
        e
        for e in document["traceEvents"]
        if e["ph"] == "X" and names[e["tid"]] == track
    ]


def assert_well_formed(document: dict[str, Any]) -> None:
    json.dumps(document)
    assert document["displayTimeUnit"] in ("ms", "ns")
    named = set()
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in document["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["name"]
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in (
                "process_name", "thread_name", "thread_sort_index",
            )  # fmt: skip
            named.add((event["pid"], event["tid"]))
            continue
        assert isinstance(event["ts"], int)
        assert isinstance(event["dur"], int)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        place = (event["pid"], event["tid"])
        lanes.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(lanes) <= named
    for lane in lanes.values():
        for (_, ended), (began, _) in pairwise(sorted(lane)):
            assert began >= ended, "slices cross"


def test_a_switch_is_a_slice_of_the_controller_with_all_that_matters() -> None:
    document = trace([ONE])
    assert_well_formed(document)
    (event,) = slices(document, "controller")
    assert event["name"] == "switch chat, tiny"
    assert (event["ts"], event["dur"]) == (0, 1_000_000)
    assert event["args"] == {
        "cause": "switch by client 7",
        "path": "drain > sleep",
        "error": "rank 1: no",
        "generation": "7, 7",
        "kept": "third",
        "unavailable_s": 0.5,
    }


def test_phases_are_slices_of_their_ranks_where_they_began() -> None:
    document = trace([ONE])
    rank = slices(document, "rank 0")
    assert [(e["name"], e["ts"], e["dur"]) for e in rank] == [
        ("chat: stop", 100_000, 100_000),
        ("chat: offload", 200_000, 200_000),
        ("tiny: transfer", 500_000, 250_000),
        ("tiny: kv_cache", 750_000, 50_000),
    ]
    assert [e["name"] for e in slices(document, "rank 1")] == [
        "chat: stop",
        "chat: offload",
    ]
    assert rank[0]["cat"] == "sleep"
    assert rank[0]["args"] == {
        "engine": "chat", "action": "sleep", "generation": 7, "sleep_level": 1,
        "moved_bytes": 5, "memory_before_bytes": 10, "memory_after_bytes": 20,
    }  # fmt: skip


def test_the_pool_and_its_tracks_are_named_in_order() -> None:
    events = trace([ONE])["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["controller", "rank 0", "rank 1"]
    (process,) = (e for e in events if e["name"] == "process_name")
    assert process["args"]["name"] == "pool default"


def test_what_goes_on_at_once_does_not_cross() -> None:
    """Two switches side by side, and two engines of one switch on one rank."""
    both = switch(
        1000.5,
        1.0,
        engine("a", "load", [0], 0.0, build=0.3),
        engine("b", "load", [0], 0.1, build=0.3),
    )
    document = trace([ONE, both, switch(1002.0)])
    assert_well_formed(document)
    assert len(slices(document, "controller")) == 3
    assert len({e["tid"] for e in slices(document, "controller")}) == 2
    assert len(slices(document, "rank 0")) == 6


def test_phases_that_follow_each_other_touch_whatever_their_seconds() -> None:
    phases = {f"phase_{n}": 1 / (3 + n) / 1000 for n in range(50)}
    document = trace(
        [switch(1e9 + 1 / 3, 1.0, engine("a", "load", [3], 1 / 7, **phases))]
    )
    assert_well_formed(document)
    lane = slices(document, "rank 3")
    assert len({e["tid"] for e in lane}) == 1
    for before, after in pairwise(lane):
        assert before["ts"] + before["dur"] == after["ts"]


def test_a_ranks_own_phases_begin_after_those_all_have() -> None:
    load = EngineReport(
        "a", "load", 1, [0], 1.0,
        {"prepare": 0.2, "wait": 0.3, "build": 0.4, "coordinate": 0.1}, {}, {},
        rank_phases={0: {"build": 0.4}},
    )  # fmt: skip
    events = slices(trace([switch(5.0, 1.0, load)]), "rank 0")
    assert [(e["name"], e["ts"], e["dur"]) for e in events] == [
        ("a: prepare", 0, 200_000),
        ("a: build", 500_000, 400_000),
    ]


def test_a_report_without_phases_of_each_rank_shows_the_slowest_ones() -> None:
    old = EngineReport("a", "load", 1, [0, 1], 1.0, {"build": 1.0}, {}, {})
    document = trace([switch(5.0, 1.0, old)])
    assert [e["name"] for e in slices(document, "rank 1")] == ["a: build"]


# ------------------------------------------------------------------ the command


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_RESIDENT_DIR", str(tmp_path))
    folder = tmp_path / "default"
    folder.mkdir()
    return folder


def switches_of(document: dict[str, Any]) -> int:
    return len(slices(document, "controller"))


def test_the_command_writes_the_span_that_was_asked(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Journal(pool)
    for age_s in (10_000, 500, 5):
        log.append(switch(time.time() - age_s))
    spans = {
        "": 3,
        "--last 2": 2,
        "--since 10m": 2,
        "--since 2h": 2,
        "--since 1d": 3,
        "--since 2000-01-01": 3,
        "--since 1s": 0,
    }
    for words, number in spans.items():
        assert main(["trace", *words.split()]) == 0
        document = json.loads(capsys.readouterr().out)
        assert_well_formed(document)
        assert switches_of(document) == number, words
    file = tmp_path / "out.json"
    assert main(["trace", "--last", "1", "-o", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"file": str(file), "num_transitions": 1}
    assert switches_of(json.loads(file.read_text())) == 1
    assert main(["trace", "-o", str(file)]) == 0
    assert "ui.perfetto.dev" in capsys.readouterr().out


def test_a_pool_without_a_log_is_rejected_with_its_place(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace"]) == 2
    assert "transitions.jsonl" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_rejected(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Journal(pool).append(ONE)
    assert main(["trace", "-o", str(tmp_path / "no" / "such")]) == 2
    assert "No such file" in capsys.readouterr().err
