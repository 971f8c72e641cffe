"""Plain vLLM as a benchmark's driver sees it: processes to start, ask and end.

`PlainLauncher` is one torchrun of `benchmarks.plain_launcher`, `PlainProcess` one
process of `benchmarks.plain_process`, `PlainServer` vLLM's own OpenAI server. All run
the installed vLLM without a patch and without a pool, die with the driver however that
ends, and answer within a deadline or end the benchmark with the last lines of their
log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from benchmarks.plain_launcher import remove_leftovers
from examples.checkpoints import REPO_ROOT

TURN_TIMEOUT_S = 300.0
END_TIMEOUT_S = 40.0
_POLL_S = 0.005
_LOG_CHARACTERS = 3000
_PR_SET_PDEATHSIG = 1


class PlainLauncher:
    """Plain `external_launcher` under torchrun, waiting for its turns.

    `request` is what `benchmarks.plain_launcher` reads; `folder` is empty and stays
    the caller's.
    """

    def __init__(self, request: dict[str, Any], num_ranks: int, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "log"
        self._turn = 0
        remove_leftovers()
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *(f"--nproc-per-node={num_ranks}", "-m", "benchmarks.plain_launcher"),
            json.dumps({**request, "folder": str(folder)}),
        ]
        with self._log.open("wb") as log:
            self.process = _start(command, stdout=log, stderr=log)

    def turn(self) -> tuple[float, list[list[int]]]:
        """Seconds and tokens of one batch."""
        (self._folder / f"go-{self._turn}").touch()
        done = self._folder / f"done-{self._turn}"
        self._turn += 1
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while not done.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"plain vLLM did not answer:\n{_tail(self._log)}")
            time.sleep(_POLL_S)
        result = json.loads(done.read_text())
        return result["seconds"], result["tokens"]

    def close(self) -> None:
        """End it and all it started; no-op if it has ended."""
        _end(self.process)
        remove_leftovers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainProcess:
    """One process that holds one `LLM` at a time and replaces it when told to."""

    def __init__(self, request: dict[str, Any], folder: Path) -> None:
        self._log = folder / "in-process.log"
        command = [sys.executable, "-m", "benchmarks.plain_process"]
        with self._log.open("wb") as log:
            self.process = _start(
                [*command, json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )

    def switch(self, model: str) -> dict[str, Any]:
        """Release what is there, load `model`, generate: its phases and tokens."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(model.encode() + b"\n")
            if select.select([self.process.stdout], [], [], TURN_TIMEOUT_S)[0]:
                line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"plain vLLM did not answer:\n{_tail(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it; no-op if it has ended."""
        _end(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainServer:
    """vLLM's own OpenAI server, its engine behind vLLM's multiprocessing backend.

    `bind` is vLLM's VLLM_CPU_OMP_THREADS_BIND: which cores its workers compute on.
    `url` is what OpenAI clients call the base; `model` is served as `name`.
    """

    def __init__(
        self,
        name: str,
        model: str,
        engine_args: dict[str, Any],
        *,
        bind: str,
        folder: Path,
    ) -> None:
        self._log = folder / "server.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", model, "--served-model-name", name),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--distributed-executor-backend", "mp"),
            "--disable-uvicorn-access-log",
            *flags(engine_args),
        ]
        environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": bind}
        with self._log.open("wb") as log:
            self.process = _start(command, stdout=log, stderr=log, env=environment)

    def wait_ready(self, timeout_s: float) -> None:
        """Until it answers, or the benchmark ends with the end of its log."""
        deadline = time.monotonic() + timeout_s
        health = self.url.removesuffix("/v1") + "/health"
        while self.process.poll() is None and time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(health, timeout=5.0),
            ):
                return
            time.sleep(0.2)
        raise SystemExit(f"vLLM's server did not start:\n{_tail(self._log)}")

    def close(self) -> None:
        """End it and all it started; no-op if it has ended."""
        _end(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def flags(engine_args: dict[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line takes them."""
    found = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", str(value)]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(command: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    """Start it in a session of its own (the terminal's Ctrl-C is for the driver, who
    ends it in order) and let it end with the driver, by `kill -9` too."""
    driver = os.getpid()

    def die_with_driver() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != driver:
            os._exit(1)

    streams.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(
        command,
        cwd=REPO_ROOT,
        start_new_session=True,
        # Runs between fork and exec, where it may take no lock: it takes none.
        preexec_fn=die_with_driver,  # noqa: PLW1509
        **streams,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then kill what is left of it and of what it started."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    try:
        process.terminate()
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()
        process.wait(5.0)


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace")[-_LOG_CHARACTERS:]
    return ""


# Loaded here, since the child may not load it between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)
