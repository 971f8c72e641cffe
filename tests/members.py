"""Processes that stand for ranks: started together, as torchrun would, and waited for.

Each runs one module of the tests' with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
set; what it found out it prints as lines of `RESULT {"scenario": ..., ...}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def run(
    module: str, *arguments: str, num_ranks: int, timeout_s: float
) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs, by rank; fails where one takes longer than
    `timeout_s`. No process is left afterwards."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(num_ranks)]
        deadline = time.monotonic() + timeout_s
        members = []
        for rank, log in enumerate(logs):
            member = _start(module, arguments, log, rank, num_ranks, port)
            ends.callback(member.wait)
            ends.callback(member.kill)
            members.append(member)
        try:
            statuses = [member.wait(deadline - time.monotonic()) for member in members]
        except subprocess.TimeoutExpired:
            said = [text[-2000:] for text in _texts(logs)]
            raise AssertionError(f"not within {timeout_s:g} s: {said}") from None
        return statuses, _texts(logs)


def by_scenario(texts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What each scenario gave, by its name and in the order of `texts`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        for line in text.splitlines():
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found.setdefault(result["scenario"], []).append(result)
    return found


@contextlib.contextmanager
def standing_still(*processes: int) -> Iterator[None]:
    """Within the block these do nothing; what they are told waits for them."""
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


def free_port() -> int:
    """For a listener that is yet to be started: none of those that the kernel gives to
    whoever asks for any."""
    lowest, highest = map(int, PORT_RANGE.read_text().split())
    others = [*range(10_000, lowest), *range(highest + 1, 2**16)]
    for port in random.sample(others, len(others)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError(f"no port is free outside of {lowest} to {highest}")


def _texts(logs: list[Path]) -> list[str]:
    return [log.read_text(errors="replace") for log in logs]


def _start(
    module: str,
    arguments: tuple[str, ...],
    log: Path,
    rank: int,
    num_ranks: int,
    port: int,
) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                # vLLM's sockets.
                "VLLM_RPC_BASE_PATH": str(log.parent),
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
