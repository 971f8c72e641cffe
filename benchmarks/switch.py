"""What changing the model costs: a restart, one process, this project; side by side.

    python -m benchmarks.switch [--model MEASURED OTHER] [--layout M,O@tp2 ...]

Everything that is compared is up at the same time on the same cores and takes turns,
so that the machine's mood falls on all of it; while one works the others only wait.
Every number is seconds on this process's own clock, from asking for the switch to
holding the model's first token.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import chart, machine, pairs
from benchmarks.contenders import (
    ENGINE_ARGS,
    Cold,
    Compiled,
    Contender,
    FirstSeen,
    InProcess,
    MemoryCopy,
    Pool,
    Resident,
)
from benchmarks.pairs import Pair
from benchmarks.rows import (
    OTHER,
    Heading,
    Row,
    Sample,
    as_json,
    disagreement,
    ratio,
    rows,
    seconds_text,
)
from benchmarks.sleepers import Sleepers
from examples.checkpoints import NAMES, REPO_ROOT
from vllm_resident import ResidentError

CONTENDERS = (
    "cold", "in_process", "resident", "memory_copy", "sleepers", "first_seen",
)  # fmt: skip
# In which they take their turns, and stand in the tables.
ORDER: tuple[type[Contender], ...] = (
    Cold, InProcess, Resident, Sleepers, MemoryCopy, FirstSeen,
)  # fmt: skip
DEFAULT_MODELS = ["smollm2", "llama"]
DEFAULT_LAYOUTS = ["llama,qwen2@tp2"]
# Architectures the default pairs leave unseen.
UNSEEN = ("qwen2", "qwen3", "opt", "mixtral")
NUM_COMPILED = 3
CHECKPOINTS_TIMEOUT_S = 600.0
# Phases shorter than this make a table long and tell nothing.
WORTH_SHOWING_S = 0.001

EPILOG = """\
rows (their names in --json; those of a --layout end in _tp2 and the like)
  cold            a new torchrun of plain vLLM with external_launcher: from spawning it
                  to its first token
  in_process      plain vLLM in one process: give the LLM there is back, build the
                  other, first token (one rank only)
  resident        this project, through its client: unload, load, generate
  memory_copy     copying the measured model's weights in memory: nothing that loads
                  them can be faster
  *_first         of the two, the one time its processes had not loaded the model before
  *_tiny          the same switch the other way round, to the other model
  wake_level_1    this project, to an engine that sleeps with its weights in memory,
                  from one that goes to sleep; first_token is the token by itself
  wake_level_2    the same, to one whose weights were dropped
  staged          to one that is loaded while the other serves; staged_unavailable is
                  the time of it in which neither could
  first_seen      resident, to an architecture the pool has never seen (and vLLM's
                  cache on disk neither); seen_again is the same switch once more
  resident_compiled_first, resident_compiled
                  with --compile: torch.compile on, the first load and later ones;
                  and the rows of sleepers, *_compiled

"x" is how many times its counterpart's median a row takes: resident's of the same
model and layout, or seen_again's, or resident_compiled's.

