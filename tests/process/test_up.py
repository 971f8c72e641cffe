"""`up` and the commands after it, each a process, over a whole pool.

The controller is real; torchrun and its ranks are stood for by fake_torch/.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_resident import Client, CommandRejected
from vllm_resident.client.connection import somebody_listens

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).parents[2]
FAKE_TORCH = Path(__file__).parent / "fake_torch"
COMMAND = [sys.executable, "-m", "vllm_resident.cli"]


class Shell:
    """Runs commands in an environment of their own; remembers what it started."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{FAKE_TORCH}{os.pathsep}{REPOSITORY}",
            "VLLM_RESIDENT_DIR": folder,
        }
        self.endpoint = f"ipc://{folder}/default/controller.sock"
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=40,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *words],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def up(self, *words: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A pool in the foreground that is ready, and what it said."""
        process = self.start("up", "--nproc-per-node", "2", "--json", *words)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    def pool_processes(self) -> list[psutil.Process]:
        def belongs(process: psutil.Process) -> bool:
            try:
                own = process.environ().get("VLLM_RESIDENT_DIR") == str(self.folder)
                return own and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                return False

        return [process for process in psutil.process_iter() if belongs(process)]


@pytest.fixture
def shell() -> Iterator[Shell]:
    with tempfile.TemporaryDirectory(prefix="vr-up-") as folder:
        shell = Shell(folder)
        yield shell
        for process in shell.pool_processes():
            process.kill()
        for started in shell.started:
            started.communicate()


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_detached_pool_from_start_to_end(shell: Shell, tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text('[engines.a]\nmodel = "m"\nranks = [1]\ndtype = "float32"\n')
    done = shell.run(
        "up", "--detach", "--nproc-per-node", "2", "--layout", str(layout), "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["status"]["phase"] == "ready"
    assert [e["name"] for e in document["status"]["engines"]] == ["a"]
    assert document["layout"]["engines"][0]["ranks"] == [1]

    assert (
        shell.run("load", "b", "m", "--ranks", "0", "--dtype=float32").returncode == 0
    )
    status = json.loads(shell.run("status", "--json").stdout)
    assert {e["name"]: e["ranks"] for e in status["engines"]} == {"a": [1], "b": [0]}
    text = shell.run("generate", "b", "one two", "--max-tokens", "2")
    assert (text.returncode, text.stdout) == (0, "one two\n")
    streamed = shell.run("generate", "b", "one two", "--stream", "--json")
    pieces = [json.loads(line) for line in streamed.stdout.splitlines()]
    assert [piece["text"] for piece in pieces] == ["one", "two"]
    rejected = shell.run("load", "b", "m", "--json")
    assert rejected.returncode == 2
    assert json.loads(rejected.stdout)["error"]["kind"] == "CommandRejected"
    applied = shell.run("apply", str(layout), "--json")
    assert json.loads(applied.stdout)["kept"] == ["a"]

    again = shell.run("up", "--detach", "--nproc-per-node", "2")
    assert again.returncode == 2
    assert "up already" in again.stderr

    assert shell.run("shutdown").returncode == 0
    assert shell.run("status").returncode == 3
    wait_until(lambda: not shell.pool_processes())


def test_ctrl_c_shuts_a_foreground_pool_down(shell: Shell) -> None:
    process, _ = shell.up()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "the pool has stopped" in err
    wait_until(lambda: not shell.pool_processes())


def test_sigterm_does_too_and_is_no_failure(shell: Shell) -> None:
    process, _ = shell.up()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
    wait_until(lambda: not shell.pool_processes())


def test_a_foreground_pool_ends_with_its_command(shell: Shell) -> None:
    process, _ = shell.up()
    process.kill()
    wait_until(lambda: not shell.pool_processes())


def test_a_foreground_pool_may_be_shut_down_from_elsewhere(shell: Shell) -> None:
    process, _ = shell.up()
    assert shell.run("shutdown").returncode == 0
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err


def test_torchrun_that_dies_later_is_told_with_its_log(shell: Shell) -> None:
    process, document = shell.up()
    os.kill(document["torchrun_pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "torchrun ended with status -9" in err
    assert f"fake torchrun {document['torchrun_pid']}" in err
    wait_until(lambda: not shell.pool_processes())


def test_torchrun_that_fails_to_start_is_told_with_its_log(shell: Shell) -> None:
    done = shell.run("up", "--nproc-per-node", "2", FAKE_TORCHRUN="crash")
    assert done.returncode == 1
    assert "RuntimeError: no such device" in done.stderr
    assert "Traceback" in done.stderr  # torchrun's, from its log; none of ours:
    assert "cli/" not in done.stderr


def test_a_pool_that_is_not_ready_in_time_leaves_nothing_behind(shell: Shell) -> None:
    done = shell.run(
        "up", "--nproc-per-node", "2", "--timeout", "1", FAKE_TORCHRUN="hang"
    )
    assert done.returncode == 3
    assert re.search(r"not ready within 1 s", done.stderr)
    assert not shell.pool_processes()


def test_ctrl_c_on_the_way_up_leaves_nothing_behind(shell: Shell) -> None:
    process = shell.start("up", "--nproc-per-node", "2", FAKE_TORCHRUN="hang")
    wait_until(lambda: len(shell.pool_processes()) >= 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    wait_until(lambda: not shell.pool_processes())


def test_a_layout_that_cannot_be_applied_leaves_nothing_behind(
    shell: Shell, tmp_path: Path
) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text('[engines.a]\nmodel = "m"\nranks = [7]\n')
    done = shell.run(
        "up", "--detach", "--nproc-per-node", "2", "--layout", str(layout), "--json"
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["kind"] == "CommandRejected"
    wait_until(lambda: not shell.pool_processes())


def test_a_wrong_pool_file_starts_nothing(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text('[models.a]\nmodel = "m"\npined = true\n')
    done = shell.run("up", "--config", str(file))
    assert done.returncode == 2
    assert f"{file}:3: model 'a': unknown key 'pined'" in done.stderr
    assert not (shell.folder / "default" / "logs" / "torchrun.log").exists()
    there = shell.run("up", "--config", str(file), "--controller", "tcp://127.0.0.1:1")
    assert there.returncode == 2
    assert "runs already" in there.stderr


def test_sleepers_by_command_from_start_to_trace(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(
        '[models.a]\nmodel = "m"\nranks = [0]\nstart = "loaded"\n'
        '[models.b]\nmodel = "m"\nranks = [0]\nstart = "asleep"\n'
        '[models.c]\nmodel = "m"\nranks = [1]\n'
    )
    _, document = shell.up("--config", str(file))
    phases = {e["name"]: e["phase"] for e in document["status"]["engines"]}
    assert phases == {"a": "ready", "b": "asleep"}

    def levels() -> dict[str, int]:
        status = json.loads(shell.run("status", "--json").stdout)
        steady = [e for e in status["engines"] if e["phase"] in ("ready", "asleep")]
        return {e["name"]: e["sleep_level"] for e in steady}

    def done(words: str) -> str:
        finished = shell.run(*words.split())
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    assert levels() == {"a": 0, "b": 1}
    assert "b woken" in done("switch a b")
    assert levels() == {"a": 1, "b": 0}
    assert "c loaded" in done("load c")
    assert "put to sleep (level 2)" in done("sleep a --level 2")
    done("wake-up a")
    assert levels() == {"a": 0, "b": 1, "c": 0}
    ledger = done("status --ledger")
    assert "asleep (level 1)" in ledger
    assert "host memory" in ledger
    out = tmp_path / "trace.json"
    assert "ui.perfetto.dev" in done(f"trace --since 1h -o {out}")
    names = [e["name"] for e in json.loads(out.read_text())["traceEvents"]]
    assert "wake_up b, a" in names or "wake_up a, b" in names
    assert sum(name.startswith("switch") for name in names) == 1


def test_a_wrong_layout_file_starts_nothing(shell: Shell, tmp_path: Path) -> None:
    done = shell.run("up", "--layout", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert not (shell.folder / "default").exists()


def test_watch_prints_a_line_a_second_and_ends_with_the_pool(shell: Shell) -> None:
    process, _ = shell.up()
    watching = shell.start("status", "--watch", "--json")
    assert watching.stdout is not None
    for _ in range(2):
        assert json.loads(watching.stdout.readline())["phase"] == "ready"
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=10)
    assert watching.returncode == 0
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)


# ---------------------------------------------- the client and a real controller


def test_a_client_and_a_real_controller(shell: Shell) -> None:
    shell.up()
    with Client(shell.endpoint) as client:
        assert client.wait_ready(10).world_size == 2
        phases: list[str] = []
        report = client.load(
            "a",
            "m",
            ranks=2,
            dtype="float32",
            on_progress=lambda p: phases.append(p.phase),
        )
        assert sorted(report.engines[0].ranks) == [0, 1]
        assert phases
        texts = [c.text for c in client.generate("a", ["x", "y"], temperature=0)]
        assert texts == ["x", "y"]
        assert [c.text for c in client.stream("a", "one two three")] == [
            "one",
            "two",
            "three",
        ]
        with pytest.raises(CommandRejected, match="engine argument"):
            client.load("b", "m", dtypo="x")
        client.unload("a")
        assert client.status().engines == []


def test_leaving_a_stream_ends_the_request_in_the_pool(shell: Shell) -> None:
    shell.up()
    with Client(shell.endpoint) as client:
        client.load("a", "m")
        pieces = client.stream("a", "forever")
        assert next(pieces).text == "forever"
        assert client.status().engines[0].num_requests == 1
        pieces.close()
        wait_until(lambda: client.status().engines[0].num_requests == 0)


def test_a_client_that_vanishes_has_its_requests_aborted(shell: Shell) -> None:
    shell.up()
    with Client(shell.endpoint) as client:
        client.load("a", "m")
        other = shell.start("generate", "a", "forever", "--stream")
        wait_until(lambda: client.status().engines[0].num_requests == 1)
        other.kill()
        wait_until(lambda: client.status().engines[0].num_requests == 0)


def test_ctrl_c_in_a_stream_aborts_it_and_exits_with_130(shell: Shell) -> None:
    shell.up()
    with Client(shell.endpoint) as client:
        client.load("a", "m")
        other = shell.start("generate", "a", "forever", "--stream")
        wait_until(lambda: client.status().engines[0].num_requests == 1)
        other.send_signal(signal.SIGINT)
        other.communicate(timeout=10)
        assert other.returncode == 130
        wait_until(lambda: client.status().engines[0].num_requests == 0)


def test_shutdown_waits_until_nobody_listens(shell: Shell) -> None:
    shell.up()
    assert somebody_listens(shell.endpoint)
    shell.run("shutdown")
    assert not somebody_listens(shell.endpoint)
