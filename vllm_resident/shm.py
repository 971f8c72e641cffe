"""Names and sweeps the shared-memory segments of pools on this machine.

A killed run leaves its segments in /dev/shm, and the next one to ask for the same name
dies. So every segment's file name carries its owner: the pid of the launcher (the
torchrun agent, which outlives its ranks' restarts) and that process's start time. A pid
alone is reused by the kernel; the pair is not. Pure standard library.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

SHM_DIRECTORY = Path("/dev/shm")

_TOKEN = re.compile(r"vr(\d+)x(\d+)-")
# In /proc/<pid>/stat the command, in parentheses, may hold spaces and parentheses of
# its own; after its last ")" come fields 3, 4, ... of proc(5).
_FIRST_FIELD_AFTER_COMMAND = 3
_START_TIME_FIELD = 22


def owner_token(pid: int) -> str:
    """`vr<pid>x<start ticks>-`: what the names of the pool's segments contain.

    `pid` is the launcher's. Raises `ProcessLookupError` if no such process runs.
    """
    ticks = start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(f"no process {pid}")
    return f"vr{pid}x{ticks}-"


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none.

    A zombie counts as gone: it holds nothing and will never use a segment again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return int(fields[_START_TIME_FIELD - _FIRST_FIELD_AFTER_COMMAND])


def segments(token: str | None = None) -> list[Path]:
    """This user's segments of the pool that owns `token`, or of every pool; sorted."""
    return [
        path
        for path in _own_files()
        if _TOKEN.search(path.name) and (token is None or token in path.name)
    ]


def stale_segments() -> list[Path]:
    """Segments whose launcher is gone; sorted.

    Containers that share /dev/shm but not their process numbers cannot see each
    other's launchers: sweep only where the pools that use this /dev/shm are visible.
    """
    alive: dict[str, bool] = {}
    stale = []
    for path in segments():
        match = _TOKEN.search(path.name)
        assert match is not None
        token = match.group()
        if token not in alive:
            alive[token] = start_ticks(int(match[1])) == int(match[2])
        if not alive[token]:
            stale.append(path)
    return stale


def remove(paths: Iterable[Path]) -> list[Path]:
    """Unlink `paths`; returns those this call removed. One already gone is no error."""
    removed = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed


def _own_files() -> list[Path]:
    try:
        entries = sorted(SHM_DIRECTORY.iterdir())
    except FileNotFoundError:
        return []
    return [path for path in entries if _is_ours(path)]


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
