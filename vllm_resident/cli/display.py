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
    CheckpointPrefetched,
    EngineMemory,
    EngineReport,
    EngineStatus,
    PoolStatus,
    Progress,
    RankStatus,
    SwitchReport,
)

_PHASE_STYLES = {
    "ready": "green",
    "asleep": "cyan",
    "lost": "red",
    "failed": "red",
    "degraded": "red",
    "expected": "dim",
}
_DID = {
    "load": "loaded",
    "unload": "unloaded",
    "sleep": "put to sleep",
    "wake_up": "woken",
}
_VERDICTS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
_GIBIBYTE = 2**30
_WORTH_SHOWING_S = 0.001


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
    """What a switch did: a line and its phases for each engine, then the whole."""
    lines = [_engine_line(engine) for engine in report.engines]
    if report.kept:
        lines.append(f"kept as they were: {escape(', '.join(report.kept))}")
    if len(report.engines) != 1:
        lines.append(_whole_line(report))
    return "\n".join(lines)


def _whole_line(report: SwitchReport) -> str:
    line = f"{report.action} took {_seconds(report.seconds)} s"
    if report.path:
        line += f" ({escape(' → '.join(report.path))})"
    if report.unavailable_s:
        line += f"; neither could serve for {_seconds(report.unavailable_s)} s"
    return line


def prefetch_summary(model: str, done: CheckpointPrefetched) -> RenderableType:
    """How much of a checkpoint was read, where and how fast."""
    return (
        f"[bold]{escape(model)}[/]: {_size(done.num_bytes)} in memory on "
        f"{escape(', '.join(done.hosts))}, {_seconds(done.seconds)} s"
    )


def _engine_line(engine: EngineReport) -> str:
    did = _DID.get(engine.action, engine.action)
    if engine.action == "sleep":
        did += f" (level {engine.sleep_level})"
    ranks = ", ".join(map(str, engine.ranks))
    phases = " · ".join(
        f"{escape(name)} {_seconds(seconds)}"
        for name, seconds in engine.phases.items()
        if seconds >= _WORTH_SHOWING_S
    )
    line = (
        f"[bold]{escape(engine.name)}[/] {did}: rank{'s'[: len(engine.ranks) > 1]} "
        f"{ranks}, {_seconds(engine.seconds)} s, generation {engine.generation}"
    )
    if engine.moved_bytes:
        line += f", {_size(engine.moved_bytes)} moved{_speed(engine)}"
    return f"{line}\n  [dim]{phases}[/]" if phases else line


def _speed(engine: EngineReport) -> str:
    """At which rate, and of what the link could do; where it was timed, and known."""
    if not engine.moved_s:
        return ""
    rate = engine.moved_bytes / engine.moved_s
    of_link = ""
    if engine.link_bytes_per_s:
        of_link = f", {rate / engine.link_bytes_per_s:.0%} of the link"
    return f" at {rate / 1e9:.1f} GB/s{of_link}"


def pool_tables(status: PoolStatus) -> RenderableType:
    """The pool, its ranks and its engines."""
    engines: RenderableType = "no engines: `vllm-resident load NAME MODEL`"
    if status.engines:
        engines = _engine_table(status.engines)
    return Group(_pool_line(status), rank_table(status.ranks), engines)


def _pool_line(status: PoolStatus) -> str:
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
    if status.waiting:
        waiting = ", ".join(f"{num} for {n}" for n, num in status.waiting.items())
        head += f"\n[yellow]calls that wait[/]: {escape(waiting)}"
    return head


def ledger_tables(status: PoolStatus) -> RenderableType:
    """What everything holds: each engine on each of its ranks, each rank as a whole,
    and what is used of the budgets."""
    parts: list[RenderableType] = [_pool_line(status), _holdings_table(status.ranks)]
    if status.engines:
        parts.append(_memory_table(status.engines))
    parts.append(_budget_table(status))
    if (communicators := _communicator_table(status)) is not None:
        parts.append(communicators)
    return Group(*parts)


