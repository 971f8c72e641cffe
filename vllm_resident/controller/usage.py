"""What the controller learns of each model: how often it is called, how long its calls
take, and how long its moves took. And who waits for one.

Data and plain arithmetic: knows neither engines nor switches. `policy.py` reads it,
drawn into a `PoolView` by `demand.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from vllm_resident.controller import policy
from vllm_resident.controller.policy import Costs, Limits

# Of the seconds of calls and moves, how much the last one weighs in the average.
CALL_WEIGHT = 0.05
MOVE_WEIGHT = 0.3
# What moves take before any was made: of a few gigabytes of weights.
GUESSED_S = {"sleep": 0.2, "wake_up 1": 0.5, "wake_up 2": 2.0, "load": 10.0}
# A model that could not be brought up is left alone for so long, then twice as long and
# so on; failures that are further apart than RESET_S do not add up.
BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 60.0
RESET_S = 300.0
# As config.CallLimits has them.
DEFAULT_LIMITS = Limits(max_queue=1000, max_wait_s=120.0)


@dataclass
class Usage:
    """One model by its name, whatever engines it has had."""

    gap_s: float = math.inf
    last_call: float = -math.inf
    service_s: float = 0.0
    # By move, as in GUESSED_S; what is missing was never made.
    move_s: dict[str, float] = field(default_factory=dict)
    # Of the last failure to bring it up (or to put it to sleep).
    error: str = ""
    failed_at: float = -math.inf
    num_failures: int = 0
    retry_at: float = -math.inf
    # The last engine of it that failed by itself and was noted.
    failed_generation: int = 0


@dataclass
class Caller:
    """One open call (`AwaitEngine`): waits for its model, then counts as being with it
    until it is ended, or until the leader's own count must have it (TURN_S)."""

    client: bytes
    call: int
    engine: str
    arrived: float
    next_progress: float
    # Among the leader's own count, too.
    is_held: bool = False
    told_at: float | None = None
    generation: int = 0

    @property
    def is_waiting(self) -> bool:
        return self.told_at is None


@dataclass
class Demand:
    """All callers and all that was learned; what pool.toml says of both."""

    callers: dict[tuple[bytes, int], Caller] = field(default_factory=dict)
    usages: dict[str, Usage] = field(default_factory=dict)
    # Over all models: the guess for one that has not made the move.
    move_s: dict[str, float] = field(default_factory=dict)
    limits: dict[str, Limits] = field(default_factory=dict)
    default_limits: Limits = DEFAULT_LIMITS
    min_residency_s: float = 1.0
    drain_s: float = 30.0
    look_again_at: float = math.inf

    def usage(self, name: str) -> Usage:
        return self.usages.setdefault(name, Usage())

    def limits_of(self, name: str) -> Limits:
        return self.limits.get(name, self.default_limits)

    def waiting(self) -> dict[str, list[Caller]]:
        """Who waits, by model, the oldest first."""
        there: dict[str, list[Caller]] = {}
        for caller in self.callers.values():
            if caller.is_waiting:
                there.setdefault(caller.engine, []).append(caller)
        for callers in there.values():
            callers.sort(key=lambda caller: caller.arrived)
        return there

    def num_waiting(self) -> dict[str, int]:
        """By model, of those that somebody waits for."""
        return dict(Counter(c.engine for c in self.callers.values() if c.is_waiting))


def note_calls(usage: Usage, num_calls: int, now: float) -> None:
    """So many calls have come since the last ones."""
    usage.gap_s = policy.average_gap(usage.gap_s, usage.last_call, now, num_calls)
    usage.last_call = now


def note_service(usage: Usage, num_calls: int, seconds: float) -> None:
    """So many calls have ended that took `seconds` together."""
    mean_s = seconds / num_calls
    if not usage.service_s:
        usage.service_s = mean_s
        return
    weight = 1 - (1 - CALL_WEIGHT) ** num_calls
    usage.service_s += weight * (mean_s - usage.service_s)


def note_move(demand: Demand, name: str, move: str, seconds: float) -> None:
    """A move of the model took so long."""
    for learned in (demand.usage(name).move_s, demand.move_s):
        known_s = learned.get(move, seconds)
        learned[move] = known_s + MOVE_WEIGHT * (seconds - known_s)


def note_failure(usage: Usage, error: str, now: float) -> None:
    if now - usage.failed_at > RESET_S:
        usage.num_failures = 0
    back_off_s = min(MAX_BACK_OFF_S, BACK_OFF_S * 2**usage.num_failures)
    usage.num_failures += 1
    usage.error, usage.failed_at, usage.retry_at = error, now, now + back_off_s


def costs(demand: Demand, name: str) -> Costs:
    """What its moves are expected to take."""
    own = demand.usages[name].move_s if name in demand.usages else {}
    expected = {**GUESSED_S, **demand.move_s, **own}
    return Costs(
        sleep_s=expected["sleep"],
        wake_up_s={1: expected["wake_up 1"], 2: expected["wake_up 2"]},
        load_s=expected["load"],
    )
