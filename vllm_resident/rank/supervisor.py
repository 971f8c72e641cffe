"""The process torchrun sees: starts its rank, and starts it anew when it dies.

torchrun answers the death of one worker by ending them all. This one stays: the rank
that died comes back in place, alone, while engines of other ranks go on serving. It
holds no device and imports neither torch nor vLLM; it knows its child by exit status,
and by pool.json whether there is still a pool to start it for.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_resident import shm

# Set for the rank: whose pool it is, and how often it was started before.
LAUNCHER_VARIABLE = "VLLM_RESIDENT_LAUNCHER_PID"
INCARNATION_VARIABLE = "VLLM_RESIDENT_INCARNATION"
# A rank that dies more often than this has something that a new start does not mend:
# the launcher decides then.
MAX_RESTARTS = 3
WINDOW_S = 600.0
POLL_S = 1.0
# Ended in order; wrong usage, which would be wrong again.
_FINAL = (0, 2)
_PR_SET_PDEATHSIG = 1


def launcher_pid() -> int:
    """Of the process that launched the pool's ranks on this machine."""
    return int(os.environ.get(LAUNCHER_VARIABLE) or os.getppid())


def incarnation() -> int:
    """How often this rank was started before, or more; never the same twice."""
    return int(os.environ.get(INCARNATION_VARIABLE) or _launcher_restarts())


class LaunchedPool:
    """The pool of this process's launcher, by the `pool.json` at `path`: its controller
    writes that, and takes it away only when the pool is stopped in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._launcher = os.getppid()
        self._controller: int | None = None

    def has_stopped(self) -> bool:
        """Whether it was seen to be up and was shut down since. False where its
        controller died otherwise: ranks bring up another, and join it."""
        try:
            state = json.loads(self._path.read_text())
            if state["owner_pid"] == self._launcher:
                self._controller = int(state["pid"])
                return False
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            return False
        pid = self._controller
        # That the file is gone is not enough: anybody may have removed it.
        return pid is not None and shm.start_ticks(pid) is None


def supervise(
    command: Sequence[str], say: Callable[[str], None], has_stopped: Callable[[], bool]
) -> int:
    """Run `command`, the rank, until it has ended in order; returns the exit status.

    Blocks. Call it on the main thread of a process that has no other. SIGTERM is the
    rank's to answer. Gives up, with the rank's status, when it dies for the fourth time
    within ten minutes, when the launcher is gone, or when the ranks' store died with
    it; the rank ends with this process, however that one ends. A rank that is not there
    to be told when the pool is shut down ends too, in order, once it `has_stopped`.
    """
    # Ctrl-C reaches the whole foreground group; the launcher decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = os.getppid()
    is_ending = False
    child: subprocess.Popen[bytes] | None = None

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        if child is not None:
            child.terminate()

    signal.signal(signal.SIGTERM, end)
    number = _launcher_restarts() * (MAX_RESTARTS + 1)
    deaths: deque[float] = deque()
    while True:
        began = time.monotonic()
        child = _start(command, launcher, number)
        if is_ending:  # told so while it was being started
            child.terminate()
        status = _wait(child, launcher, has_stopped)
        if has_stopped():
            return 0
        now = time.monotonic()
        deaths.append(now)
        while deaths[0] < now - WINDOW_S:
            deaths.popleft()
        if is_ending or not _may_come_back(status, launcher, len(deaths)):
            return status if status >= 0 else 128 - status
        number += 1
        say(
            f"rank {os.environ.get('RANK', '?')} {describe(status)} after "
            f"{now - began:.0f} s: it is started anew ({len(deaths)} of {MAX_RESTARTS} "
            f"times within {WINDOW_S / 60:g} minutes)"
        )


def describe(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def _start(
    command: Sequence[str], launcher: int, number: int
) -> subprocess.Popen[bytes]:
    environment: Mapping[str, str] = {
        **os.environ,
        LAUNCHER_VARIABLE: str(launcher),
        INCARNATION_VARIABLE: str(number),
    }
    parent = os.getpid()
    # No thread of this process may hold a lock between fork and exec: it has but one.
    return subprocess.Popen(
        command,
        env=environment,
        preexec_fn=lambda: _die_with(parent),  # noqa: PLW1509
    )


def _die_with(parent: int) -> None:
    """In the child: nobody would end a rank whose supervisor was killed (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(
    child: subprocess.Popen[bytes], launcher: int, has_stopped: Callable[[], bool]
) -> int:
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if os.getppid() != launcher or has_stopped():
                child.terminate()


def _may_come_back(status: int, launcher: int, num_deaths: int) -> bool:
    """The store is torchrun's agent's, else rank 0's own, and lost with it."""
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    has_store = agent_hosts or os.environ.get("RANK") != "0"
    return (
        status not in _FINAL
        and num_deaths <= MAX_RESTARTS
        and os.getppid() == launcher
        and has_store
    )


def _launcher_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


# Loaded here, since the child may not load it between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)


def rank_command() -> list[str]:
    """This very program, with its arguments, as the rank itself."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else "vllm_resident.rank"
    return [sys.executable, "-m", module, "--no-supervisor", *sys.argv[1:]]
