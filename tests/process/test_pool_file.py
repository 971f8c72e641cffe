"""What the real controller makes of a pool.toml, of prefetches, and of its own log."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.process.test_controller import (
    REPOSITORY,
    PoolFixture,
    error,
    is_done,
    pool,  # noqa: F401 (a fixture)
    wait_until,
)
from vllm_resident import journal
from vllm_resident.messages import (
    CheckpointPrefetched,
    EngineSpec,
    LoadEngine,
    PrefetchCheckpoint,
    Progress,
    ShutdownPool,
    SleepEngine,
    UnloadEngine,
    WakeUpEngine,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

POOL_FILE = """
[pool]
host_memory = "1MiB"
device_memory = "2MiB"

[models.first]
model = "/m"
ranks = [0]
start = "loaded"
max_model_len = 7

[models.second]
model = "/m"
ranks = [1]
start = "asleep"
pinned = true

[models.third]
model = "checkpoint"
ranks = [1]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pool.toml"
    path.write_text(POOL_FILE)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "config.json").write_bytes(b"{}")
    return path


def test_declared_models_are_started_and_loaded_by_name(
    pool: PoolFixture,  # noqa: F811
    file: Path,
) -> None:
    client, _ = pool.up(2, "--config", str(file))
    wait_until(
        "started",
        lambda: client.phases() == {"first": "ready", "second": "asleep"},
    )
    status = client.status()
    assert (status.host_memory_bytes, status.device_memory_bytes) == (2**20, 2**21)
    first, second = status.engines
    assert (first.ranks, first.engine_args["max_model_len"]) == ([0], 7)
    assert (second.sleep_level, second.pinned) == (1, True)
    assert second.memory[1].host_bytes == 1000

    loaded = client.done(LoadEngine, spec=EngineSpec("third"), timeout_s=20.0)
    assert is_done(loaded)
    third = client.status().engines[2]
    assert (third.model, third.ranks) == (str(file.parent / "checkpoint"), [1])
    unknown = client.done(LoadEngine, spec=EngineSpec("fourth"), timeout_s=20.0)
    assert error(unknown).kind == "CommandRejected"
    assert "'first', 'second', 'third'" in error(unknown).message


def test_a_wrong_pool_file_is_told_before_anything_starts(
    pool: PoolFixture,  # noqa: F811
    file: Path,
) -> None:
    file.write_text("[pool]\nhost_memroy = 3\n")
    process = pool.start("-m", "vllm_resident.controller", "--config", str(file))
    assert process.wait(20) == 2
    assert f"{file}:2: unknown key 'host_memroy'" in pool.log()
    assert not (pool.directory / "default" / "pool.json").exists()


def test_the_pool_file_may_be_named_by_the_environment(
    pool: PoolFixture,  # noqa: F811
    file: Path,
) -> None:
    pool.environment["VLLM_RESIDENT_CONFIG"] = str(file)
    client, _ = pool.up(2)
    assert client.status().host_memory_bytes == 2**20


def test_prefetch_reads_the_files_where_the_ranks_are(
    pool: PoolFixture,  # noqa: F811
    file: Path,
) -> None:
    client, _ = pool.up(2, "--config", str(file))
    for model in ("third", str(file.parent / "checkpoint")):
        done = client.done(PrefetchCheckpoint, model=model, timeout_s=20.0)
        assert isinstance(done, CheckpointPrefetched), done
        assert done.num_bytes == 1002
        assert len(done.hosts) == 1
    assert [m["model"] for m in pool.received(0, "ReadCheckpoint")] == [
        str(file.parent / "checkpoint")
    ] * 2
    assert pool.received(1, "ReadCheckpoint") == []
    refused = client.done(PrefetchCheckpoint, model="/not/there", timeout_s=20.0)
    assert error(refused).kind == "CommandRejected"
    assert "/not/there is not there" in error(refused).message


def test_a_prefetch_ends_at_its_deadline_and_with_its_rank(
    pool: PoolFixture,  # noqa: F811
    file: Path,
) -> None:
    client, ranks = pool.up(1, "--config", str(file))
    ranks[0].send_signal(signal.SIGSTOP)
    late = client.done(PrefetchCheckpoint, model="third", timeout_s=0.5)
    assert (error(late).kind, error(late).phase) == ("RankTimeout", "prefetch")
    call = client.send(PrefetchCheckpoint, model="third", timeout_s=20.0)
    # Of one that is dead already the controller would hear before the call.
    begun = client.receive()
    assert isinstance(begun, Progress)
    assert begun.call == call
    ranks[0].kill()
    assert error(client.answer(call)).kind == "RankLost"


def trace(pool: PoolFixture, *words: str) -> dict[str, Any]:  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-m", "vllm_resident.cli", "trace", *words],
        cwd=REPOSITORY,
        env=pool.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_every_transition_is_a_line_of_the_log_and_a_slice_of_the_trace(
    pool: PoolFixture,  # noqa: F811
    file: Path,
) -> None:
    client, _ = pool.up(2, "--config", str(file))
    wait_until(
        "started",
        lambda: client.phases() == {"first": "ready", "second": "asleep"},
    )
    assert is_done(
        client.done(SleepEngine, name="first", level=1, timeout_s=20.0, drain_s=0.0)
    )
    assert is_done(client.done(WakeUpEngine, name="first", timeout_s=20.0, drain_s=0.0))
    assert is_done(client.done(UnloadEngine, name="first", timeout_s=20.0))
    broken = client.load("broken", [0], fail="build", fail_rank=0)
    assert error(broken).kind == "RankFailure"
    client.done(ShutdownPool, timeout_s=10.0)

    written = journal.read(pool.directory / "default")
    assert [each.report.action for each in written][-4:] == [
        "sleep", "wake_up", "unload", "load",
    ]  # fmt: skip
    assert len(written) == 6
    assert {each.pool for each in written} == {"default"}
    assert all(each.cause for each in written)
    assert "build fails" in written[-1].report.error
    began = [each.began_unix_s for each in written[2:]]
    assert began == sorted(began)

    events = trace(pool)["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"controller", "rank 0", "rank 1"} <= names
    assert sum(e.get("cat") == "sleep" for e in events) >= 2
    last = trace(pool, "--last", "1")["traceEvents"]
    (failed,) = (e for e in last if e["ph"] == "X" and e["name"].startswith("load"))
    assert "build fails" in failed["args"]["error"]
