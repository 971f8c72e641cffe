"""One ZMQ channel for commands: frames, versions, size limits, endpoints.

A message is two frames: the protocol's name and version, then one msgpack document.
Listeners are ROUTER, peers are DEALER. Nothing here knows what a message means, and
nothing here waits: callers poll with deadlines of their own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket as sockets
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from vllm_resident import keys
from vllm_resident.errors import CommandRejected, ProtocolError
from vllm_resident.keys import PoolKey
from vllm_resident.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION

GREETING = b"vllm-resident/%d" % PROTOCOL_VERSION
# Linux: sun_path holds 108 bytes with its terminator.
MAX_SOCKET_PATH_BYTES = 107
# Far above any stream's natural backlog; a peer that does not read reaches it and is
# cut off instead of growing the sender's memory.
SEND_QUEUE_MESSAGES = 10_000

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> list[bytes]:
    """The frames of `message`; `ProtocolError` if it is larger than the limit."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} of {len(payload)} bytes is over the limit of "
            f"{MAX_MESSAGE_BYTES} bytes: send fewer prompts in one call"
        )
    return [GREETING, payload]


class Decoder(Generic[T]):
    """Turns frames into messages of one union; every failure is a `ProtocolError`."""

    def __init__(self, union: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)

    def decode(self, frames: Sequence[bytes]) -> T:
        if len(frames) != 2:
            raise ProtocolError(f"expected 2 frames, got {len(frames)}")
        greeting, payload = frames
        if greeting != GREETING:
            raise ProtocolError(
                f"peer speaks {greeting[:40]!r}, this side speaks "
                f"{GREETING.decode()!r}: install the same vllm-resident on both sides"
            )
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"frame of {len(payload)} bytes is over the limit of "
                f"{MAX_MESSAGE_BYTES} bytes"
            )
        try:
            return self._decoder.decode(payload)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message: {error}") from error


def peek_call(frames: Sequence[bytes]) -> int:
    """The call number of a frame that failed to decode, or -1, to answer it by."""
    try:
        document = msgspec.msgpack.decode(frames[-1])
        return int(document["call"])
    except (
        msgspec.DecodeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        UnicodeDecodeError,
        RecursionError,
    ):
        return -1


def open_socket(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    """A socket with this project's limits; never lingers at close."""
    socket: zmq.Socket[Any] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    # libzmq cuts a peer off silently above this; `Decoder` answers first up to there.
    socket.setsockopt(zmq.MAXMSGSIZE, 4 * MAX_MESSAGE_BYTES)
    if kind == zmq.ROUTER:
        # Sending to a peer that is gone raises instead of dropping: that is how a
        # vanished client shows.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket


def bind(socket: zmq.Socket[Any], endpoint: str, key: PoolKey | None = None) -> str:
    """Listen at `endpoint`; returns where that is, exactly. With a key, TCP is for
    those that hold it (the context must be `keys.guarded`); `zmq.ZMQError` where it
    cannot be."""
    if is_tcp(endpoint):
        keys.lock(socket, key, listens=True)
    socket.bind(endpoint)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: zmq.Socket[Any], endpoint: str, key: PoolKey | None = None) -> None:
    """The other side of `bind`. Returns at once, whether anybody listens or not."""
    if is_tcp(endpoint):
        keys.lock(socket, key, listens=False)
    socket.connect(endpoint)


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def own_address(endpoint: str) -> str:
    """The address under which the machine that listens at `endpoint` (tcp://) sees this
    one: `VLLM_HOST_IP`, vLLM's own variable for it, or that of the way there."""
    if address := os.environ.get("VLLM_HOST_IP"):
        return address
    host, port = _host_and_port(endpoint)
    try:
        family, kind, _, _, there = sockets.getaddrinfo(
            host, int(port), type=sockets.SOCK_DGRAM
        )[0]
        with sockets.socket(family, kind) as probe:
            probe.connect(there)  # nothing is sent
            own: str = probe.getsockname()[0]
            return own
    except OSError as error:
        raise CommandRejected(
            f"no way from here to {endpoint}: {error}; VLLM_HOST_IP says which address "
            "of this machine others reach"
        ) from error