def _holdings_table(ranks: list[RankStatus]) -> Table:
    table = Table("rank", "phase", "memory GiB", box=SIMPLE_HEAD)
    for column in ("fds", "sockets", "threads", "shm", "groups", "engines"):
        table.add_column(column, justify="right")
    for rank in ranks:
        table.add_row(
            str(rank.rank),
            _phase(rank.phase),
            f"{_gib(rank.memory_used_bytes)} / {_gib(rank.memory_total_bytes)}",
            str(rank.num_file_descriptors),
            str(rank.num_sockets),
            str(rank.num_threads),
            str(rank.num_shm_segments),
            str(rank.num_process_groups),
            str(rank.num_engines),
        )
    return table


def _memory_table(engines: list[EngineStatus]) -> Table:
    """A row for each engine and rank; an engine's first row says what it is."""
    table = Table("engine", "phase", "idle", box=SIMPLE_HEAD)
    for column in ("rank", "device MiB", "host MiB"):
        table.add_column(column, justify="right")
    for engine in engines:
        name = escape(engine.name) + (" [dim](pinned)[/]" if engine.pinned else "")
        what = (name, _engine_phase(engine), _duration(engine.idle_s))
        for rank in engine.ranks:
            memory = engine.memory.get(rank, EngineMemory())
            table.add_row(
                *what,
                str(rank),
                _mib(memory.device_bytes),
                _mib(memory.host_bytes),
            )
            what = ("", "", "")
    return table


def _budget_table(status: PoolStatus) -> Table:
    """Device memory counts on each rank, host memory on each machine."""
    table = Table("budget", "of", box=SIMPLE_HEAD)
    table.add_column("engines have", justify="right")
    table.add_column("may have", justify="right")
    hosts: dict[str, int] = {}
    device_budget = _budget(status.device_memory_bytes)
    for rank in status.ranks:
        held = [e.memory[rank.rank] for e in status.engines if rank.rank in e.memory]
        device = sum(memory.device_bytes for memory in held)
        host = sum(memory.host_bytes for memory in held)
        hosts[rank.host] = hosts.get(rank.host, 0) + host
        table.add_row(
            "device memory", f"rank {rank.rank}", f"{_mib(device)} MiB", device_budget
        )
    for name, host in hosts.items():
        of = escape(name) or "hosts not known yet"
        table.add_row(
            "host memory", of, f"{_mib(host)} MiB", _budget(status.host_memory_bytes)
        )
    return table


def _communicator_table(status: PoolStatus) -> Table | None:
    """What ranks keep of worlds that are closed, and what sleeping engines have had
    suspended; None where there is neither, nor a limit."""
    limits = (status.max_communicators, status.max_communicator_bytes)
    held = [
        rank.num_kept_communicators or rank.num_suspended_communicators
        for rank in status.ranks
    ]
    if limits == (None, None) and not any(held):
        return None
    table = Table("communicators of", box=SIMPLE_HEAD)
    for column in ("in use", "kept", "may be", "MiB", "may be", "suspended"):
        table.add_column(column, justify="right")
    most = "" if status.max_communicators is None else str(status.max_communicators)
    limit = status.max_communicator_bytes
    most_bytes = "" if limit is None else _mib(limit)
    for rank in status.ranks:
        table.add_row(
            f"rank {rank.rank}",
            str(rank.num_process_groups),
            str(rank.num_kept_communicators),
            most or "as fits the device",
            _mib(rank.kept_communicator_bytes),
            most_bytes or "as fits the device",
            str(rank.num_suspended_communicators),
        )
    return table


def _budget(num_bytes: int | None) -> str:
    return "no limit" if num_bytes is None else f"{_mib(num_bytes)} MiB"


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
        phase = _engine_phase(engine)
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


def _engine_phase(engine: EngineStatus) -> str:
    phase = _phase(engine.phase)
    return f"{phase} (level {engine.sleep_level})" if engine.sleep_level else phase


def _phase(phase: str) -> str:
    return f"[{_PHASE_STYLES.get(phase, 'yellow')}]{escape(phase)}[/]"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIBIBYTE:.2f}"


def _size(num_bytes: int) -> str:
    if num_bytes >= _GIBIBYTE:
        return f"{_gib(num_bytes)} GiB"
    return f"{_mib(num_bytes)} MiB"


def _seconds(seconds: float) -> str:
    """With what matters: an engine falls asleep in milliseconds."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
