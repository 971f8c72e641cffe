"""The pool's log of transitions: written, bounded, and no harm where it cannot be."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from vllm_resident import EngineReport, SwitchReport, journal
from vllm_resident.journal import Journal, Transition

ENGINE = EngineReport(
    "chat", "wake_up", 7, [0, 1], 0.5, {"transfer": 0.5}, {0: 1}, {0: 2},
    rank_phases={0: {"transfer": 0.4}, 1: {"transfer": 0.5}}, began_s=0.1,
    moved_bytes=9,
)  # fmt: skip


def transition(action: str = "switch", **changes: object) -> Transition:
    report = SwitchReport(action, 1.0, {}, [ENGINE], path=["wake_up"])
    fields = {"began_unix_s": 5.0, "pool": "p", "cause": "switch by x"} | changes
    return Transition(report=report, **fields)  # type: ignore[arg-type]


def test_a_line_is_the_whole_report_in_json(tmp_path: Path) -> None:
    Journal(tmp_path).append(transition())
    Journal(tmp_path).append(transition("load"))
    lines = (tmp_path / "transitions.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert [d["report"]["action"] for d in documents] == ["switch", "load"]
    assert documents[0]["began_unix_s"] == 5.0
    assert documents[0]["pool"] == "p"
    assert documents[0]["cause"] == "switch by x"
    assert documents[0]["report"]["engines"][0]["rank_phases"]["1"] == {"transfer": 0.5}
    assert journal.read(tmp_path) == [transition(), transition("load")]
    mode = stat.S_IMODE((tmp_path / "transitions.jsonl").stat().st_mode)
    assert mode == 0o600


def test_it_is_bounded_and_keeps_one_old_file(tmp_path: Path) -> None:
    written = Journal(tmp_path, max_bytes=5000)
    for number in range(100):
        written.append(transition(cause=f"number {number}"))
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["transitions.jsonl", "transitions.jsonl.1"]
    assert all(f.stat().st_size <= 5000 for f in files)
    causes = [t.cause for t in journal.read(tmp_path)]
    assert causes == [f"number {n}" for n in range(100 - len(causes), 100)]
    assert len(causes) > 10


def test_there_is_none_yet(tmp_path: Path) -> None:
    assert journal.read(tmp_path) == []


def test_a_line_that_is_none_is_left_out(tmp_path: Path) -> None:
    Journal(tmp_path).append(transition())
    with (tmp_path / journal.FILE_NAME).open("ab") as file:
        file.write(b'{"began_unix_s": 1\n\xff\n[]\n')
    Journal(tmp_path).append(transition())
    assert len(journal.read(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    written = Journal(folder)
    with caplog.at_level(logging.WARNING):
        written.append(transition())
        written.append(transition())
    assert len(caplog.records) == 1
    assert "No such file" in caplog.text
    folder.mkdir()
    written.append(transition())
    assert len(journal.read(folder)) == 1


def test_half_a_line_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = Journal(tmp_path)
    written.append(transition())
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: whole(fd, line[:20]))
    written.append(transition())
    monkeypatch.undo()
    assert "no space" in caplog.text
    written.append(transition())
    text = (tmp_path / journal.FILE_NAME).read_text()
    assert len(text.splitlines()) == len(journal.read(tmp_path)) == 2
