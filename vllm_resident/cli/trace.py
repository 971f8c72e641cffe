"""`vllm-resident trace`: the pool's log of transitions as a timeline.

The format is Chrome's trace events (the "Trace Event Format" document of the Chromium
project), which Perfetto reads: complete slices ("X") with microseconds, a track for
each rank and one for the controller. Slices of one track must nest or follow each
other; those that would cross go to a second track of the same name.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.markup import escape

from vllm_resident import journal, transport
from vllm_resident.cli import parser
from vllm_resident.cli.output import Output
from vllm_resident.errors import CommandRejected
from vllm_resident.journal import Transition
from vllm_resident.messages import EngineReport

_PID = 1
_CONTROLLER = "controller"
# In these a rank waits for others: nothing of its own to be seen.
_WAITING = frozenset(("wait", "coordinate"))


@dataclass
class _Track:
    """What happens in one place. `lanes` are rows of slices that do not cross."""

    name: str
    lanes: list[list[dict[str, Any]]] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Put a slice on the first lane that is free by then. Slices come in the order
        of their beginnings."""
        for lane in self.lanes:
            last = lane[-1]
            if last["ts"] + last["dur"] <= event["ts"]:
                lane.append(event)
                return
        self.lanes.append([event])


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Write the timeline; returns the exit code."""
    transitions = _span(_read(arguments.pool), arguments.last, arguments.since)
    document = trace(transitions)
    text = msgspec.json.encode(document).decode()
    if arguments.output is None:
        output.line(text)
        return parser.OK
    try:
        Path(arguments.output).write_text(text + "\n")
    except OSError as error:
        raise CommandRejected(f"{arguments.output}: {error.strerror}") from error
    output.result(
        {"file": arguments.output, "num_transitions": len(transitions)},
        f"{len(transitions)} transitions in [bold]{escape(arguments.output)}[/]: open "
        "it at ui.perfetto.dev",
    )
    return parser.OK


def _read(pool: str) -> list[Transition]:
    directory = transport.pool_directory(pool)
    try:
        transitions = journal.read(directory)
    except OSError as error:
        raise CommandRejected(f"{error.filename}: {error.strerror}") from error
    if not transitions:
        raise CommandRejected(
            f"nothing to trace: {directory / journal.FILE_NAME} holds no transitions "
            "(is this the pool's machine, and --pool its name?)"
        )
    return transitions


def _span(
    transitions: list[Transition], last: int | None, since: float | None
) -> list[Transition]:
    if last is not None:
        return transitions[-last:]
    if since is not None:
        return [each for each in transitions if each.began_unix_s >= since]
    return transitions


def trace(transitions: Sequence[Transition]) -> dict[str, Any]:
    """The document: {"traceEvents": [...]}, times from the first transition on."""
    start = min((each.began_unix_s for each in transitions), default=0.0)
    controller, ranks = _Track(_CONTROLLER), dict[int, _Track]()
    slices = [
        (rank, event) for each in transitions for rank, event in _slices(each, start)
    ]
    slices.sort(key=lambda item: item[1]["ts"])
    for rank, event in slices:
        if rank is None:
            controller.add(event)
        else:
            ranks.setdefault(rank, _Track(f"rank {rank}")).add(event)
    tracks = [controller, *(ranks[rank] for rank in sorted(ranks))]
    pools = sorted({each.pool for each in transitions})
    return {
        "traceEvents": [
            _metadata("process_name", 0, name=f"pool {', '.join(pools)}"),
            *_events(tracks),
        ],
        "displayTimeUnit": "ms",
        "otherData": {"began_unix_s": start, "num_transitions": len(transitions)},
    }


def _events(tracks: list[_Track]) -> Iterator[dict[str, Any]]:
    lanes = [(track.name, lane) for track in tracks for lane in track.lanes]
    for thread, (name, lane) in enumerate(lanes, 1):
        yield _metadata("thread_name", thread, name=name)
        yield _metadata("thread_sort_index", thread, sort_index=thread)
        for event in lane:
            yield {**event, "pid": _PID, "tid": thread}


def _metadata(kind: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": thread, "args": args}


def _slices(
    transition: Transition, start: float
) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """The slices of one transition, each with its rank (None: the controller's)."""
    report = transition.report
    began_s = transition.began_unix_s - start
    names = ", ".join(dict.fromkeys(engine.name for engine in report.engines))
    yield (
        None,
        _slice(
            f"{report.action} {names}".strip(),
            report.action,
            began_s,
            began_s + report.seconds,
            cause=transition.cause,
            path=" > ".join(report.path),
            error=report.error,
            generation=", ".join(str(engine.generation) for engine in report.engines),
            kept=", ".join(report.kept),
            unavailable_s=report.unavailable_s,
        ),
    )
    for engine in report.engines:
        for rank in engine.ranks:
            for event in _rank_slices(engine, rank, began_s + engine.began_s):
                yield rank, event


def _rank_slices(
    engine: EngineReport, rank: int, began_s: float
) -> Iterator[dict[str, Any]]:
    """An engine's phases on one rank, one after the other."""
    for phase, seconds in _phases(engine, rank).items():
        ended_s = began_s + seconds
        if phase not in _WAITING:
            yield _slice(
                f"{engine.name}: {phase}",
                engine.action,
                began_s,
                ended_s,
                engine=engine.name,
                action=engine.action,
                generation=engine.generation,
                sleep_level=engine.sleep_level,
                moved_bytes=engine.moved_bytes,
                memory_before_bytes=engine.memory_before_bytes.get(rank),
                memory_after_bytes=engine.memory_after_bytes.get(rank),
            )
        began_s = ended_s


def _phases(engine: EngineReport, rank: int) -> dict[str, float]:
    """The rank's own, after what comes before them on every rank ("prepare")."""
    own = engine.rank_phases.get(rank, engine.phases)
    first = next(iter(own), None)
    before = itertools.takewhile(lambda item: item[0] != first, engine.phases.items())
    return {**dict(before), **own}


def _slice(
    name: str, category: str, began_s: float, ended_s: float, **args: Any
) -> dict[str, Any]:
    # Both ends rounded alike: what ends where another begins does so in microseconds.
    began_us, ended_us = math.floor(began_s * 1e6), math.floor(ended_s * 1e6)
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": began_us,
        "dur": max(0, ended_us - began_us),
        "args": args,
    }
