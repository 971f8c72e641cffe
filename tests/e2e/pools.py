"""Real pools for the tests: torchrun, ranks, an embedded controller, plain references.

Models run in float32, where TP=1 and TP=2 give the same tokens (in bfloat16 they differ
by rounding), eager, with a small KV cache of a fixed size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from examples.checkpoints import REPO_ROOT
from tests.members import standing_still
from vllm_resident import Client, PoolStatus
from vllm_resident.launch import launch

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "dtype": "float32",
}
ARCHITECTURES = ["llama", "qwen2", "qwen3", "opt", "mixtral"]
PROMPTS = ["hello world", "the quick brown fox", "a", "fox " * 20]
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16}
READY_TIMEOUT_S = 240.0
# All positions that the tiny models have, for requests that outlast a pause.
LONG_ARGS: dict[str, Any] = {**ENGINE_ARGS, "max_model_len": 512}


@contextmanager
def running_pool(
    name: str,
    directory: Path,
    *,
    num_ranks: int = 2,
    max_restarts: int = 0,
    config: Path | None = None,
) -> Iterator[Client]:
    """A pool of its own under `directory`; ended, by force if need be, at the end."""
    before = os.environ.get("VLLM_RESIDENT_DIR")
    os.environ["VLLM_RESIDENT_DIR"] = str(directory)
    started = launch(name, num_ranks, max_restarts=max_restarts, config=config)
    try:
        with Client(started.endpoint) as client:
            started.wait_ready(client, READY_TIMEOUT_S, lambda status: None)
            yield client
    finally:
        started.terminate()
        started.kill()
        if before is None:
            del os.environ["VLLM_RESIDENT_DIR"]
        else:
            os.environ["VLLM_RESIDENT_DIR"] = before


@contextmanager
def meanwhile(
    client: Client, name: str, *processes: int, command: Callable[[], object]
) -> Iterator[None]:
    """Give a command about the engine, on a thread, while these processes stand still;
    the block begins, and they go on, once the controller is carrying it out. It is over
    when the command is."""
    thread = threading.Thread(target=command)
    with standing_still(*processes):
        thread.start()
        wait_until(
            client,
            lambda s: {e.name: e.phase for e in s.engines}.get(name) != "ready",
            60,
            "the command",
        )
    yield
    thread.join(60)
    assert not thread.is_alive()


def pids(client: Client) -> list[int]:
    return [rank.pid for rank in client.status().ranks]


def wait_until(
    client: Client, condition: Callable[[PoolStatus], bool], timeout_s: float, what: str
) -> PoolStatus:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = client.status()
        if condition(status):
            return status
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen within {timeout_s} s: {status}")


def eventually(check: Callable[[], None], timeout_s: float = 30.0) -> None:
    """`check` holds within that time: a thread that was joined, a socket that was
    closed are counted for a moment still."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return check()
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and (
        psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    )


def run_repo_python(
    *arguments: str, timeout_s: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a repository's module or script as a user would, from its root."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
