"""What is counted over the controller's whole life: switches, their phases, steps,
divergences, losses.

Data and plain arithmetic, for whoever measures the pool from outside; nothing here
decides anything. Knows reports and counts, neither engines nor switches. What is kept
is bounded, whatever names come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vllm_resident.messages import (
    EngineReport,
    ModelPhaseTotal,
    MoveTotal,
    PhaseTotal,
    PoolTotals,
    RankTotal,
    StepCount,
    StepTotal,
    SwitchReport,
    SwitchTotal,
)

# A wake-up takes milliseconds, a load over a slow disk minutes.
BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
# So many models are kept apart by their names.
MAX_MODELS = 200
OTHER = "(other)"


@dataclass
class Sum:
    """How often something was, and what it took together."""

    num_times: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, num_times: int = 1) -> None:
        self.num_times += num_times
        self.seconds += seconds


@dataclass
class SwitchSum(Sum):
    unavailable_s: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * len(BOUNDS_S))


@dataclass
class Tally:
    """Keys are the labels, as in the structs of `PoolTotals`."""

    switches: dict[tuple[str, str, str], SwitchSum] = field(default_factory=dict)
    phases: dict[tuple[str, str, str, str], Sum] = field(default_factory=dict)
    # Not by rank and phase at once: of 64 models over 8 ranks that is 20,000 rows.
    model_phases: dict[tuple[str, str, str], Sum] = field(default_factory=dict)
    moves: dict[tuple[str, int, str], Sum] = field(default_factory=dict)
    steps: dict[tuple[str, int], Sum] = field(default_factory=dict)
    divergences: Counter[tuple[str, int]] = field(default_factory=Counter)
    losses: Counter[int] = field(default_factory=Counter)
    restarts: Counter[int] = field(default_factory=Counter)
    # What each rank's present process said last.
    last_steps: dict[int, Mapping[str, StepCount]] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)

    def model(self, name: str) -> str:
        """The name it is counted under."""
        if name not in self.models and len(self.models) >= MAX_MODELS:
            return OTHER
        self.models.add(name)
        return name


def note_switch(tally: Tally, report: SwitchReport) -> None:
    path = ">".join(report.path)
    total = tally.switches.setdefault(
        (report.action, path, _result(report)), SwitchSum()
    )
    total.add(report.seconds)
    total.unavailable_s += report.unavailable_s
    for index, bound_s in enumerate(BOUNDS_S):
        total.buckets[index] += report.seconds <= bound_s
    for engine in report.engines:
        _note_move(tally, report.action, path, engine)


def _note_move(tally: Tally, action: str, path: str, engine: EngineReport) -> None:
    model, move = tally.model(engine.name), engine.action
    for phase, seconds in engine.phases.items():
        tally.phases.setdefault((action, path, move, phase), Sum()).add(seconds)
        tally.model_phases.setdefault((model, move, phase), Sum()).add(seconds)
    for rank, phases in engine.rank_phases.items():
        total = tally.moves.setdefault((model, rank, move), Sum())
        total.add(sum(phases.values()))


def _result(report: SwitchReport) -> str:
    if not report.error:
        return "done"
    return "went_back" if "go_back" in report.path else "refused"


def note_process(tally: Tally, rank: int, *, is_first: bool) -> None:
    """A new process is the rank from now on."""
    tally.last_steps.pop(rank, None)
    tally.restarts[rank] += not is_first


def note_steps(tally: Tally, rank: int, steps: Mapping[str, StepCount]) -> None:
    """Add what came since the rank's last word. A count that is lower than before was
    begun anew."""
    last = tally.last_steps.get(rank, {})
    tally.last_steps[rank] = steps
    for name, count in steps.items():
        before = last.get(name, StepCount())
        if count.num_steps < before.num_steps or count.seconds < before.seconds:
            before = StepCount()
        num_steps = count.num_steps - before.num_steps
        seconds = count.seconds - before.seconds
        total = tally.steps.setdefault((tally.model(name), rank), Sum())
        total.add(seconds, num_steps)


def note_divergence(tally: Tally, model: str, rank: int) -> None:
    tally.divergences[tally.model(model), rank] += 1


def note_loss(tally: Tally, rank: int) -> None:
    tally.losses[rank] += 1


def totals(tally: Tally) -> PoolTotals:
    return PoolTotals(
        bounds_s=list(BOUNDS_S),
        switches=[
            SwitchTotal(
                *key, total.num_times, total.seconds, total.unavailable_s,
                list(total.buckets),
            )
            for key, total in tally.switches.items()
        ],
        phases=[
            PhaseTotal(*key, total.num_times, total.seconds)
            for key, total in tally.phases.items()
        ],
        model_phases=[
            ModelPhaseTotal(*key, total.num_times, total.seconds)
            for key, total in tally.model_phases.items()
        ],
        moves=[
            MoveTotal(*key, total.num_times, total.seconds)
            for key, total in tally.moves.items()
        ],
        steps=[_step_total(tally, *key) for key in _keys(tally)],
        ranks=[
            RankTotal(rank, tally.losses[rank], tally.restarts[rank])
            for rank in sorted({*tally.losses, *tally.restarts})
        ],
    )  # fmt: skip


def _keys(tally: Tally) -> Iterable[tuple[str, int]]:
    return sorted({*tally.steps, *tally.divergences})


def _step_total(tally: Tally, model: str, rank: int) -> StepTotal:
    total = tally.steps.get((model, rank), Sum())
    num_divergences = tally.divergences[model, rank]
    return StepTotal(model, rank, total.num_times, total.seconds, num_divergences)
