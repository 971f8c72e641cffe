"""Declared faults: make a rank fail at a phase, so that tests see what happens then.

`VLLM_RESIDENT_FAULTS` is a JSON list such as
`[{"rank": 1, "phase": "load_model", "engine": "boom", "action": "raise"}]`; `rank`,
`phase` and `engine` left out match any. Actions: "raise" (an exception), "hang" (sleep
until ended), "die" (SIGKILL to itself). With `nth` it happens at the nth match alone,
counted from 1, otherwise at every one. Without the variable this does nothing.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Annotated, Literal

import msgspec


class Fault(msgspec.Struct, forbid_unknown_fields=True, dict=True):
    """What is declared, and how often it has matched so far."""

    rank: int | None = None
    phase: str | None = None
    engine: str | None = None
    action: Literal["raise", "hang", "die"] = "raise"
    nth: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        self.num_matches = 0

    def matches(self, rank: int, phase: str, engine: str) -> bool:
        return (
            self.rank in (None, rank)
            and self.phase in (None, phase)
            and self.engine in (None, engine)
        )


class InjectedFault(RuntimeError):
    """Raised where a declared fault says so; never raised otherwise."""


def declared() -> list[Fault]:
    """The faults the environment declares; `msgspec.ValidationError` if malformed."""
    text = os.environ.get("VLLM_RESIDENT_FAULTS", "")
    return msgspec.json.decode(text, type=list[Fault]) if text else []


def trip(faults: list[Fault], rank: int, phase: str, engine: str) -> None:
    """Carry out the first fault that matches and whose turn it is."""
    for fault in faults:
        if not fault.matches(rank, phase, engine):
            continue
        fault.num_matches += 1
        if fault.nth not in (None, fault.num_matches):
            continue
        if fault.action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault.action == "hang":
            time.sleep(1)
        raise InjectedFault(f"declared fault in phase {phase} of {engine}, rank {rank}")
