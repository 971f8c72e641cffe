"""Frames, versions, size limits, endpoints."""

from __future__ import annotations

import os
import stat
import tempfile

import msgspec
import pytest
import zmq

from vllm_resident.client.connection import ENDPOINT_VARIABLE, resolve_endpoint
from vllm_resident.errors import CommandRejected, ProtocolError
from vllm_resident.messages import (
    MAX_MESSAGE_BYTES,
    CallFailed,
    Generate,
    GetStatus,
    ToController,
)
from vllm_resident.transport import (
    GREETING,
    Decoder,
    check_bindable,
    controller_endpoint,
    encode,
    ensure_private,
    host_id,
    open_socket,
    peek_call,
    pool_directory,
    unix_endpoint,
)

decoder: Decoder[object] = Decoder(ToController)


def generate(prompt: str) -> Generate:
    return Generate(
        call=1, engine="a", prompts=[prompt], sampling_params={}, stream=False,
        timeout_s=1,
    )  # fmt: skip


def test_message_comes_back_as_it_went():
    message = generate("hello")
    assert decoder.decode(encode(message)) == message


BAD_FRAMES = [
    ([], "expected 2 frames, got 0"),
    ([GREETING], "got 1"),
    ([GREETING, b"", b""], "got 3"),
    ([b"vllm-resident/999", encode(GetStatus(call=1))[1]], "vllm-resident/999"),
    ([b"", encode(GetStatus(call=1))[1]], "this side speaks"),
    ([GREETING, b""], "not a message"),
    ([GREETING, b"\xc1garbage"], "not a message"),
    ([GREETING, b"\x91" * 100_000], "not a message"),
    ([GREETING, encode(GetStatus(call=1))[1] + b"x"], "not a message"),
    ([GREETING, msgspec.msgpack.encode({"type": "Nonsense"})], "not a message"),
    ([GREETING, msgspec.msgpack.encode([1, 2])], "not a message"),
    ([GREETING, msgspec.msgpack.encode({"type": "GetStatus"})], "not a message"),
    ([GREETING, encode(CallFailed(call=1, error=ProtocolError("").to_info()))[1]],
     "not a message"),
    ([GREETING, bytes(MAX_MESSAGE_BYTES + 1)], "over the limit"),
    # The string of a map's value is not UTF-8.
    ([GREETING, b"\x82\xa4type\xa9GetStatus\xa4call\xa1\xff"], "not a message"),
]  # fmt: skip


@pytest.mark.parametrize(("frames", "says"), BAD_FRAMES)
def test_what_is_not_a_message_is_a_protocol_error(frames, says):
    with pytest.raises(ProtocolError) as refused:
        decoder.decode(frames)
    assert says in refused.value.message


def test_message_over_the_limit_is_refused_before_it_is_sent():
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(generate("x" * MAX_MESSAGE_BYTES))


@pytest.mark.parametrize(
    ("document", "call"),
    [
        ({"call": 7}, 7),
        ({"call": "x"}, -1),
        ({"call": None}, -1),
        ({}, -1),
        ([1], -1),
        (3, -1),
    ],
)
def test_call_of_a_bad_frame(document, call):
    assert peek_call([GREETING, msgspec.msgpack.encode(document)]) == call


@pytest.mark.parametrize("frames", [[], [b""], [b"\xc1"], [GREETING, b"\x91" * 10**5]])
def test_call_of_garbage(frames):
    assert peek_call(frames) == -1


@pytest.mark.parametrize(
    "endpoint",
    ["ipc:///tmp/x", "tcp://127.0.0.1:*", "tcp://localhost:80", "tcp://[::1]:9"],
)
def test_endpoints_of_this_machine(endpoint):
    check_bindable(endpoint)


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://*:80", "tcp://0.0.0.0:80", "tcp://10.0.0.1:80", "tcp://[::]:80",
     "tcp://127.0.0.1", "inproc://x", "", "udp://127.0.0.1:1", "tcp://example.org:1",
     "tcp://127.example.org:1"],
)  # fmt: skip
def test_endpoints_beyond_this_machine_are_refused(endpoint):
    with pytest.raises(CommandRejected):
        check_bindable(endpoint)


def test_pool_directory_and_endpoint(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_RESIDENT_DIR", "/short")
    assert str(pool_directory("p")) == "/short/p"
    assert controller_endpoint("p") == "ipc:///short/p/controller.sock"
    monkeypatch.delenv("VLLM_RESIDENT_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/me")
    assert str(pool_directory("p")) == "/run/me/vllm-resident/p"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parent = tmp_path / f"vllm-resident-{os.getuid()}"
    for _ in range(2):
        assert pool_directory("p") == parent / "p"
        assert stat.S_IMODE(parent.stat().st_mode) == 0o700


def of_another_user(folder):
    folder.mkdir(mode=0o700)
    if os.getuid() != 0:
        pytest.skip("only root gives folders away")
    os.chown(folder, 65534, -1)


def open_to_others(folder):
    folder.mkdir()
    folder.chmod(0o777)


def a_link(folder):
    (folder.parent / "theirs").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "theirs")


def a_file(folder):
    folder.touch(mode=0o600)


@pytest.mark.parametrize("make", [of_another_user, open_to_others, a_link, a_file])
def test_a_folder_that_others_have_made_is_not_the_pools(monkeypatch, tmp_path, make):
    """In the temporary folder anybody may come first: neither a pool nor its clients
    (and so no rank) go there."""
    for name in ("VLLM_RESIDENT_DIR", "XDG_RUNTIME_DIR", ENDPOINT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make(tmp_path / f"vllm-resident-{os.getuid()}")
    with pytest.raises(CommandRejected, match="not this user's alone"):
        pool_directory("p")
    with pytest.raises(CommandRejected, match="VLLM_RESIDENT_DIR"):
        resolve_endpoint(None, "p")
    # Where the operator says so, it is the operator's to know.
    monkeypatch.setenv("VLLM_RESIDENT_DIR", str(tmp_path))
    assert resolve_endpoint(None, "p") == f"ipc://{tmp_path}/p/controller.sock"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "x" * 33, "a b", "a\n"])
def test_pool_names_that_are_no_folder_names(name):
    with pytest.raises(CommandRejected):
        pool_directory(name)


def test_socket_path_too_long_for_the_kernel(tmp_path):
    with pytest.raises(CommandRejected, match="VLLM_RESIDENT_DIR"):
        unix_endpoint(tmp_path / ("x" * 120))


def test_pool_folder_is_for_its_user_only(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    ensure_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(ensure_private(tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_host_id_names_the_kernel_and_the_pid_namespace():
    boot_id, namespace = host_id().split(":")
    assert len(boot_id) == 36
    assert int(namespace) == os.stat("/proc/self/ns/pid").st_ino


def test_sockets_do_not_linger_and_routers_miss_nobody_silently():
    context = zmq.Context()
    try:
        router = open_socket(context, zmq.ROUTER)
        assert router.getsockopt(zmq.LINGER) == 0
        with pytest.raises(zmq.ZMQError) as unreachable:
            router.send_multipart([b"nobody", b"x"])
        assert unreachable.value.errno == zmq.EHOSTUNREACH
        router.close()
    finally:
        context.destroy()
