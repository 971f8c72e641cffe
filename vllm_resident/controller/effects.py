"""What the pure part of the controller wants done; `service.py` does it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_resident.messages import SwitchReport, ToClientMessage, ToRankMessage


@dataclass(frozen=True)
class SendToRank:
    rank: int
    message: ToRankMessage


@dataclass(frozen=True)
class SendToClient:
    client: bytes
    message: ToClientMessage


@dataclass(frozen=True)
class WatchProcess:
    """Report the end of this process of the same host as `Pool.rank_ended`."""

    rank: int
    pid: int


@dataclass(frozen=True)
class PhaseChanged:
    """To be logged: `subject` is "engine" or "rank"; `seconds` were spent in `old`."""

    subject: str
    name: str
    ranks: tuple[int, ...]
    generation: int | None
    old: str
    new: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Note:
    """To be logged as a warning."""

    text: str


@dataclass(frozen=True)
class RecordTransition:
    """To be appended to the pool's log of transitions; `began` is monotonic."""

    report: SwitchReport
    cause: str
    began: float


@dataclass(frozen=True)
class StopController:
    status: int


Effect = (
    SendToRank
    | SendToClient
    | WatchProcess
    | PhaseChanged
    | Note
    | RecordTransition
    | StopController
)
