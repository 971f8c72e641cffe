"""Each example as its docstring says to run it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.checkpoints import REPO_ROOT
from examples.demo import RESULT
from tests.e2e.shell import MODELS, Shell, make_models, shell

pytestmark = pytest.mark.timeout(400)

DEMO = (sys.executable, "-m", "examples.demo")
ANSWER = "The capital of France is' Paris."


@pytest.fixture
def user() -> Iterator[Shell]:
    with shell() as its:
        yield its
        # Whatever an example did, it has left nothing running.
        its.wait_until_empty()


@pytest.fixture(scope="module")
def models() -> dict[str, str]:
    """Folders, relative to the repository's root, of the examples' models."""
    return make_models()


def check_demo(document: dict[str, Any]) -> None:
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1]
    assert all(rank["pid_first"] == rank["pid_last"] for rank in document["ranks"])
    assert len({rank["pid_first"] for rank in document["ranks"]}) == 2
    ways = [(each["from"], each["to"]) for each in document["switches"]]
    assert ways == [
        ("nothing", "chat | tiny"),
        ("chat | tiny", "wide"),
        ("wide", "chat | tiny"),
    ]
    for each in document["switches"]:
        assert 0 < max(each["phases"].values()) <= each["seconds"] < 60
    texts = {(o["layout"], o["prompt"]): o["text"] for o in document["outputs"]}
    for layout in (1, 3):
        assert texts[layout, "The capital of France is"].startswith(" Paris")
    assert {o["engine"] for o in document["outputs"]} == {"chat", "tiny", "wide"}


def test_the_demo_runs_at_once_after_a_kill_9_in_the_middle(user: Shell) -> None:
    with user.started(*DEMO) as killed:
        killed.wait_for_output("chat | tiny -> wide")
        os.killpg(killed.process.pid, signal.SIGKILL)
    RESULT.unlink(missing_ok=True)
    done = user.run(*DEMO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris" in done.stdout
    assert "the whole switch" in done.stdout
    check_demo(json.loads(RESULT.read_text()))


def test_a_second_demo_is_told_of_the_first_which_ctrl_c_ends(user: Shell) -> None:
    with user.started(*DEMO) as first:
        first.wait_for_output("starting ranks")
        second = user.run(*DEMO)
        assert second.returncode == 1
        assert "another demo is running" in second.stdout
        first.wait_for_output("nothing -> chat | tiny")
        first.process.send_signal(signal.SIGINT)
        assert first.wait(60) == 130
    assert "Traceback" not in first.output()
    user.wait_until_empty(30)


def test_the_client_of_a_pool_of_torchrun(user: Shell, models: dict[str, str]) -> None:
    pool = ("torchrun", "--standalone", "--nproc-per-node", "2", "-m")
    with user.started(*pool, "vllm_resident.rank") as torchrun:
        done = user.run(sys.executable, "examples/client.py", models["smollm2"])
        assert done.returncode == 0, done.stderr + torchrun.output()
        assert ANSWER in done.stdout
        assert "as a stream:  Paris." in done.stdout
        assert "refused, as it should be: engine name 'chat' is in use" in done.stdout
        documented = user.run(sys.executable, "-c", blocks("README.md", "python")[0])
        assert documented.returncode == 0, documented.stderr
        assert documented.stdout.startswith("0 ")
        assert user.run("vllm-resident", "shutdown").returncode == 0
        assert torchrun.wait(30) == 0


@pytest.mark.usefixtures("models")
def test_the_quick_start_of_the_readme(user: Shell) -> None:
    [block] = [each for each in blocks("README.md", "") if "up --detach" in each]
    # The environment is the one of the tests, which the shell has on its path.
    block = block.replace("source .venv/bin/activate\n", "")
    done = user.run("bash", "-euo", "pipefail", "-c", block)
    assert done.returncode == 0, done.stderr
    assert "\n Paris" in done.stdout
    assert "the pool has stopped" in done.stdout


def blocks(page: str, language: str) -> list[str]:
    text = (REPO_ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_a_batch_over_several_models(
    user: Shell, models: dict[str, str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    answers = tmp_path / "answers.jsonl"
    prompts.write_text("The capital of France is\nOnce upon a time\n")
    switched = (models["smollm2"], models["qwen3"], models["smollm2"])
    script = (sys.executable, "examples/batch_switch.py")
    done = user.run(*script, str(prompts), str(answers), *switched)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["model"] for line in lines] == [
        model for model in switched for _ in range(2)
    ]
    assert lines[0]["text"].startswith(" Paris")
    assert lines[4:] == lines[:2]
    assert lines[2]["text"] != lines[0]["text"]


def test_a_batch_that_cannot_be_says_why_and_ends_its_pool(
    user: Shell, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    script = (sys.executable, "examples/batch_switch.py")
    done = user.run(*script, str(prompts), str(tmp_path / "answers.jsonl"), "./absent")
    assert done.returncode == 1
    assert "CommandRejected: model folder ./absent is not there" in done.stderr
    assert "Traceback" not in done.stderr


def test_library_mode(user: Shell, models: dict[str, str]) -> None:
    script = ("--standalone", "--nproc-per-node", "2", "examples/spmd.py")
    order = (models["llama"], models["smollm2"], models["qwen3"])
    done = user.run("torchrun", *script, *order)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"(\S+) on ranks (\[[\d, ]+\]), pid (\d+)", done.stdout)
    pids = {ranks: pid for _, ranks, pid in lines}
    # The first of both is the one that served all: the same process.
    assert pids["[0, 1]"] == pids["[0]"] != pids["[1]"]
    assert {(model, ranks) for model, ranks, _ in lines} == {
        (models["llama"], "[0, 1]"),
        (models["smollm2"], "[0]"),
        (models["qwen3"], "[1]"),
    }
    assert ANSWER in done.stdout


@pytest.mark.usefixtures("models")
def test_the_library_mode_of_the_readme(user: Shell, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(blocks("README.md", "python")[1])
    done = user.run("torchrun", "--standalone", "--nproc-per-node", "2", str(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("models")
def test_the_job_of_a_cpu_runner(user: Shell) -> None:
    done = user.run("examples/ci/cpu_runner.sh", VLLM_RESIDENT_TEST_MODELS=str(MODELS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens on 1 and on 2 ranks are the same" in done.stdout
    assert done.stdout.splitlines()[-1] == "passed; nothing left behind"


@pytest.mark.skipif(Path("/dev/davinci_manager").exists(), reason="there is an NPU")
def test_the_job_of_an_npu_runner_without_an_npu(user: Shell) -> None:
    done = user.run("examples/ci/npu_runner.sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no NPU on this runner" in done.stdout
    assert "nothing was run" in done.stdout


def test_the_job_of_a_gpu_runner_without_a_gpu(user: Shell, tmp_path: Path) -> None:
    """As where the driver is missing or broken, whatever this machine has."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'No devices were found' >&2\nexit 9\n")
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{user.environment['PATH']}"
    done = user.run("examples/ci/gpu_runner.sh", PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no NVIDIA GPU on this runner" in done.stdout
