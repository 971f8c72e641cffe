"""What the controller has counted since it began: switches, moves, steps, losses.

Values that the controller makes of its tally for clients; no messages themselves.
"""

from __future__ import annotations

import msgspec


class SwitchTotal(msgspec.Struct, frozen=True):
    """Switches of one kind since the controller began. `result`: "done", "went_back",
    or "refused" (nothing was changed). `buckets` counts those that took no longer than
    each of `PoolTotals.bounds_s`."""

    action: str
    path: str
    result: str
    num_switches: int
    seconds: float
    unavailable_s: float
    buckets: list[int]


class PhaseTotal(msgspec.Struct, frozen=True):
    """One phase of one kind of move, in switches of one kind, on the slowest rank."""

    action: str
    path: str
    move: str
    phase: str
    num_times: int
    seconds: float


class ModelPhaseTotal(msgspec.Struct, frozen=True):
    """One phase of one kind of move of one model, on the slowest rank."""

    model: str
    move: str
    phase: str
    num_times: int
    seconds: float


class MoveTotal(msgspec.Struct, frozen=True):
    """One kind of move of one model on one rank: what the rank itself did."""

    model: str
    rank: int
    move: str
    num_times: int
    seconds: float


class StepTotal(msgspec.Struct, frozen=True):
    """Steps of one model on one rank, its failed ones among `num_divergences` where it
    differed from its leader."""

    model: str
    rank: int
    num_steps: int
    seconds: float
    num_divergences: int = 0


class RankTotal(msgspec.Struct, frozen=True):
    """How often a rank was lost, and a new process took its place."""

    rank: int
    num_losses: int
    num_restarts: int


class PoolTotals(msgspec.Struct, frozen=True):
    """All that was counted since the controller began. Of more models than the
    controller keeps apart, the rest is called "(other)"."""

    bounds_s: list[float] = []
    switches: list[SwitchTotal] = []
    phases: list[PhaseTotal] = []
    model_phases: list[ModelPhaseTotal] = []
    moves: list[MoveTotal] = []
    steps: list[StepTotal] = []
    ranks: list[RankTotal] = []
