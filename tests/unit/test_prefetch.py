"""Prefetches: who is told to read, what the caller hears, and the reading itself."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.unit.controller_harness import ALICE, BOB, Harness, hello
from vllm_resident import CommandRejected
from vllm_resident.controller import prefetch
from vllm_resident.controller.effects import SendToClient
from vllm_resident.controller.state import PoolState
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    CallFailed,
    CheckpointPrefetched,
    CheckpointRead,
    EngineSpec,
    PrefetchCheckpoint,
    Progress,
    ReadCheckpoint,
    ToClientMessage,
)
from vllm_resident.rank import prefetch as reading

# ---------------------------------------------------------------- the controller


def harness(*hosts: str) -> Harness:
    """A pool of one rank for each of `hosts`."""
    made = Harness(len(hosts), num_ready=0)
    for rank, host in enumerate(hosts):
        made.rank(hello(rank, len(hosts), host=host, host_id=host))
    return made


def ask(pool: Harness, model: str = "/m", call: int = 1, timeout_s: float = 60) -> None:
    pool.client(PrefetchCheckpoint(call=call, model=model, timeout_s=timeout_s))


def readers(pool: Harness) -> list[tuple[int, str]]:
    return [
        (rank, message.model)
        for rank, message in pool.to_ranks(ReadCheckpoint)
        if isinstance(message, ReadCheckpoint)
    ]


def has_read(pool: Harness, rank: int, num_bytes: int = 5) -> None:
    read = pool.state.prefetches[0].read
    pool.rank(CheckpointRead(rank=rank, read=read, num_bytes=num_bytes))


def told(state: PoolState) -> list[ToClientMessage]:
    effects, state.effects = state.effects, []
    return [e.message for e in effects if isinstance(e, SendToClient)]


def test_one_rank_of_each_machine_reads() -> None:
    pool = harness("a", "a", "b", "b")
    ask(pool)
    assert readers(pool) == [(0, "/m"), (2, "/m")]
    has_read(pool, 2)
    assert pool.to_clients() == []
    pool.now += 3
    has_read(pool, 0, 7)
    assert pool.to_clients() == [
        CheckpointPrefetched(call=1, num_bytes=7, seconds=3.0, hosts=["a", "b"])
    ]
    assert pool.state.prefetches == []


def test_a_declared_model_is_read_by_its_name() -> None:
    pool = harness("a")
    pool.state.models["chat"] = EngineSpec("chat", "/models/chat")
    ask(pool, "chat")
    assert readers(pool) == [(0, "/models/chat")]


@pytest.mark.parametrize("model", ["", " "])
def test_no_model_is_rejected(model: str) -> None:
    pool = harness("a")
    ask(pool, model)
    assert pool.error().kind == "CommandRejected"
    assert readers(pool) == []


def test_nobody_reads_before_every_machine_can() -> None:
    pool = harness("a", "b")
    pool.kill(0)
    ask(pool)
    assert pool.error().message.startswith("no rank on a is ready (rank 0 is lost)")
    pool.kill(1)
    ask(pool)
    assert "no rank of pool 'test' is ready" in pool.error().message
    assert pool.state.prefetches == []


def test_what_one_machine_refuses_is_the_answer() -> None:
    pool = harness("a", "b")
    ask(pool)
    read = pool.state.prefetches[0].read
    refusal = ErrorInfo("CommandRejected", "not there", 1)
    pool.rank(CheckpointRead(rank=1, read=read, num_bytes=0, error=refusal))
    assert pool.error() == refusal
    assert pool.state.prefetches == []
    pool.rank(CheckpointRead(rank=0, read=read, num_bytes=5))
    assert pool.to_clients() == []


def test_the_caller_hears_each_second_and_at_the_deadline_who_is_late() -> None:
    pool = harness("a", "b")
    ask(pool, timeout_s=2.5)
    assert [type(m) for m in pool.to_clients()] == [Progress]
    has_read(pool, 0)
    told(pool.state)
    for seconds, message in [(0.5, None), (0.6, Progress), (1.0, Progress)]:
        pool.now += seconds
        prefetch.tick(pool.state, pool.now)
        assert [type(m) for m in told(pool.state)] == ([message] if message else [])
    pool.now += 0.5
    prefetch.tick(pool.state, pool.now)
    (late,) = told(pool.state)
    assert isinstance(late, CallFailed)
    assert (late.error.kind, late.error.rank) == ("RankTimeout", 1)
    assert "not read within 2.5 s on rank 1" in late.error.message
    assert pool.state.prefetches == []


def test_a_lost_reader_is_the_answer_at_once() -> None:
    pool = harness("a", "b")
    ask(pool)
    has_read(pool, 0)
    prefetch.on_rank_lost(pool.state, pool.state.ranks[0], pool.now)
    assert told(pool.state) == []
    prefetch.on_rank_lost(pool.state, pool.state.ranks[1], pool.now)
    (lost,) = told(pool.state)
    assert isinstance(lost, CallFailed)
    assert (lost.error.kind, lost.error.rank) == ("RankLost", 1)


def test_the_pool_tells_of_a_reader_that_dies() -> None:
    pool = harness("a", "b")
    ask(pool)
    pool.kill(1)
    assert pool.error().kind == "RankLost"


def test_a_vanished_client_is_not_told_and_what_is_read_is_no_news() -> None:
    pool = harness("a")
    ask(pool)
    assert prefetch.is_call(pool.state, ALICE, 1)
    assert not prefetch.is_call(pool.state, BOB, 1)
    pool.pool.client_gone(ALICE)
    assert not prefetch.is_call(pool.state, ALICE, 1)
    has_read(pool, 0)
    assert pool.to_clients() == []
    assert pool.state.prefetches == []
    assert pool.state.num_stale_messages == 0


def test_a_call_number_in_use_is_rejected() -> None:
    pool = harness("a")
    ask(pool, call=4)
    ask(pool, call=4)
    assert "call number 4 is in use" in pool.error().message
    assert len(pool.state.prefetches) == 1


def test_a_pool_that_stops_tells_who_waits() -> None:
    pool = harness("a")
    ask(pool)
    pool.effects = pool.pool.stop(5.0, pool.now)
    assert "is stopping" in pool.error().message


# ----------------------------------------------------------------------- a rank


def checkpoint(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x" * 100)
    return folder


def test_what_vllm_reads_is_what_is_read(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "m", "config.json", "a.safetensors", "b.safetensors", "old.bin"
    )
    checkpoint(folder / "onnx", "model.onnx")
    names = [path.name for path in reading.find(str(folder))]
    assert names == ["a.safetensors", "b.safetensors", "config.json"]
    assert reading.read(reading.find(str(folder))) == 300
    old = checkpoint(tmp_path / "old", "config.json", "pytorch_model.bin")
    assert reading.read(reading.find(str(old))) == 200
    one = folder / "a.safetensors"
    assert reading.find(str(one)) == [one]


def test_a_snapshot_of_links_is_read(tmp_path: Path) -> None:
    blobs = checkpoint(tmp_path / "blobs", "1")
    folder = checkpoint(tmp_path / "m")
    (folder / "model.safetensors").symlink_to(blobs / "1")
    assert reading.read(reading.find(str(folder))) == 100


@pytest.mark.parametrize("threads", [1, 4])
def test_large_files_are_read_whole_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    seen: list[tuple[int, int]] = []
    whole = reading._read_part
    monkeypatch.setattr(reading, "NUM_THREADS", threads)
    monkeypatch.setattr(reading, "PART_BYTES", 1000)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 300)

    def read_part(file: Path, offset: int, size: int) -> None:
        seen.append((offset, size))
        whole(file, offset, size)

    monkeypatch.setattr(reading, "_read_part", read_part)
    (tmp_path / "m.safetensors").write_bytes(os.urandom(2500))
    assert reading.read([tmp_path / "m.safetensors"]) == 2500
    assert sorted(seen) == [(0, 1000), (1000, 1000), (2000, 500)]
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("prefetch") for name in names)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("/no/such/folder", "model folder /no/such/folder is not there"),
        ("./none", "is not there"),
        ("nobody/never-heard-of-it", "neither a folder nor a hub model"),
        ("no!such//name", "neither a folder nor a hub model"),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, text: str
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    answer = reading.answer(3, ReadCheckpoint(read=9, model=model))
    assert (answer.rank, answer.read, answer.num_bytes) == (3, 9, 0)
    assert answer.error is not None
    assert answer.error.kind == "CommandRejected"
    assert text in answer.error.message


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandRejected, match="holds no files"):
        reading.find(str(tmp_path))


def test_more_than_the_memory_holds_is_refused(tmp_path: Path) -> None:
    huge = tmp_path / "m.safetensors"
    with huge.open("wb") as file:
        file.truncate(2**43)  # takes no room on the disk
    with pytest.raises(CommandRejected, match=r"8192\.00 GiB of files do not fit"):
        reading.read([huge])


def test_a_file_that_cannot_be_read_is_a_failure_of_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", "a.safetensors")

    def refuse(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(reading, "_read_part", refuse)
    answer = reading.answer(3, ReadCheckpoint(read=9, model=str(folder)))
    assert answer.error is not None
    assert (answer.error.kind, answer.error.rank) == ("RankFailure", 3)
    assert "the disk is gone" in answer.error.message


def test_it_reads_in_the_background(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "a.safetensors")
    answered = threading.Event()
    answers: list[CheckpointRead] = []

    def send(message: CheckpointRead) -> None:
        answers.append(message)
        answered.set()

    with reading._turn:  # as if another checkpoint were being read
        reading.start(3, ReadCheckpoint(read=9, model=str(folder)), send)
        assert not answered.wait(0.05)
    assert answered.wait(30)
    assert answers == [CheckpointRead(rank=3, read=9, num_bytes=100)]
