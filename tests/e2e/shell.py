"""Commands as a user types them, from the repository, in a folder of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from examples.checkpoints import REPO_ROOT
from vllm_resident import shm

# Where the console commands of this environment are, activated or not.
BIN = Path(sys.executable).parent
# Where the examples' own files look for checkpoints.
MODELS = REPO_ROOT / "build" / "models"


@dataclass
class Running:
    """A command that was started; what it writes goes to a file."""

    process: subprocess.Popen[bytes]
    path: Path

    def output(self) -> str:
        """Both streams, as far as it has come."""
        return self.path.read_text()

    def wait_for_output(self, text: str, timeout_s: float = 120.0) -> None:
        wait_until(
            lambda: text in self.output() or self.process.poll() is not None,
            timeout_s,
            lambda: f"no {text!r} in {self.output()!r}",
        )
        assert text in self.output()

    def wait(self, timeout_s: float) -> int:
        """Its exit status."""
        return self.process.wait(timeout_s)


class Shell:
    """Runs commands whose pools keep to `folder`, and knows their processes by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "VLLM_RESIDENT_DIR": str(folder),
        }
        self.environment.pop("VLLM_RESIDENT_CONTROLLER", None)
        self._numbers = itertools.count()

    def run(
        self, *command: str, timeout_s: float = 200.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=REPO_ROOT,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    @contextmanager
    def started(self, *command: str, **variables: str) -> Iterator[Running]:
        """A command in a process group of its own; killed with the block."""
        path = self.folder / f"output-{next(self._numbers)}"
        with path.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=REPO_ROOT,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Running(process, path)
        finally:
            process.kill()
            process.wait()

    def processes(self) -> list[psutil.Process]:
        """Living processes that were started from here, at any remove."""

        def belongs(process: psutil.Process) -> bool:
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                own = environment.get("VLLM_RESIDENT_DIR") == str(self.folder)
                return own and process.status() != psutil.STATUS_ZOMBIE
            return False

        return [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid() and belongs(process)
        ]

    def wait_until_empty(self, timeout_s: float = 60.0) -> None:
        """Until no process is left."""
        wait_until(
            lambda: not self.processes(), timeout_s, lambda: str(self.processes())
        )

    def sockets(self) -> list[str]:
        """Names of the unix sockets in the pools' folders."""
        return sorted(p.name for p in self.folder.rglob("*") if p.is_socket())

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def shell() -> Iterator[Shell]:
    """A short folder: the paths of unix sockets hold 107 bytes."""
    with tempfile.TemporaryDirectory(
        prefix="vr-sh-", ignore_cleanup_errors=True
    ) as folder:
        its = Shell(Path(folder))
        try:
            yield its
        finally:
            its.end()


def make_models() -> dict[str, str]:
    """The examples' checkpoints, made if missing: folders seen from the repository."""
    names = ("smollm2", "qwen3", "llama")
    command = (sys.executable, "-m", "examples.checkpoints", *names)
    with shell() as its:
        made = its.run(*command, "--out", str(MODELS))
    assert made.returncode == 0, made.stderr
    return {name: str((MODELS / name).relative_to(REPO_ROOT)) for name in names}


def segments_of(launcher: int) -> list[str]:
    """Shared-memory segments of the pool whose torchrun has, or had, this pid."""
    return [path.name for path in shm.segments() if f"vr{launcher}x" in path.name]


def wait_until(
    condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what()}"
        time.sleep(0.1)
