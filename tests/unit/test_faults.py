"""Declared faults trip exactly where they say."""

import signal
import time

import msgspec
import pytest

from vllm_resident.rank import faults
from vllm_resident.rank.faults import Fault, InjectedFault


def test_nothing_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_RESIDENT_FAULTS", raising=False)
    assert faults.declared() == []
    faults.trip([], 0, "prepare", "engine")


def test_declared_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[{"rank": 1, "phase": "prepare", "action": "hang"}, {"engine": "boom"}]'
    monkeypatch.setenv("VLLM_RESIDENT_FAULTS", text)
    assert faults.declared() == [
        Fault(rank=1, phase="prepare", action="hang"),
        Fault(engine="boom"),
    ]


@pytest.mark.parametrize(
    "text", ['[{"when": 1}]', '[{"action": "explode"}]', '[{"nth": 0}]', "{}"]
)
def test_a_malformed_declaration_is_an_error(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("VLLM_RESIDENT_FAULTS", text)
    with pytest.raises(msgspec.ValidationError):
        faults.declared()


@pytest.mark.parametrize(
    ("fault", "trips"),
    [
        (Fault(), True),
        (Fault(rank=1, phase="build", engine="boom"), True),
        (Fault(rank=0), False),
        (Fault(phase="prepare"), False),
        (Fault(engine="other"), False),
    ],
)
def test_what_is_left_out_matches_any(fault: Fault, trips: bool) -> None:
    if not trips:
        faults.trip([fault], 1, "build", "boom")
        return
    with pytest.raises(InjectedFault, match="phase build of boom, rank 1"):
        faults.trip([fault], 1, "build", "boom")


def test_the_nth_match_alone() -> None:
    declared = [Fault(phase="stop", nth=2)]
    faults.trip(declared, 0, "stop", "first")
    faults.trip(declared, 0, "resume", "first")
    with pytest.raises(InjectedFault, match="phase stop of second"):
        faults.trip(declared, 0, "stop", "second")
    faults.trip(declared, 0, "stop", "third")


def test_a_match_that_is_not_counted_leaves_the_others_theirs() -> None:
    declared = [Fault(nth=2), Fault(phase="stop")]
    with pytest.raises(InjectedFault):
        faults.trip(declared, 0, "stop", "engine")
    with pytest.raises(InjectedFault):
        faults.trip(declared, 0, "resume", "engine")


def test_die_is_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(faults.os, "kill", lambda pid, number: sent.append(number))
    with pytest.raises(InjectedFault):
        faults.trip([Fault(action="die")], 0, "build", "boom")
    assert sent == [signal.SIGKILL]


def test_hang_does_not_end_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class SleptEnoughError(Exception):
        pass

    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise SleptEnoughError

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(SleptEnoughError):
        faults.trip([Fault(action="hang")], 0, "build", "boom")
