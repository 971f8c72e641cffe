"""The pool's key: files, and sockets that let in only those who hold it."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from vllm_resident import keys, transport
from vllm_resident.errors import CommandRejected
from vllm_resident.keys import PoolKey

COMES_MS = 20_000
# What does not come at all has to be waited for.
STAYS_AWAY_MS = 300


@pytest.fixture
def key(tmp_path: Path) -> PoolKey:
    keys.create(tmp_path / "pool.key")
    return keys.read(tmp_path / "pool.key")


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_a_key_is_for_its_owner_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "pool.key"
    keys.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(CommandRejected, match="no key was written"):
        keys.create(path)
    assert path.read_bytes() == before
    assert keys.read(path).secret.decode() not in repr(keys.read(path))


def test_two_keys_differ(tmp_path: Path) -> None:
    for name in ("one", "other"):
        keys.create(tmp_path / name)
    assert keys.read(tmp_path / "one") != keys.read(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"a b", b"x" * 81, b"x" * 40 + b"\n" * 2])
def test_what_is_no_key_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pool.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(CommandRejected, match="holds no key"):
        keys.read(path)


def test_halves_of_two_keys_are_told(tmp_path: Path) -> None:
    halves = [zmq.curve_keypair()[0], zmq.curve_keypair()[1]]
    path = tmp_path / "pool.key"
    path.write_bytes(b"\n".join(halves))
    path.chmod(0o600)
    with pytest.raises(CommandRejected, match="two halves"):
        keys.read(path)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool.key"
    keys.create(path)
    path.chmod(0o640)
    with pytest.raises(CommandRejected, match="others may read"):
        keys.read(path)
    with pytest.raises(CommandRejected, match="cannot be read"):
        keys.read(tmp_path / "absent")


def test_the_environment_may_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(keys.KEY_FILE_VARIABLE, raising=False)
    assert keys.of_environment() is None
    keys.create(tmp_path / "pool.key")
    monkeypatch.setenv(keys.KEY_FILE_VARIABLE, str(tmp_path / "pool.key"))
    assert keys.of_environment() == keys.read(tmp_path / "pool.key")


def test_holders_of_the_key_hear_each_other(
    key: PoolKey, context: zmq.Context[Any]
) -> None:
    assert is_heard(context, key, key)


def strangers(key: PoolKey) -> dict[str, PoolKey | None]:
    return {
        "without a key": None,
        "with another key": PoolKey(*zmq.curve_keypair()),
        # As if the public half had been given away.
        "with half the key": PoolKey(key.public, zmq.curve_keypair()[1]),
    }


@pytest.mark.parametrize(
    "who", ["without a key", "with another key", "with half the key"]
)
def test_others_are_not_heard(
    who: str, key: PoolKey, context: zmq.Context[Any]
) -> None:
    assert not is_heard(context, key, strangers(key)[who])


def test_one_that_knows_the_public_half_alone_is_not_heard(
    key: PoolKey, context: zmq.Context[Any]
) -> None:
    """A whole handshake of its own, under the listener's public key."""
    with ExitStack() as stack:
        router, endpoint = listening(context, key, stack)
        stranger = stack.enter_context(transport.open_socket(context, zmq.DEALER))
        public, secret = zmq.curve_keypair()
        stranger.curve_publickey, stranger.curve_secretkey = public, secret
        stranger.curve_serverkey = key.public
        stranger.connect(endpoint)
        stranger.send(b"hello")
        assert not router.poll(STAYS_AWAY_MS)


def test_a_listener_without_the_key_learns_nothing(
    key: PoolKey, context: zmq.Context[Any]
) -> None:
    assert not is_heard(context, None, key)


def listening(
    context: zmq.Context[Any], key: PoolKey | None, stack: ExitStack
) -> tuple[zmq.Socket[Any], str]:
    stack.enter_context(keys.guarded(context, key))
    router = stack.enter_context(transport.open_socket(context, zmq.ROUTER))
    return router, transport.bind(router, "tcp://127.0.0.1:*", key)


def is_heard(
    context: zmq.Context[Any], listener: PoolKey | None, peer: PoolKey | None
) -> bool:
    with ExitStack() as stack:
        router, endpoint = listening(context, listener, stack)
        dealer = stack.enter_context(transport.open_socket(context, zmq.DEALER))
        transport.connect(dealer, endpoint, peer)
        dealer.send(b"hello")
        wait_ms = COMES_MS if listener == peer else STAYS_AWAY_MS
        return bool(router.poll(wait_ms))
