"""The command line over real pools: vLLM, torchrun, an embedded controller."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.pools import wait_until
from tests.e2e.shell import Running, Shell, make_models, segments_of, shell
from vllm_resident import Client

pytestmark = pytest.mark.timeout(400)

LAYOUT = "examples/layout.toml"
VLLM = ("--dtype=float32", "--enforce-eager", "--max-model-len", "256")
VLLM_TP2 = (*VLLM, "--tensor-parallel-size", "2", "--kv-cache-memory-bytes", "67108864")
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture
def user() -> Iterator[Shell]:
    with shell() as its:
        yield its


@pytest.fixture(scope="module")
def models() -> dict[str, str]:
    return make_models()


def asked(user: Shell, *words: str, **variables: str) -> dict[str, Any]:
    """One command's document."""
    done = user.run("vllm-resident", *words, "--json", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_pool_from_start_to_end(user: Shell, models: dict[str, str]) -> None:
    temporary = user.folder / "tmp"
    temporary.mkdir()
    up = asked(user, "up", "--detach", "--nproc-per-node", "2", TMPDIR=str(temporary))
    assert [rank["phase"] for rank in up["status"]["ranks"]] == ["ready", "ready"]
    pids = [rank["pid"] for rank in up["status"]["ranks"]]

    loaded = asked(user, "load", "both", models["llama"], *VLLM_TP2)
    assert loaded["engines"][0]["ranks"] == [0, 1]
    [said] = asked(user, "generate", "both", "hello", *GREEDY)["completions"]
    assert len(said["token_ids"]) == 8
    applied = asked(user, "apply", LAYOUT)
    assert {(e["action"], e["name"]) for e in applied["engines"]} == {
        # Set aside until what comes is there.
        ("sleep", "both"),
        ("unload", "both"),
        ("load", "chat"),
        ("load", "tiny"),
    }
    assert asked(user, "apply", LAYOUT)["kept"] == ["chat", "tiny"]
    text = user.run("vllm-resident", "generate", "chat", "The capital of France is",
                    *GREEDY)  # fmt: skip
    assert text.stdout.startswith(" Paris")
    asked(user, "unload", "tiny")

    status = asked(user, "status")
    assert [rank["pid"] for rank in status["ranks"]] == pids
    assert [(e["name"], e["phase"]) for e in status["engines"]] == [("chat", "ready")]
    assert asked(user, "shutdown")["stopped"]
    user.wait_until_empty()
    assert user.sockets() == []
    # What torch compiled is kept from one pool to the next, and is to be.
    left = [each.name for each in temporary.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []
    assert segments_of(up["torchrun_pid"]) == []
    assert user.run("vllm-resident", "status").returncode == 3


def test_a_pool_shut_down_while_a_rank_is_starting_does_not_come_back(
    user: Shell,
) -> None:
    up = asked(user, "up", "--detach", "--nproc-per-node", "2")
    with Client(up["endpoint"]) as client:
        os.kill(up["status"]["ranks"][1]["pid"], signal.SIGKILL)
        wait_until(client, lambda s: s.ranks[1].phase == "lost", 30, "the loss")
    asked(user, "shutdown")
    # Nothing of it is in the way of the next, or ends later than it must.
    user.wait_until_empty(25)
    log = (user.folder / "default" / "logs" / "torchrun.log").read_text()
    assert "rank 1 was killed by SIGKILL" in log
    assert "exitcode" not in log


def test_a_refused_command_is_a_document_too(user: Shell) -> None:
    done = user.run("vllm-resident", "generate", "nobody", "hello", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["kind"] == "PoolUnreachable"


UP = ("vllm-resident", "up", "--nproc-per-node", "2", "--json")


def launcher_of(up: Running) -> int:
    """The pid of its torchrun, which `up` in the foreground says when it is ready."""
    up.wait_for_output("torchrun_pid")
    [line] = [row for row in up.output().splitlines() if row.startswith("{")]
    pid: int = json.loads(line)["torchrun_pid"]
    return pid


def test_ctrl_c_leaves_nothing_of_a_pool_that_holds_an_engine(
    user: Shell, models: dict[str, str]
) -> None:
    with user.started(*UP) as up:
        launcher = launcher_of(up)
        asked(user, "load", "both", models["llama"], *VLLM_TP2)
        up.process.send_signal(signal.SIGINT)
        assert up.wait(40) == 130
        user.wait_until_empty(30)
        assert user.sockets() == []
        assert segments_of(launcher) == []


@pytest.mark.usefixtures("models")
def test_kill_9_of_up_in_the_middle_of_a_load_takes_the_pool_along(
    user: Shell,
) -> None:
    apply = ("vllm-resident", "apply", LAYOUT)
    # So that the load does not end before.
    hangs = '[{"engine": "chat", "phase": "load_model", "action": "hang"}]'
    with user.started(*UP, VLLM_RESIDENT_FAULTS=hangs) as up:
        launcher = launcher_of(up)
        with user.started(*apply) as applying:
            applying.wait_for_output("chat: load_model")
            up.process.kill()
            killed_at = time.monotonic()
            assert applying.wait(60) in (1, 3)
        user.wait_until_empty(40 - (time.monotonic() - killed_at))
    assert segments_of(launcher) == []
    again = asked(user, "up", "--detach", "--nproc-per-node", "2")
    assert again["status"]["phase"] == "ready"
    assert again["status"]["engines"] == []
    asked(user, "shutdown")
    user.wait_until_empty()
