"""Samples into rows: medians, spread, ratios, and the share that phases account for.

Pure. A row is known by its name; `baseline` names the row its ratio is taken against,
`group` the part of the chart it is drawn in ("" for none).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

OTHER = "other"


@dataclass(frozen=True)
class Heading:
    """What a row is, before anything was measured."""

    name: str
    label: str
    baseline: str
    group: str = ""


@dataclass(frozen=True)
class Sample:
    """One measured turn. `tokens` is what `model` generated, to be compared."""

    row: str
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    model: str = ""
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """All samples of one name; `phases` are medians, phase by phase."""

    heading: Heading
    seconds: list[float]
    phases: dict[str, float]
    accounted: float | None

    @property
    def name(self) -> str:
        return self.heading.name

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def with_other(phases: dict[str, float], seconds: float) -> dict[str, float]:
    """The phases and what they leave of `seconds`."""
    return {**phases, OTHER: max(0.0, seconds - sum(phases.values()))}


def rows(headings: Iterable[Heading], samples: Sequence[Sample]) -> list[Row]:
    """One row for each heading that has samples, in the headings' order."""
    found = []
    for heading in headings:
        own = [sample for sample in samples if sample.row == heading.name]
        if own:
            found.append(_row(heading, own))
    return found


def _row(heading: Heading, samples: list[Sample]) -> Row:
    names = dict.fromkeys(name for sample in samples for name in sample.phases)
    phases = {
        name: statistics.median(sample.phases.get(name, 0.0) for sample in samples)
        for name in names
    }
    shares = [1 - s.phases[OTHER] / s.seconds for s in samples if OTHER in s.phases]
    return Row(
        heading,
        [sample.seconds for sample in samples],
        phases,
        statistics.median(shares) if shares else None,
    )


def ratio(row: Row, others: Iterable[Row]) -> float | None:
    """How many times its baseline's median; None where that was not measured."""
    for other in others:
        if other.name == row.heading.baseline:
            return row.median_s / other.median_s
    return None


def disagreement(samples: Iterable[Sample]) -> str:
    """The first model two rows generated different tokens with, in words; else ""."""
    first: dict[str, Sample] = {}
    for sample in samples:
        if not sample.tokens:
            continue
        seen = first.setdefault(sample.model, sample)
        if seen.tokens != sample.tokens:
            return (
                f"{sample.model} began with token {list(sample.tokens)} in "
                f"{sample.row} and with {list(seen.tokens)} in {seen.row}"
            )
    return ""


def as_json(row: Row, others: Iterable[Row]) -> dict[str, Any]:
    return {
        "name": row.name,
        "label": row.heading.label,
        "median_s": row.median_s,
        "min_s": min(row.seconds),
        "max_s": max(row.seconds),
        "runs": len(row.seconds),
        "seconds": row.seconds,
        "phases": row.phases,
        "accounted": row.accounted,
        "baseline": row.heading.baseline,
        "ratio": ratio(row, others),
    }


def seconds_text(seconds: float) -> str:
    """As many digits as a reader wants: 0.043, 2.17, 17.3."""
    digits = 3 if seconds < 0.1 else 2 if seconds < 10 else 1
    return f"{seconds:.{digits}f}"
