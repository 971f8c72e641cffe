"""What the machine gives: cores, memory, shared memory, the pool's folder, ports."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from vllm_resident import shm, transport
from vllm_resident.client.connection import somebody_listens
from vllm_resident.doctor.check import Check
from vllm_resident.errors import CommandRejected

# A rank with torch and vLLM imported and a small model loaded, with room to switch.
_RANK_BYTES = 3 * 2**30
_MIN_SHM_BYTES = 2**30
_DEFAULT_MASTER_PORT = 29500
_AFFINITY_VARIABLES = (
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "OMP_PLACES",
    "OMP_PROC_BIND",
)


def check_machine(pool: str, num_ranks: int) -> list[Check]:
    """Every check of what a pool called `pool` of `num_ranks` ranks would need."""
    return [
        _cores(num_ranks),
        *_thread_variables(num_ranks),
        _shared_memory_size(),
        _stale_segments(),
        *_pool_directory(pool),
        _memory(num_ranks),
        _master_port(),
    ]


def _cores(num_ranks: int) -> Check:
    cores = sorted(os.sched_getaffinity(0))
    found = f"{len(cores)} of {os.cpu_count()} usable ({_ranges(cores)})"
    if len(cores) >= num_ranks:
        return Check("cores", "ok", f"{found} for {num_ranks} ranks")
    return Check(
        "cores",
        "warn",
        f"{found} for {num_ranks} ranks: ranks that share a core wait for each other",
        f"start at most {len(cores)} CPU ranks, or give the process more cores "
        "(taskset, cpuset); GPU ranks may share",
    )


def _thread_variables(num_ranks: int) -> Iterator[Check]:
    share = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads.isdecimal() and 1 <= int(threads) <= share):
        found = "not set" if threads is None else threads
        yield Check("OMP_NUM_THREADS", "ok", f"{found}; each rank sets its own")
    else:
        yield Check(
            "OMP_NUM_THREADS",
            "warn",
            f"{threads}, where a rank has {share} cores; ranks on CPU set their own, "
            "other programs of this shell do not",
            "unset OMP_NUM_THREADS",
        )
    for name in _AFFINITY_VARIABLES:
        if value := os.environ.get(name):
            yield Check(
                name,
                "warn",
                f"{value!r} may bind every rank's threads to the same cores",
                f"unset {name}",
            )


def _shared_memory_size() -> Check:
    name = str(shm.SHM_DIRECTORY)
    try:
        usage = shutil.disk_usage(shm.SHM_DIRECTORY)
    except FileNotFoundError:
        return Check(name, "fail", "is not there", "mount a tmpfs at /dev/shm")
    found = f"{_gib(usage.free)} of {_gib(usage.total)} GiB free"
    if usage.free >= _MIN_SHM_BYTES:
        return Check(name, "ok", found)
    return Check(
        name,
        "warn",
        f"{found}; ranks of one engine talk through it",
        "in a container: --shm-size=4g (docker) or an emptyDir of medium Memory "
        "(Kubernetes); else remove what fills it",
    )


def _stale_segments() -> Check:
    stale = shm.stale_segments()
    living = len(shm.segments()) - len(stale)
    if not stale:
        return Check("shared memory", "ok", f"{living} segments, none stale")
    names = ", ".join(path.name for path in stale[:3])
    return Check(
        "shared memory",
        "warn",
        f"{len(stale)} segments of pools that are gone, such as {names}",
        "vllm-resident doctor --fix",
    )


def _pool_directory(pool: str) -> Iterator[Check]:
    try:
        directory = transport.pool_directory(pool)
        endpoint = transport.controller_endpoint(pool)
    except CommandRejected as error:
        yield Check("pool folder", "fail", error.message, "see the message")
        return
    yield _privacy(directory)
    if somebody_listens(endpoint):
        yield Check("pool", "ok", f"{pool!r} is up at {endpoint}")
    else:
        yield _left_over(pool, directory)


def _privacy(directory: Path) -> Check:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if existing != directory:
        if os.access(existing, os.W_OK | os.X_OK):
            return Check("pool folder", "ok", f"{directory}, made when needed")
        return Check(
            "pool folder",
            "fail",
            f"{directory} cannot be made: no right to write to {existing}",
            "set VLLM_RESIDENT_DIR to a folder of yours",
        )
    status = directory.stat()
    if status.st_uid != os.getuid():
        return Check(
            "pool folder",
            "fail",
            f"{directory} belongs to user {status.st_uid}",
            "set VLLM_RESIDENT_DIR to a folder of yours",
        )
    if status.st_mode & 0o077:
        return Check(
            "pool folder",
            "fail",
            f"{directory} is open to others: who reaches the socket commands the pool",
            f"chmod 700 {directory}",
        )
    return Check("pool folder", "ok", f"{directory}, private")


def _left_over(pool: str, directory: Path) -> Check:
    """What a dead pool left is harmless; a living process without a socket is not."""
    try:
        state = json.loads((directory / "pool.json").read_text())
        pid = int(state["pid"])
    except FileNotFoundError:
        return Check("pool", "ok", f"{pool!r} is not up")
    except (OSError, ValueError, KeyError, TypeError):
        return Check(
            "pool",
            "warn",
            f"{directory / 'pool.json'} cannot be read",
            f"rm {directory / 'pool.json'}",
        )
    if shm.start_ticks(pid) is None:
        return Check(
            "pool", "ok", f"{pool!r} is not up; the next start replaces what it left"
        )
    return Check(
        "pool",
        "warn",
        f"{directory / 'pool.json'} names process {pid}, which runs, but nobody "
        "listens at the pool's socket",
        f"if {pid} is a controller of vllm-resident, kill {pid}",
    )


def _memory(num_ranks: int) -> Check:
    available = min(psutil.virtual_memory().available, _cgroup_free_bytes())
    found = f"{_gib(available)} GiB available for {num_ranks} ranks"
    if available >= num_ranks * _RANK_BYTES:
        return Check("memory", "ok", found)
    return Check(
        "memory",
        "warn",
        f"{found}; reckon with {_gib(_RANK_BYTES)} GiB each, and the weights",
        "start fewer ranks, or free memory",
    )


def _cgroup_free_bytes() -> float:
    """What the container may still take; without limit, infinity."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        current = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else float(int(limit) - current)


def _master_port() -> Check:
    port = int(os.environ.get("MASTER_PORT", _DEFAULT_MASTER_PORT))
    with socket.socket() as probe:
        probe.settimeout(1.0)
        in_use = probe.connect_ex(("127.0.0.1", port)) == 0
    found = f"{port} is {'in use' if in_use else 'free'}"
    if in_use:
        found += "; `vllm-resident up` takes any free one, plain torchrun would not"
    return Check("master port", "ok", found)


def _ranges(numbers: list[int]) -> str:
    """0-3,6 for [0, 1, 2, 3, 6]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f}"
