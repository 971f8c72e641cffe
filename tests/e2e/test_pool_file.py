"""A pool with a pool.toml, from the command line: real ranks, real checkpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.at_rest import ranks_at_rest
from tests.e2e.pools import eventually
from tests.e2e.shell import Shell, make_models, shell
from vllm_resident import Client

pytestmark = pytest.mark.timeout(400)

POOL_FILE = "examples/pool.toml"
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture
def user() -> Iterator[Shell]:
    with shell() as its:
        yield its


@pytest.fixture(scope="module", autouse=True)
def models() -> dict[str, str]:
    return make_models()


def asked(user: Shell, *words: str) -> dict[str, Any]:
    """One command's document."""
    done = user.run("vllm-resident", *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def said(user: Shell, name: str) -> str:
    prompt = "The capital of France is"
    document = asked(user, "generate", name, prompt, *GREEDY)
    text: str = document["completions"][0]["text"]
    return text


def test_declared_models_start_switch_and_leave_their_trace(
    user: Shell, tmp_path: Path
) -> None:
    up = asked(
        user, "up", "--detach", "--nproc-per-node", "2", "--config", POOL_FILE
    )  # fmt: skip
    phases = {e["name"]: e["phase"] for e in up["status"]["engines"]}
    assert phases == {"chat": "ready", "tiny": "asleep"}
    before = said(user, "chat")
    assert before.startswith(" Paris")

    read = asked(user, "prefetch", "wide")
    assert read["num_bytes"] > 10_000
    report = asked(user, "switch", "chat", "wide")
    assert {(e["name"], e["action"]) for e in report["engines"]} == {
        ("chat", "sleep"),
        ("wide", "load"),
    }
    assert report["unavailable_s"] > 0
    report = asked(user, "switch", "wide", "chat")
    assert {(e["name"], e["action"]) for e in report["engines"]} == {
        ("wide", "sleep"),
        ("chat", "wake_up"),
    }
    assert said(user, "chat") == before

    status = asked(user, "status", "--ledger")
    costs = {e["name"]: e["memory"] for e in status["engines"]}
    assert costs["chat"]["0"]["device_bytes"] > 0
    assert costs["wide"]["1"]["host_bytes"] > 0
    assert status["host_memory_bytes"] == 8 * 2**30
    assert all(rank["num_process_groups"] for rank in status["ranks"])

    out = tmp_path / "trace.json"
    written = asked(user, "trace", "-o", str(out))
    assert written["num_transitions"] == 4
    events = json.loads(out.read_text())["traceEvents"]
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {"controller", "rank 0", "rank 1"}
    assert {"chat: load_model", "wide: load_model"} <= {e["name"] for e in events}
    asked(user, "shutdown")
    user.wait_until_empty()


def test_an_engine_goes_on_while_a_checkpoint_is_read(
    shared_pool: Client, models: dict[str, str]
) -> None:
    small = {"enforce_eager": True, "max_model_len": 256}
    shared_pool.apply([])
    shared_pool.load(
        "reader", models["llama"], ranks=[0], kv_cache_memory_bytes=2**26, **small
    )
    alone = shared_pool.generate(
        "reader", "hello", temperature=0, max_tokens=64, ignore_eos=True
    )
    # Counted after an answer: the first of all starts a thread that stays.
    threads = [rank.num_threads for rank in ranks_at_rest(shared_pool)]
    done: list[int] = []
    reading = threading.Thread(
        target=lambda: done.append(shared_pool.prefetch(models["smollm2"]).num_bytes)
    )
    reading.start()
    beside = shared_pool.generate(
        "reader", "hello", temperature=0, max_tokens=64, ignore_eos=True
    )
    reading.join(60)
    weights = Path(models["smollm2"], "model.safetensors").stat().st_size
    assert done[0] > weights
    assert beside == alone

    def check() -> None:
        for before, rank in zip(threads, ranks_at_rest(shared_pool), strict=True):
            assert rank.num_threads <= before

    eventually(check)
    shared_pool.unload("reader")
