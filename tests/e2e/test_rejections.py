"""Bad input gets a clear error of the documented class and changes nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.e2e.pools import ENGINE_ARGS, SAMPLING, pids
from tests.members import standing_still
from vllm_resident import Client, CommandRejected, ProtocolError, RankFailure
from vllm_resident.messages import (
    MAX_MESSAGE_BYTES,
    CallFailed,
    EngineStatus,
    ToClientMessage,
)
from vllm_resident.transport import GREETING, Decoder

Attempt = Callable[[], object]


@pytest.fixture
def serving(pool: Client, checkpoints: dict[str, str]) -> Iterator[Client]:
    """A pool with "m" on rank 0; afterwards everything must be as it was."""
    pool.load("m", checkpoints["llama"], ranks=[0], **ENGINE_ARGS)
    before = pool.generate("m", "hello", SAMPLING)
    engines = engines_of(pool)
    yield pool
    assert pool.generate("m", "hello", SAMPLING) == before
    assert engines_of(pool) == engines
    assert all(rank.phase == "ready" for rank in pool.status().ranks)


def engines_of(pool: Client) -> list[EngineStatus]:
    """As they are, but for the time that passes."""
    replace = msgspec.structs.replace
    return [replace(engine, idle_s=0.0) for engine in pool.status().engines]


def rejects(attempt: Attempt, match: str) -> None:
    with pytest.raises(CommandRejected, match=match):
        attempt()


def test_a_model_folder_that_is_not_there(serving: Client) -> None:
    rejects(
        lambda: serving.load("x", "/no/such/folder", ranks=[1], **ENGINE_ARGS),
        "/no/such/folder",
    )


def test_a_broken_model_folder(serving: Client, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{ not json")
    rejects(
        lambda: serving.load("x", str(tmp_path), ranks=[1], **ENGINE_ARGS),
        "vLLM refuses",
    )


def test_weights_cut_short(
    serving: Client, tmp_path: Path, checkpoints: dict[str, str]
) -> None:
    """Seen only while building: a RankFailure, and the rank is free again."""
    for file in Path(checkpoints["llama"]).iterdir():
        data = file.read_bytes()
        short = data[: len(data) // 2] if file.suffix == ".safetensors" else data
        (tmp_path / file.name).write_bytes(short)
    with pytest.raises(RankFailure) as raised:
        serving.load("x", str(tmp_path), ranks=[1], **ENGINE_ARGS)
    assert raised.value.rank == 1
    assert raised.value.phase == "load_model"
    serving.load("y", checkpoints["qwen2"], ranks=[1], **ENGINE_ARGS)
    serving.unload("y")


def test_a_size_that_does_not_divide_the_heads(
    pool: Client, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    for file in Path(checkpoints["llama"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(num_attention_heads=3, num_key_value_heads=3, hidden_size=96)
    (tmp_path / "config.json").write_text(json.dumps(config))
    rejects(
        lambda: pool.load("x", str(tmp_path), tensor_parallel_size=2, **ENGINE_ARGS),
        "heads",
    )
    assert pool.status().engines == []


@pytest.mark.parametrize(
    ("ranks", "match"),
    [
        ([5], "5"),
        ([-1], "-1"),
        ([0], "m"),
        ([1, 1], "twice|duplicate|more than once"),
        (7, "7"),
        ([], "rank"),
    ],
)
def test_ranks_that_cannot_be_had(
    ranks: list[int] | int, match: str, serving: Client, checkpoints: dict[str, str]
) -> None:
    rejects(
        lambda: serving.load("x", checkpoints["llama"], ranks=ranks, **ENGINE_ARGS),
        match,
    )


def test_a_name_in_use(serving: Client, checkpoints: dict[str, str]) -> None:
    rejects(lambda: serving.load("m", checkpoints["llama"], ranks=[1]), "m")


def test_an_unknown_engine_argument(
    serving: Client, checkpoints: dict[str, str]
) -> None:
    rejects(
        lambda: serving.load("x", checkpoints["llama"], ranks=[1], max_model_length=9),
        "max_model_len",
    )


def test_an_engine_argument_of_the_wrong_type(
    serving: Client, checkpoints: dict[str, str]
) -> None:
    rejects(
        lambda: serving.load("x", checkpoints["llama"], ranks=[1], max_model_len="no"),
        "max_model_len",
    )


def test_a_prompt_longer_than_the_model_takes(serving: Client) -> None:
    rejects(lambda: serving.generate("m", ["ok", "fox " * 400], SAMPLING), "prompt 1")


@pytest.mark.parametrize("prompts", [[[]], [[999_999]]])
def test_prompts_that_are_none(prompts: list[str], serving: Client) -> None:
    rejects(lambda: serving.generate("m", prompts, SAMPLING), "prompt")


def test_sampling_parameters_that_are_none(serving: Client) -> None:
    rejects(lambda: serving.generate("m", "hi", temprature=1.0), "temperature")
    rejects(lambda: serving.generate("m", "hi", temperature="hot"), "temperature")
    rejects(lambda: serving.generate("m", "hi", max_tokens=-3), "max_tokens")


def test_an_unknown_engine(serving: Client) -> None:
    rejects(lambda: serving.generate("nobody", "hi", SAMPLING), "nobody")
    rejects(lambda: serving.unload("nobody"), "nobody")


def test_a_command_while_its_engine_changes(
    serving: Client, checkpoints: dict[str, str]
) -> None:
    started = threading.Event()
    loading = threading.Thread(
        target=lambda: serving.load(
            "x",
            checkpoints["qwen2"],
            ranks=[1],
            on_progress=lambda progress: started.set(),
            **ENGINE_ARGS,
        )
    )
    with standing_still(pids(serving)[1]):
        loading.start()
        assert started.wait(30)
        rejects(lambda: serving.generate("x", "hi", SAMPLING), "x")
        rejects(lambda: serving.unload("x"), "x")
        rejects(lambda: serving.load("x", checkpoints["qwen2"], ranks=[1]), "x")
    loading.join()
    assert serving.generate("x", "hi", SAMPLING)
    serving.unload("x")


def send_raw(endpoint: str, frames: list[bytes]) -> CallFailed:
    """Send frames past the client and return the controller's answer."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send_multipart(frames)
        assert socket.poll(10_000), "no answer to a bad frame"
        reply = Decoder[ToClientMessage](ToClientMessage).decode(
            socket.recv_multipart()
        )
    assert isinstance(reply, CallFailed)
    return reply


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([b"hello"], "frames"),
        ([GREETING, b"\xff\xfe not msgpack"], "not a message"),
        ([GREETING, b"\x81\xa4type\xa4Nope"], "not a message"),
        ([b"vllm-resident/999", b"\x80"], "vllm-resident/999"),
        ([GREETING, b"\xc6" + bytes(MAX_MESSAGE_BYTES + 1)], "over the limit"),
    ],
    ids=["one-frame", "no-msgpack", "unknown-type", "other-version", "too-large"],
)
def test_a_frame_that_is_not_a_message(
    frames: list[bytes], match: str, serving: Client
) -> None:
    before = serving.status().num_protocol_errors
    reply = send_raw(serving.endpoint, frames)
    assert reply.error.kind == "ProtocolError"
    assert match in reply.error.message
    assert serving.status().num_protocol_errors == before + 1


def test_a_call_too_large_to_send(serving: Client) -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        serving.generate("m", ["x" * (MAX_MESSAGE_BYTES + 1)], SAMPLING)
