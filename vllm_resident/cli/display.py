"""What people see: phases as they pass, what a switch took, the pool as tables.

Progress and messages go to standard error, results to standard output.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from vllm_resident.doctor import Check
from vllm_resident.errors import RankFailure, ResidentError
from vllm_resident.messages import (
    EngineReport,
    EngineStatus,
    PoolStatus,
    Progress,
    RankStatus,
    SwitchReport,
)

_PHASE_STYLES = {
    "ready": "green",
    "lost": "red",
    "failed": "red",
    "degraded": "red",
    "expected": "dim",
}
_VERDICTS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
_GIBIBYTE = 2**30
_WORTH_SHOWING_S = 0.01


class PhaseDisplay:
    """Shows phases as they begin, with seconds; a line each where there is no terminal.

    A context manager; `phase_started` may be called from another thread.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TextColumn("[dim]{task.elapsed:.1f} s[/]"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        # What each engine does now, and when it began on the controller's clock.
        self._current: dict[str, tuple[str, TaskID]] = {}

    def on_progress(self, progress: Progress) -> None:
        """A `Progress` of the controller; one repeated only says that it lives."""
        what = progress.phase
        if progress.rank is not None:
            what += f" (rank {progress.rank})"
        self.phase_started(progress.engine, what, progress.elapsed_s)

    def phase_started(self, subject: str, what: str, elapsed_s: float) -> None:
        """`subject` does `what` now, `elapsed_s` after the command began."""
        current = self._current.get(subject)
        if current is not None and current[0] == what:
            return
        if current is not None:
            self._finish(current[1])
        text = f"{subject}: {what}" if subject else what
        if not self._console.is_terminal:
            self._console.print(f"{elapsed_s:6.1f} s  {escape(text)}", highlight=False)
        task = self._bars.add_task(escape(text), total=1)
        self._current[subject] = (what, task)

    def _finish(self, task: TaskID) -> None:
        self._bars.update(task, completed=1)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()


def describe_error(error: ResidentError) -> str:
    """One line: class, message, and which rank in which phase where it is known."""
    where = []
    if isinstance(error, RankFailure):
        if error.rank is not None:
            where.append(f"rank {error.rank}")
        if error.phase:
            where.append(f"phase {error.phase}")
    place = f" ({', '.join(where)})" if where else ""
    return f"{type(error).__name__}: {error.message}{place}"


def switch_summary(report: SwitchReport) -> RenderableType:
    """What a load, unload or apply did: a line and its phases for each engine."""
    lines = [_engine_line(engine) for engine in report.engines]
    if report.kept:
        lines.append(f"kept as they were: {escape(', '.join(report.kept))}")
    if len(report.engines) != 1:
        lines.append(f"{report.action} took {report.seconds:.2f} s")
    return "\n".join(lines)


def _engine_line(engine: EngineReport) -> str:
    did = {"load": "loaded", "unload": "unloaded"}.get(engine.action, engine.action)
    ranks = ", ".join(map(str, engine.ranks))
    phases = " · ".join(
        f"{escape(name)} {seconds:.2f}"
        for name, seconds in engine.phases.items()
        if seconds >= _WORTH_SHOWING_S
    )
    line = (
        f"[bold]{escape(engine.name)}[/] {did}: rank{'s'[: len(engine.ranks) > 1]} "
        f"{ranks}, {engine.seconds:.2f} s, generation {engine.generation}"
    )
    return f"{line}\n  [dim]{phases}[/]" if phases else line


def pool_tables(status: PoolStatus) -> RenderableType:
    """The pool, its ranks and its engines."""
    head = (
        f"pool [bold]{escape(status.pool)}[/]: {_phase(status.phase)}, "
        f"{status.world_size} ranks, up {_duration(status.uptime_s)}, "
        f"controller pid {status.controller_pid}"
    )
    if status.num_protocol_errors or status.num_stale_messages:
        head += (
            f", {status.num_protocol_errors} protocol errors, "
            f"{status.num_stale_messages} stale messages"
        )
    engines: RenderableType = "no engines: `vllm-resident load NAME MODEL`"
    if status.engines:
        engines = _engine_table(status.engines)
    return Group(head, rank_table(status.ranks), engines)


def rank_table(ranks: list[RankStatus]) -> Table:
    """One row per rank."""
    columns = ("rank", "phase", "pid", "host", "device", "memory GiB", "engines")
    table = Table(*columns, box=SIMPLE_HEAD)
    for column in ("fds", "threads", "shm", "restarts", "seen"):
        table.add_column(column, justify="right")
    for rank in ranks:
        row = [str(rank.rank), _phase(rank.phase)]
        if rank.phase == "expected":
            table.add_row(*row)
            continue
        table.add_row(
            *row,
            str(rank.pid),
            escape(rank.host),
            rank.device,
            f"{_gib(rank.memory_used_bytes)} / {_gib(rank.memory_total_bytes)}",
            escape(", ".join(rank.engines)),
            str(rank.num_file_descriptors),
            str(rank.num_threads),
            str(rank.num_shm_segments),
            str(rank.incarnation),
            f"{rank.heartbeat_age_s:.1f} s ago",
        )
    return table


def _engine_table(engines: list[EngineStatus]) -> Table:
    columns = ("engine", "phase", "ranks", "generation", "requests", "model")
    table = Table(*columns, box=SIMPLE_HEAD)
    table.add_column("engine arguments", overflow="fold")
    for engine in engines:
        phase = _phase(engine.phase)
        if engine.progress and engine.phase != "ready":
            phase += f" ({escape(engine.progress)})"
        if engine.error:
            phase += f"\n[red]{escape(engine.error)}[/]"
        table.add_row(
            escape(engine.name),
            phase,
            ", ".join(map(str, engine.ranks)),
            str(engine.generation),
            str(engine.num_requests),
            escape(engine.model),
            escape(" ".join(f"{k}={v!r}" for k, v in engine.engine_args.items())),
        )
    return table


def checks_table(checks: list[Check]) -> RenderableType:
    """What the doctor found, and how to mend what is not right."""
    table = Table("", "check", "found", box=None, pad_edge=False)
    for check in checks:
        found = escape(check.found)
        if check.remedy:
            found += f"\n[bold]mend:[/] {escape(check.remedy)}"
        table.add_row(_VERDICTS[check.verdict], escape(check.name), found)
    return table


def _phase(phase: str) -> str:
    return f"[{_PHASE_STYLES.get(phase, 'yellow')}]{escape(phase)}[/]"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIBIBYTE:.2f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
