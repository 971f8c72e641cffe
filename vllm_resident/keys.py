"""The pool's key: what lets processes of several machines talk to each other.

One CURVE key pair in a file that only its owner may read, the same file on every
machine. Listeners prove with it that they are the pool's, and take peers that hold it
too; what goes over the network is encrypted and authenticated by libzmq. Knows sockets
and nothing of messages.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from vllm_resident.errors import CommandRejected

KEY_FILE_VARIABLE = "VLLM_RESIDENT_KEY_FILE"
# As libzmq writes keys: 32 bytes in Z85.
_NUM_CHARACTERS = 40
# A machine that was switched off says nothing; without a question nobody would know.
_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 10_000


@dataclass(frozen=True)
class PoolKey:
    """Both halves, in Z85. Whoever holds them may do all that the pool can."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "PoolKey(...)"


def create(path: Path) -> None:
    """Write a new key to `path`, which must not be there; only its owner may read it.

    Raises `CommandRejected` where that cannot be.
    """
    public, secret = zmq.curve_keypair()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise CommandRejected(f"no key was written to {path}: {error}") from error
    with os.fdopen(fd, "wb") as file:
        file.write(public + b"\n" + secret + b"\n")


def read(path: str | Path) -> PoolKey:
    """The key in the file `path`; `CommandRejected` if that is none, or others may
    read it."""
    try:
        mode = os.stat(path).st_mode
        lines = Path(path).read_bytes().split()
    except OSError as error:
        raise CommandRejected(f"the pool's key cannot be read: {error}") from error
    if mode & 0o077:
        raise CommandRejected(
            f"others may read {path}: chmod 600 it, or make a new key"
        )
    if len(lines) != 2 or {len(line) for line in lines} != {_NUM_CHARACTERS}:
        raise CommandRejected(
            f"{path} holds no key: `vllm-resident key FILE` writes one"
        )
    key = PoolKey(*lines)
    if zmq.curve_public(key.secret) != key.public:
        raise CommandRejected(f"the two halves of the key in {path} are of two keys")
    return key


def of_environment() -> PoolKey | None:
    """The key that the environment names, if it names one."""
    path = os.environ.get(KEY_FILE_VARIABLE)
    return read(path) if path else None


def lock(socket: zmq.Socket[Any], key: PoolKey | None, *, listens: bool) -> None:
    """Before a TCP socket binds or connects: with a key, only peers that hold it too.
    The context of one that listens must be `guarded`."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    if key is None:
        return
    socket.curve_publickey = key.public
    socket.curve_secretkey = key.secret
    if listens:
        socket.curve_server = True
    else:
        socket.curve_serverkey = key.public


@contextlib.contextmanager
def guarded(context: zmq.Context[Any], key: PoolKey | None) -> Iterator[None]:
    """While entered, sockets of `context` that listen under `key` turn away whoever
    does not hold it. Has a thread, if there is a key."""
    if key is None:
        yield
        return
    guard = ThreadAuthenticator(context)
    guard.configure_curve_callback("*", credentials_provider=_OnlyHolders(key))
    guard.start()
    try:
        yield
    finally:
        guard.stop()


class _OnlyHolders:
    """As libzmq's authenticator asks: may a peer with this public key come in?"""

    def __init__(self, key: PoolKey) -> None:
        self._key = key

    def callback(self, _domain: str, public: bytes) -> bool:
        return public == self._key.public
