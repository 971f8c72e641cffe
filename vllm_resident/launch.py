"""Starts and ends the ranks of a pool on this machine: one torchrun and what it spawns.

In the foreground the pool dies with its starter, however that one dies; detached, it
goes on. Waits for ranks through the client; knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil  # type: ignore[import-untyped]

from vllm_resident import transport
from vllm_resident.client import Client
from vllm_resident.client.connection import ENDPOINT_VARIABLE, somebody_listens
from vllm_resident.config import CONFIG_VARIABLE, read_pool
from vllm_resident.errors import CommandRejected, PoolUnreachable, ResidentError
from vllm_resident.messages import EngineSpec, PoolStatus

POLL_INTERVAL_S = 0.2
# torchrun gives its workers 30 s after SIGTERM, then kills them.
TERMINATE_TIMEOUT_S = 40.0
# Ranks that were told to stop have answered already; what is left is to exit.
STOP_TIMEOUT_S = 15.0
_LOG_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1


class Launch:
    """A torchrun process and its ranks.

    `process` is the torchrun agent; `log` holds what it and the ranks print outside of
    the ranks' own logs; `start_up` is what pool.toml says to load when the pool is
    complete. As a context manager it leaves no process behind.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        endpoint: str,
        log: Path,
        start_up: list[EngineSpec],
    ) -> None:
        self.process = process
        self.endpoint = endpoint
        self.log = log
        self.start_up = start_up

    def wait_ready(
        self,
        client: Client,
        timeout_s: float,
        on_status: Callable[[PoolStatus], None] | None = None,
    ) -> PoolStatus:
        """Wait until every rank has reported. `on_status` sees them arrive, in the
        caller's thread.

        Raises `ResidentError` when torchrun ends first, `PoolUnreachable` after
        `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        seen = "no controller answered"
        while time.monotonic() < deadline:
            self._check_running()
            if somebody_listens(self.endpoint):
                with contextlib.suppress(PoolUnreachable):
                    status = client.status()
                    if on_status is not None:
                        on_status(status)
                    if status.phase == "ready":
                        return status
                    ready = sum(rank.phase == "ready" for rank in status.ranks)
                    seen = f"{ready} of {status.world_size} ranks are ready"
            time.sleep(POLL_INTERVAL_S)
        raise PoolUnreachable(
            f"the pool was not ready within {timeout_s:g} s ({seen}): see "
            f"{self.log.parent}, or give it longer with --timeout"
        )

    def tail(self) -> str:
        """The last lines torchrun and the ranks printed."""
        with contextlib.suppress(OSError):
            text = self.log.read_text(errors="replace")
            return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:])
        return ""

    def wait_end(self) -> None:
        """Wait for a pool that was told to stop; end what does not."""
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.terminate()

    def terminate(self) -> None:
        """Ask torchrun to end its ranks and itself; kill them all if it does not."""
        family = self._family()
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(TERMINATE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _kill(family)
        # What torchrun did not spawn itself: an embedded controller ends by itself.
        psutil.wait_procs(family, timeout=5.0)

    def kill(self) -> None:
        """End every process of the pool at once; no-op if there are none left."""
        _kill(self._family())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.terminate()
        finally:
            self.kill()

    def _family(self) -> list[psutil.Process]:
        """torchrun and all below it, the parents first."""
        try:
            agent = psutil.Process(self.process.pid)
            return [agent, *agent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _check_running(self) -> None:
        status = self.process.poll()
        if status is not None:
            raise ResidentError(
                f"torchrun ended with status {status} before the pool was ready; the "
                f"end of {self.log} (what a rank says itself is in rank-*.log beside "
                f"it):\n{self.tail()}"
            )


def launch(
    pool: str,
    num_ranks: int,
    *,
    controller: str | None = None,
    config: str | Path | None = None,
    max_restarts: int = 3,
    detach: bool = False,
) -> Launch:
    """Start `num_ranks` ranks; returns at once.

    `controller` is the endpoint of one that runs already; without it the ranks start
    their own, which is given the pool.toml `config` (default: the one that
    `VLLM_RESIDENT_CONFIG` names, if any). Raises `CommandRejected` where a pool of that
    name is up, or its pool.toml is wrong.
    """
    if num_ranks < 1:
        raise CommandRejected(f"{num_ranks} ranks: a pool has at least one")
    if config is not None and controller is not None:
        raise CommandRejected(
            f"the controller at {controller} runs already: give {config} to it (python "
            "-m vllm_resident.controller --config FILE)"
        )
    config = config or os.environ.get(CONFIG_VARIABLE)
    # Here a mistake in it is told before anything is started.
    start_up = read_pool(config).start if config and controller is None else []
    directory = transport.ensure_private(transport.pool_directory(pool))
    endpoint = controller or transport.controller_endpoint(pool)
    if controller is None and somebody_listens(endpoint):
        raise CommandRejected(
            f"a pool called {pool!r} is up already: end it with `vllm-resident "
            f"shutdown --pool {pool}`, or give this one another name (--pool NAME)"
        )
    logs = directory / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    log = logs / "torchrun.log"
    # torchrun's own, a tree of empty folders for each start; by default it leaves them
    # in the temporary folder.
    own_logs = logs / "torchrun"
    shutil.rmtree(own_logs, ignore_errors=True)
    command = torchrun_command(pool, num_ranks, max_restarts, controller, own_logs)
    # The ranks of this pool are not to join the one the caller may have named there.
    environment = {k: v for k, v in os.environ.items() if k != ENDPOINT_VARIABLE}
    if config:
        environment[CONFIG_VARIABLE] = str(Path(config).resolve())
    with log.open("wb") as output:
        process = spawn(command, output, environment, detach=detach)
    return Launch(process, endpoint, log, start_up)


def spawn(
    command: list[str],
    output: IO[bytes],
    environment: dict[str, str],
    *,
    detach: bool,
) -> subprocess.Popen[bytes]:
    """Start a process of the pool. It is sent SIGTERM when the thread that called this
    ends, by `kill -9` of its process too, unless it is to go on (`detach`)."""
    starter = os.getpid()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        # A session of its own: the terminal's Ctrl-C is for the starter, who ends the
        # pool in order.
        start_new_session=True,
        # Between fork and exec other threads' locks may be held: it takes none.
        preexec_fn=None if detach else lambda: _die_with(starter),  # noqa: PLW1509
    )


def torchrun_command(
    pool: str,
    num_ranks: int,
    max_restarts: int,
    controller: str | None,
    logs: Path,
) -> list[str]:
    """The torchrun call of a pool on one machine. Port 0: any that is free."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "--nnodes=1",
        f"--nproc-per-node={num_ranks}",
        f"--max-restarts={max_restarts}",
        # Not /dev/null: it is then read for ever by threads that a torchrun told to end
        # at a bad moment waits for (torch 2.13, elastic/multiprocessing/api.py).
        f"--log-dir={logs}",
        "-m",
        "vllm_resident.rank",
        "--pool",
        pool,
    ]
    return [*command, "--controller", controller] if controller else command


def default_num_ranks() -> int:
    """One rank per visible GPU; on a machine without, two, or one on a single core."""
    return num_gpus() or min(2, len(os.sched_getaffinity(0)))


def num_gpus() -> int:
    """NVIDIA devices this process may use, as far as can be told without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    if tool is None or visible == "":
        return 0
    try:
        listing = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    installed = sum(line.startswith("GPU ") for line in listing.splitlines())
    return min(installed, len(visible.split(","))) if visible else installed


def _die_with(starter: int) -> None:
    """In the child, before exec: SIGTERM to it when the starting thread's process ends,
    by `kill -9` too (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:  # it ended before the call above
        os._exit(1)


def _kill(family: list[psutil.Process]) -> None:
    # Parents first, so that torchrun does not restart what is killed.
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5.0)


# Loaded here, since the child may not load it between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)