def tcp_endpoint(address: str) -> str:
    """Of a listener at `address` that takes any free port."""
    return f"tcp://[{address}]:*" if ":" in address else f"tcp://{address}:*"


def host_id() -> str:
    """Equal in two processes exactly when they share a kernel and a pid namespace,
    so that a pid of the one means the same process to the other (Linux)."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}:{os.stat('/proc/self/ns/pid').st_ino}"


def pool_directory(pool: str) -> Path:
    """Where the pool called `pool` keeps its sockets, state and logs on this machine.

    `VLLM_RESIDENT_DIR` names the parent; by default it is in `XDG_RUNTIME_DIR`, else in
    the temporary folder under the user's number. There, where everybody may make
    folders, it is made if missing; raises `CommandRejected` if it is another's.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", pool):
        raise CommandRejected(
            f"pool name {pool!r}: use 1 to 32 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    if parent := os.environ.get("VLLM_RESIDENT_DIR"):
        return Path(parent) / pool
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "vllm-resident" / pool
    own = Path(tempfile.gettempdir()) / f"vllm-resident-{os.getuid()}"
    _take_for_own(own)
    return own / pool


def _take_for_own(folder: Path) -> None:
    """Whoever else could write to it could put another socket in the place of the
    controller's, and get its clients' prompts and its ranks' ears."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise CommandRejected(
            f"{folder} cannot be made: {error}; set VLLM_RESIDENT_DIR to a folder of "
            "yours"
        ) from error
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_own or status.st_mode & 0o022:
        raise CommandRejected(
            f"{folder} is not this user's alone ({stat.filemode(status.st_mode)}, of "
            f"user {status.st_uid}), so that others may answer for its pools: remove "
            "it, or set VLLM_RESIDENT_DIR to a folder of yours"
        )


def ensure_private(directory: Path) -> Path:
    """Create `directory` with mode 0700; refuse one that others may enter."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.stat()
    if status.st_uid != os.getuid():
        raise CommandRejected(f"{directory} belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        directory.chmod(0o700)
    return directory


def unix_endpoint(path: Path) -> str:
    """`ipc://` endpoint of a socket file; refuses a path the kernel cannot hold."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise CommandRejected(
            f"socket path {path} is longer than {MAX_SOCKET_PATH_BYTES} bytes: "
            "set VLLM_RESIDENT_DIR to a shorter folder"
        )
    return f"ipc://{path}"


def controller_endpoint(pool: str) -> str:
    """Endpoint of the pool's embedded controller on this machine."""
    return unix_endpoint(pool_directory(pool) / "controller.sock")


def check_bindable(endpoint: str, *, has_key: bool = False) -> None:
    """Refuse an endpoint that would listen beyond this machine without a key."""
    if endpoint.startswith("ipc://"):
        return
    host, _ = _host_and_port(endpoint)
    if not (has_key or re.fullmatch(r"localhost|::1|127(\.\d{1,3}){3}", host)):
        raise CommandRejected(
            f"endpoint {endpoint!r} listens beyond this machine, which takes a key: "
            "`vllm-resident key FILE` makes one, --key-file or "
            f"{keys.KEY_FILE_VARIABLE} names it"
        )


def _host_and_port(endpoint: str) -> tuple[str, str]:
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:]+):(\d+|\*)", endpoint)
    if match is None:
        raise CommandRejected(
            f"endpoint {endpoint!r}: use ipc:///path/to.sock or tcp://127.0.0.1:PORT"
        )
    return match[1].strip("[]"), match[2]


def parse_http_address(text: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT, or :PORT on loopback; raises `CommandRejected`."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s\[\]]*):(\d{1,5})", text)
    if found is None or int(found[2]) > 65535:
        raise CommandRejected(
            f"HTTP address {text!r}: it is HOST:PORT, such as 127.0.0.1:8000"
        )
    return found[1].strip("[]") or "127.0.0.1", int(found[2])


def is_loopback(host: str) -> bool:
    """Whether a host's name or number, as written, is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