examples
  python -m benchmarks.switch                       everything, about 15 minutes
  python -m benchmarks.switch --runs 3 --layout     one rank only
  python -m benchmarks.switch --skip cold --model my/checkpoint llama
  python -m benchmarks.switch --json switch.json --svg switch.svg
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.switch",
        description="Measure what it takes to change the model: as a restart, in one "
        "process,\nand with vllm-resident, taking turns on the same cores.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", nargs="+", default=DEFAULT_MODELS, metavar="MODEL",
        help="the model measured and, second, the one it takes turns with (default: "
        f"{' '.join(DEFAULT_MODELS)}), on one rank: a checkpoint of "
        f"examples.checkpoints ({', '.join(NAMES)}), a folder or a hub's name",
    )  # fmt: skip
    parser.add_argument(
        "--layout", nargs="*", default=DEFAULT_LAYOUTS, metavar="PAIR",
        help="further pairs, each with its layout: MEASURED,OTHER[@tp2|@pp2|@tp2pp2] "
        f"(default: {' '.join(DEFAULT_LAYOUTS)}; none if nothing follows)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=_positive, default=5, metavar="N",
        help="turns of each (default: 5)",
    )  # fmt: skip
    parser.add_argument(
        "--skip", type=_contenders, default=[], metavar="ROW,...",
        help=f"leave out rows, of {', '.join(CONTENDERS)}, on every layout",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help="also measure loads with torch.compile (several minutes more)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=_writable, metavar="FILE",
        help="write the rows with machine and versions",
    )  # fmt: skip
    parser.add_argument(
        "--svg", type=_writable, metavar="FILE", help="draw the chart for a README"
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.pairs = chosen_pairs(arguments.model, arguments.layout)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _contenders(text: str) -> list[str]:
    names = [name for name in re.split(r"[,\s]+", text) if name]
    for name in names:
        if name not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise argparse.ArgumentTypeError(f"no row {name!r} to skip: {known}")
    return names


def _writable(text: str) -> Path:
    """Found out before the work, not after it."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def chosen_pairs(models: list[str], layouts: list[str]) -> list[Pair]:
    """The pair of --model, then those of --layout. ValueError where one is wrong."""
    if len(models) > 2:
        raise ValueError("--model takes the measured model and one other; more pairs "
                         "go to --layout")  # fmt: skip
    if len(models) == 1:
        models = [models[0], next(m for m in DEFAULT_MODELS[::-1] if m != models[0])]
    return pairs.name_apart(pairs.pair(",".join(models)), map(pairs.pair, layouts))


class Measurement:
    """Headings and samples as they come, said on standard error."""

    def __init__(self) -> None:
        self.headings: list[Heading] = []
        self.samples: list[Sample] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._began
        print(f"[{elapsed_s:4.0f} s] {text}", file=sys.stderr, flush=True)

    def take_turns(self, contenders: Sequence[Contender], num_rounds: int) -> None:
        """Each contender once a round, in turn."""
        for contender in contenders:
            self.headings += contender.headings
        for number in range(num_rounds):
            for contender in contenders:
                for sample in contender.turn():
                    seconds = seconds_text(sample.seconds)
                    turn = f"round {number + 1} of {num_rounds}"
                    self.say(f"{turn}: {sample.row} {seconds} s")
                    self.samples.append(sample)

    def rows(self) -> list[Row]:
        return rows(self.headings, self.samples)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All that was asked for; minutes. Leaves nothing running."""
    measurement = Measurement()
    if warning := machine.busy():
        measurement.say(f"WARNING: {warning}")
    make_checkpoints(arguments, measurement)
    first = arguments.pairs[0]
    for pair in arguments.pairs:
        unseen = _unseen(arguments.pairs) if pair is first else []
        measure_pair(pair, unseen, arguments, measurement)
    if arguments.compile:
        measure_compiled(first, arguments, measurement)
    return measurement.rows()


def measure_pair(
    pair: Pair,
    unseen: list[str],
    arguments: argparse.Namespace,
    measurement: Measurement,
) -> None:
    before = len(measurement.samples)
    with ExitStack() as stack:
        contenders = []
        for contender in _contenders_of(pair, unseen, arguments.skip, stack):
            name = contender.headings[0].name
            measurement.say(f"{pair.title}: starting {name}, warming up")
            contenders.append(stack.enter_context(contender))
        contenders.sort(key=lambda contender: ORDER.index(type(contender)))
        measurement.take_turns(contenders, arguments.runs)
    if found := disagreement(measurement.samples[before:]):
        raise SystemExit(f"not the same work everywhere: {found}")


def _contenders_of(
    pair: Pair, unseen: list[str], skip: list[str], stack: ExitStack
) -> Iterator[Contender]:
    """Each is entered by the caller before the next one is made."""
    in_process = "in_process" not in skip and pair.num_ranks == 1
    if in_process:
        yield InProcess(pair)
    if "cold" not in skip:
        yield Cold(pair, rehearse=not in_process)
    if (
        "memory_copy" not in skip
        and pair.num_ranks == 1
        and pair.measured.weights_bytes
    ):
        yield MemoryCopy(pair)
    if "sleepers" not in skip:
        name = f"sleepers-{pair.num_ranks}{pair.suffix}"
        yield Sleepers(pair, stack.enter_context(Pool(pair.num_ranks, name)))
    unseen = [] if "first_seen" in skip else unseen
    if "resident" in skip and not unseen:
        return
    pool = stack.enter_context(Pool(pair.num_ranks, f"{pair.num_ranks}{pair.suffix}"))
    yield Resident(pair, pool)
    if unseen:
        yield FirstSeen(pair, pool, [pairs.model(name) for name in unseen])


def measure_compiled(
    pair: Pair, arguments: argparse.Namespace, measurement: Measurement
) -> None:
    measurement.say(f"{pair.title}: compiled; the first load takes minutes")
    num_rounds = max(2, min(arguments.runs, NUM_COMPILED))
    with Pool(pair.num_ranks, "compiled") as pool:
        with Compiled(pair, pool) as compiled:
            measurement.take_turns([compiled], num_rounds)
        pool.client.apply([])
        with Sleepers(pair, pool, eager=False) as sleepers:
            measurement.take_turns([sleepers], num_rounds)


def _unseen(chosen: list[Pair]) -> list[str]:
    """Architectures the first pair does not bring into its pool."""
    seen = {chosen[0].measured.name, chosen[0].other.name}
    return [name for name in UNSEEN if name not in seen]


def make_checkpoints(arguments: argparse.Namespace, measurement: Measurement) -> None:
    """In a process of its own: this one stays without torch."""
    used = {m.name for pair in arguments.pairs for m in (pair.measured, pair.other)}
    if "first_seen" not in arguments.skip:
        used |= set(_unseen(arguments.pairs))
    names = [name for name in NAMES if name in used]
    if not names:
        return
    measurement.say(f"checkpoints: {', '.join(names)}")
    done = subprocess.run(
        [sys.executable, "-m", "examples.checkpoints", *names],
        cwd=REPO_ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHECKPOINTS_TIMEOUT_S,
    )
    if done.returncode != 0:
        raise SystemExit(f"no checkpoints:\n{done.stderr[-2000:]}")


# ------------------------------------------------------------------ what comes of it


def print_tables(measured: list[Row], console: Console) -> None:
    table = Table("row", "what", box=SIMPLE_HEAD)
    for title in ("median", "min", "max", "runs", "x"):
        table.add_column(title, justify="right")
    for row in measured:
        times = ratio(row, measured)
        table.add_row(
            row.name,
            row.heading.label,
            seconds_text(row.median_s),
            seconds_text(min(row.seconds)),
            seconds_text(max(row.seconds)),
            str(len(row.seconds)),
            "" if times is None else f"{times:.2f}",
        )
    console.print(table)
    for row in measured:
        if row.phases:
            console.print(phases_line(row), highlight=False, soft_wrap=True)


def phases_line(row: Row) -> str:
    """What a row's median time went into, and how much of it that explains."""
    shown = [
        f"{name} {seconds:.3f}"
        for name, seconds in row.phases.items()
        if seconds >= WORTH_SHOWING_S or name == OTHER
    ]
    share = "" if row.accounted is None else f" ({row.accounted:.1%} accounted for)"
    return f"{row.name}: {', '.join(shown)}{share}"


def groups(measured: list[Row]) -> list[chart.Group]:
    """The rows the chart shows, by model and layout."""
    titles = dict.fromkeys(row.heading.group for row in measured if row.heading.group)
    return [
        chart.Group(
            title, [_bar(row) for row in measured if row.heading.group == title]
        )
        for title in titles
    ]


def _bar(row: Row) -> chart.Bar:
    ours = not row.name.startswith(("cold", "in_process", "memory_copy"))
    times = row.median_s, min(row.seconds), max(row.seconds)
    return chart.Bar(row.heading.label, *times, ours=ours)


def report(arguments: argparse.Namespace, measured: list[Row]) -> None:
    """To standard output, and to the files asked for."""
    hardware, versions = machine.hardware(), machine.versions()
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    print_tables(measured, console)
    about = machine.describe(hardware, versions)
    console.print(about, highlight=False, soft_wrap=True)
    if arguments.json:
        document: dict[str, Any] = {
            "hardware": hardware,
            "versions": versions,
            "engine_args": ENGINE_ARGS,
            "rows": [as_json(row, measured) for row in measured],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.svg and (shown := groups(measured)):
        title = "Changing the model: from asking for it to its first token"
        arguments.svg.write_text(chart.draw(title, shown, about))


def main() -> int:
    # Whoever asks this process to end gets what it started ended first. Python leaves
    # SIGINT ignored where a script's shell started it in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    arguments = parse_arguments()
    try:
        measured = measure(arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    except ResidentError as error:
        print(f"the pool failed: {error}", file=sys.stderr)
        return 1
    report(arguments, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
