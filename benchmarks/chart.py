"""Seconds as bars, in one SVG file for a README.

Pure: bars in, text out. The card carries its own background, so that it reads on a
light page and on a dark one. Seconds are drawn from zero while the shortest bar can
still be seen that way, else on a logarithmic axis, and the caption says which.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.rows import seconds_text

WIDTH = 820
LABELS_WIDTH = 244
VALUES_WIDTH = 76
MARGIN = 24
BAR_HEIGHT = 20
BAR_STEP = 30
# A bar this many times shorter than the longest is too short to see on a linear axis.
LINEAR_UP_TO = 40.0
_CAPTION_COLUMNS = 118

_STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial,
         sans-serif; font-size: 13px; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .group { font-weight: 600; }
  .small { font-size: 11px; fill: #59636e; }
  .tick { text-anchor: middle; }
  .grid { stroke: #d8dee4; }
  .spread { stroke: #59636e; stroke-width: 1.5; }
  .bar { fill: #9aa7b5; }
  .ours { fill: #1a7f5a; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #15191f; stroke: #3d444d; }
    text { fill: #e6edf3; }
    .small { fill: #9198a1; }
    .grid { stroke: #2f3742; }
    .spread { stroke: #b9c2cc; }
    .bar { fill: #5f6c7b; }
    .ours { fill: #2ea97c; }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One row's median with its spread; `ours` draws it in colour."""

    label: str
    median_s: float
    min_s: float
    max_s: float
    ours: bool = False


@dataclass(frozen=True)
class Group:
    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Axis:
    """Seconds to pixels right of the labels."""

    low_s: float
    high_s: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def position(self, seconds: float) -> float:
        if self.logarithmic:
            span = math.log(self.high_s / self.low_s)
            share = math.log(max(seconds, self.low_s) / self.low_s) / span
        else:
            share = (seconds - self.low_s) / (self.high_s - self.low_s)
        return share * (WIDTH - 2 * MARGIN - LABELS_WIDTH - VALUES_WIDTH)


def axis(seconds: Sequence[float]) -> Axis:
    """The axis on which all of `seconds` (above zero) show."""
    low, high = min(seconds), max(seconds)
    if high / low <= LINEAR_UP_TO:
        step = _step(high)
        ticks = tuple(step * n for n in range(math.floor(high / step) + 1))
        return Axis(0.0, high, False, ticks)
    # Half the shortest at least, or that bar would have no length.
    first = math.floor(math.log10(low / 2))
    last = math.floor(math.log10(high))
    return Axis(10.0**first, high, True, tuple(10.0**n for n in range(first, last + 1)))


def draw(title: str, groups: Sequence[Group], caption: str) -> str:
    """The whole SVG file. There is at least one bar."""
    bars = [bar for group in groups for bar in group.bars]
    scale = axis([s for bar in bars for s in (bar.min_s, bar.max_s)])
    body: list[str] = []
    top = bottom = 58
    for group in groups:
        body += _group(group, scale, bottom)
        bottom += BAR_STEP * (1 + len(group.bars)) + 8
    grid, bottom = _grid(scale, top, bottom), bottom + 22
    lines = _caption(caption, scale)
    body += [
        _text(MARGIN, bottom + 18 + 15 * number, line, "small")
        for number, line in enumerate(lines)
    ]
    height = bottom + 18 + 15 * len(lines) + 4
    frame = _element(
        "rect", x=0.5, y=0.5, width=WIDTH - 1, height=height - 1, rx=8, kind="card"
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{WIDTH}" '
        f'height="{height}" viewBox="0 0 {WIDTH} {height}">'
    )
    head = [
        opening,
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        frame,
        _text(MARGIN, 36, title, "title"),
    ]
    return "\n".join([*head, *grid, *body, "</svg>\n"])


def _group(group: Group, scale: Axis, top: int) -> list[str]:
    drawn = [_text(MARGIN, top + 20, group.title, "group")]
    for number, bar in enumerate(group.bars, 1):
        drawn += _bar(bar, scale, top + number * BAR_STEP)
    return drawn


def _bar(bar: Bar, scale: Axis, top: int) -> list[str]:
    left = MARGIN + LABELS_WIDTH
    middle = top + BAR_HEIGHT / 2
    low, end, high = map(scale.position, (bar.min_s, bar.median_s, bar.max_s))
    kind = "bar ours" if bar.ours else "bar"
    length = max(end, 2.0)
    return [
        _text(MARGIN + 10, top + 15, bar.label),
        _element(
            "rect", x=left, y=top, width=length, height=BAR_HEIGHT, rx=2, kind=kind
        ),
        _line(left + low, left + high, middle, middle, "spread"),
        _text(
            left + max(high, length) + 8, top + 15, f"{seconds_text(bar.median_s)} s"
        ),
    ]


def _grid(scale: Axis, top: int, bottom: int) -> list[str]:
    drawn = []
    for tick in scale.ticks:
        x = MARGIN + LABELS_WIDTH + scale.position(tick)
        drawn.append(_line(x, x, top, bottom, "grid"))
        drawn.append(_text(x, bottom + 15, f"{tick:g}", "small tick"))
    return drawn


def _caption(caption: str, scale: Axis) -> list[str]:
    kind = "logarithmic axis: each line is ten times the one before"
    says = kind if scale.logarithmic else "axis from zero"
    first = f"Seconds, medians; the thin line is the spread; {says}."
    return [first, *textwrap.wrap(caption, _CAPTION_COLUMNS)]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return _element("text", text, kind, x=x, y=y)


def _line(x1: float, x2: float, y1: float, y2: float, kind: str) -> str:
    return _element("line", "", kind, x1=x1, x2=x2, y1=y1, y2=y2)


def _element(tag: str, text: str = "", kind: str = "", **numbers: float) -> str:
    """One element; `kind` is its class in the style sheet above."""
    parts = [f'{name}="{value:.1f}"' for name, value in numbers.items()]
    if kind:
        parts.append(f'class="{kind}"')
    attributes = " ".join(parts)
    if not text:
        return f"<{tag} {attributes}/>"
    return f"<{tag} {attributes}>{escape(text)}</{tag}>"


def _step(high: float) -> float:
    """A round distance that makes two to five ticks."""
    power = 10.0 ** math.floor(math.log10(high))
    return next(power * part for part in (0.2, 0.5, 1, 2) if high / (power * part) <= 5)
