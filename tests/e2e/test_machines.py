"""One pool on two machines: network namespaces with nothing but a cable between them.

Each has processes, loopback and pool folder of its own; what crosses does so over TCP,
under the pool's key. (They share a kernel: the shared memory of an engine's ranks has
two names, as on two machines, and vLLM does without.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from examples.checkpoints import REPO_ROOT
from tests.e2e.pools import ENGINE_ARGS, PROMPTS, SAMPLING
from vllm_resident import keys

pytestmark = pytest.mark.timeout(400)

ADDRESSES = ("10.213.77.1", "10.213.77.2")
CONTROLLER = f"tcp://{ADDRESSES[0]}:5555"
MASTER = ("--master-addr", ADDRESSES[0], "--master-port", "29517")
HTTP = "127.0.0.1:8077"
START_S = 120.0
CALL_S = 120.0
# A machine is given up after 4 seconds of silence.
LOST_S = 60.0


def _may_make_machines() -> bool:
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "ip", "link"],
        capture_output=True,
        check=False,
        timeout=20,
    )
    return done.returncode == 0


class Machine:
    """Namespaces that live as long as their first process."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.folder = folder / f"m{number}"
        self.folder.mkdir(mode=0o700)
        self.cable = f"vr{os.getpid() % 100_000}-{number}"
        spaces = ("--net", "--pid", "--fork", "--mount-proc", "--kill-child")
        self._unshare = subprocess.Popen(["unshare", *spaces, "sleep", "3600"])
        self.processes: list[subprocess.Popen[bytes]] = []
        deadline = time.monotonic() + 10
        while not (children := psutil.Process(self._unshare.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.init = children[0].pid

    def plug_in(self) -> None:
        run("ip", "link", "set", self.cable, "netns", str(self.init))
        self.run("ip", "addr", "add", f"{ADDRESSES[self.number]}/30", "dev", self.cable)
        self.run("ip", "link", "set", self.cable, "up")
        self.run("ip", "link", "set", "lo", "up")

    def _inside(self, *command: str) -> list[str]:
        spaces = ("--net", "--pid", "--mount")
        return ["nsenter", "--target", str(self.init), *spaces, "--", *command]

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        return {
            **os.environ,
            "VLLM_RESIDENT_DIR": str(self.folder),
            # As on machines whose own name is not what others reach them by.
            "GLOO_SOCKET_IFNAME": self.cable,
            **more,
        }

    def run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            self._inside(*command),
            cwd=REPO_ROOT,
            env=self._environment(environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=CALL_S,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self._inside(sys.executable, *arguments),
                cwd=REPO_ROOT,
                env=self._environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)

    def logs(self) -> str:
        files = sorted(self.folder.rglob("*.log"))
        texts = [f"== {each}\n{each.read_text()[-3000:]}" for each in files]
        return "\n".join(texts)

    def switch_off(self) -> None:
        """With all that runs on it; may be called twice."""
        self._unshare.kill()
        self._unshare.wait()
        for process in self.processes:
            process.kill()
            process.wait()


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


class Machines:
    """The pool: a controller and rank 0 on the first machine, rank 1 on the second,
    and there the gateway too."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.key_file = folder / "pool.key"
        keys.create(self.key_file)
        self.both = [Machine(number, folder) for number in (0, 1)]
        for machine in self.both:
            stack.callback(machine.switch_off)
        first, second = (machine.cable for machine in self.both)
        run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for machine in self.both:
            machine.plug_in()
        self._start()

    def _start(self) -> None:
        key = {keys.KEY_FILE_VARIABLE: str(self.key_file)}
        self.both[0].start(
            "controller",
            *("-m", "vllm_resident.controller", "--bind", CONTROLLER),
            # A load may hold the interpreter for longer than a second or four.
            *("--heartbeat-timeout", "15"),
            **key,
        )
        for machine in self.both:
            place = ("--nnodes", "2", "--node-rank", str(machine.number), *MASTER)
            machine.start(
                "torchrun",
                *("-m", "torch.distributed.run", *place, "--nproc-per-node", "1"),
                *("-m", "vllm_resident.rank", "--controller", CONTROLLER),
                **key,
            )
        self.both[1].start(
            "gateway",
            *("-m", "vllm_resident.gateway", "--controller", CONTROLLER),
            *("--http", HTTP),
            **key,
        )

    def cli(self, number: int, *words: str) -> Any:
        """A command on one of the machines, as its document."""
        command = (sys.executable, "-m", "vllm_resident.cli", *words, "--json")
        where = ("--controller", CONTROLLER, "--key-file", str(self.key_file))
        return json.loads(self.both[number].run(*command, *where))

    def wait_until(
        self, what: str, condition: Callable[[Any], bool], timeout_s: float
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.cli(0, "status")
            if condition(status):
                return status
            time.sleep(0.5)
        logs = "\n".join(machine.logs() for machine in self.both)
        raise AssertionError(f"{what} within {timeout_s} s:\n{logs}")

    def complete(self, model: str, prompt: str) -> str:
        """Over HTTP, on the machine of the gateway."""
        body = json.dumps({"model": model, "prompt": prompt, **SAMPLING})
        url = f"http://{HTTP}/v1/completions"
        answer = self.both[1].run(
            *("curl", "--silent", "--show-error", "--retry-connrefused", "--retry"),
            *("60", "--retry-delay", "1", "--max-time", str(CALL_S)),
            *("--header", "content-type: application/json", "--data", body, url),
        )
        text: str = json.loads(answer)["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    if not _may_make_machines():
        pytest.skip("needs root, and iproute2, for network namespaces")
    with ExitStack() as stack:
        # Short paths for unix sockets.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="vr-")))
        machines = Machines(folder, stack)
        machines.wait_until("both ranks", _is_ready, START_S)
        yield machines


def _is_ready(status: Any) -> bool:
    return bool(status["phase"] == "ready")


OPTIONS = [
    word
    for name, value in ENGINE_ARGS.items()
    for word in (
        [f"--{name.replace('_', '-')}"]
        if value is True
        else [f"--{name.replace('_', '-')}", str(value)]
    )
]


def tokens(document: Any) -> list[list[int]]:
    return [each["token_ids"] for each in document["completions"]]


GREEDY = ("--temperature", "0", "--max-tokens", str(SAMPLING["max_tokens"]))


def test_an_engine_over_both_machines(
    machines: Machines,
    checkpoints: dict[str, str],
    reference: Callable[[str], list[list[int]]],
) -> None:
    hosts = {rank["host"] for rank in machines.cli(0, "status")["ranks"]}
    assert len(hosts) == 1  # they share a name, and nothing else
    machines.cli(1, "load", "wide", checkpoints["llama"], "--ranks", "0,1",
                 "--tensor-parallel-size", "2", *OPTIONS)  # fmt: skip
    said = machines.cli(1, "generate", "wide", *PROMPTS, *GREEDY)
    assert tokens(said) == reference("llama")
    machines.cli(0, "sleep", "wide")
    machines.cli(0, "load", "far", checkpoints["qwen2"], "--ranks", "1", *OPTIONS)
    assert tokens(machines.cli(0, "generate", "far", *PROMPTS, *GREEDY)) == (
        reference("qwen2")
    )
    machines.cli(0, "switch", "far", "wide")
    assert tokens(machines.cli(0, "generate", "wide", *PROMPTS, *GREEDY)) == (
        reference("llama")
    )


def test_the_gateway_reaches_a_leader_on_the_other_machine(
    machines: Machines, checkpoints: dict[str, str]
) -> None:
    machines.cli(0, "apply", str(_layout(machines, checkpoints)))
    said = machines.cli(0, "generate", "wide", PROMPTS[0], *GREEDY)
    text = said["completions"][0]["text"]
    assert machines.complete("wide", PROMPTS[0]) == text
    machines.cli(0, "sleep", "wide")
    assert machines.complete("wide", PROMPTS[0]) == text


def _layout(machines: Machines, checkpoints: dict[str, str]) -> Path:
    path = machines.both[0].folder / "layout.toml"
    engine = {"model": checkpoints["llama"], "ranks": [0, 1], **ENGINE_ARGS}
    engine["tensor_parallel_size"] = 2
    lines = [f"{name} = {json.dumps(value)}" for name, value in engine.items()]
    path.write_text("\n".join(["[engines.wide]", *lines]) + "\n")
    return path


def test_a_client_without_the_key_hears_nothing(machines: Machines) -> None:
    script = f"""if True:
        from vllm_resident import Client, PoolUnreachable
        with Client({CONTROLLER!r}, connect_timeout_s=2) as client:
            try:
                client.status()
            except PoolUnreachable as error:
                print("nobody answered")
    """
    said = machines.both[0].run(sys.executable, "-c", script)
    assert said == "nobody answered\n"


def test_a_machine_that_nobody_hears_is_said_to_be_lost(machines: Machines) -> None:
    far = machines.both[1]
    far.run("ip", "link", "set", far.cable, "down")
    status = machines.wait_until(
        "the loss", lambda s: s["ranks"][1]["phase"] == "lost", LOST_S
    )
    assert status["phase"] == "degraded"
    assert status["ranks"][0]["phase"] in ("ready", "lost")
