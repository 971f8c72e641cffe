"""`python -m vllm_resident.controller`: one controller process for one pool.

Holds the pool's lock for life, says in `pool.json` where it listens, and takes both
its socket and that file away when it ends; the file stays where it was not stopped in
order, and ranks wait for another. Exit status: 0 stopped in order, 1 its own failure,
2 wrong arguments, 3 another controller has the pool.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path

import zmq

from vllm_resident import process_arguments
from vllm_resident.config import CallLimits, PoolConfig, read_pool
from vllm_resident.controller.policy import Limits
from vllm_resident.controller.pool import new_pool
from vllm_resident.controller.service import Service
from vllm_resident.controller.usage import Demand
from vllm_resident.errors import ResidentError
from vllm_resident.journal import Journal
from vllm_resident.transport import (
    check_bindable,
    controller_endpoint,
    ensure_private,
    host_id,
    pool_directory,
)

logger = logging.getLogger("vllm_resident.controller")

STATUS_USAGE = 2
STATUS_POOL_TAKEN = 3


class PoolTaken(Exception):
    """Another controller holds the pool's lock."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_resident.controller",
        description="The process that owns the state of one pool of ranks. It needs "
        "neither torch nor vLLM. The first rank of a pool starts one by itself; start "
        "it by hand to keep it apart from the launch of the ranks.",
        epilog="Then: torchrun --nproc-per-node 2 -m vllm_resident.rank "
        "--controller ENDPOINT. Exit status 3: the pool has a controller already.",
    )
    process_arguments.add_pool(parser)
    parser.add_argument(
        "--bind", metavar="ENDPOINT",
        help="ipc:///path/to.sock, or tcp://127.0.0.1:PORT (* takes a free port), or "
        "with a key any address; "
        "default: controller.sock in the pool's folder, which only this user may enter",
    )  # fmt: skip
    process_arguments.add_key_file(parser)
    process_arguments.add_config(parser)
    process_arguments.add_owner_pid(parser)
    parser.add_argument(
        "--heartbeat-timeout", type=float, default=4.0, metavar="S",
        help="a rank of another host that is silent for so many seconds is lost; the "
        "death of one on this host is seen at once (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.heartbeat_timeout >= 1:
        parser.error("--heartbeat-timeout: ranks report every second, give at least 1")
    return options


def take_lock(directory: Path) -> int:
    """Lock the pool for the life of this process, however it ends (flock(2)).

    Returns the descriptor to keep; `PoolTaken` names the holder.
    """
    fd = os.open(directory / "controller.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise PoolTaken(
            f"{directory} belongs to the running controller with pid {holder}: use "
            "that one, shut it down, or give this pool another --pool NAME"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def check_unused(endpoint: str) -> None:
    """Refuse a socket file somebody listens on: libzmq would take it away."""
    if not endpoint.startswith("ipc://"):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(endpoint.removeprefix("ipc://"))
        except OSError:
            return
    raise PoolTaken(f"somebody listens on {endpoint} already: give another --bind")


def write_pool_file(path: Path, content: dict[str, object]) -> None:
    """Atomic: a reader sees the old file or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)


def demand_of(config: PoolConfig) -> Demand:
    """What pool.toml says of calls for models that are not awake."""
    return Demand(
        limits={name: _limits(each) for name, each in config.limits.items()},
        default_limits=_limits(config.default_limits),
        min_residency_s=config.min_residency_s,
        drain_s=config.drain_s,
    )


def _limits(limits: CallLimits) -> Limits:
    return Limits(limits.max_queue, limits.max_wait_s, limits.idle_ttl_s)


def serve(options: argparse.Namespace) -> int:
    """Run one controller until it is told to end; returns the exit status."""
    config = read_pool(options.config) if options.config else PoolConfig()
    directory = ensure_private(pool_directory(options.pool))
    endpoint = options.bind or controller_endpoint(options.pool)
    key = process_arguments.read_key(options)
    check_bindable(endpoint, has_key=key is not None)
    lock = take_lock(directory)
    check_unused(endpoint)
    session = secrets.token_hex(4)
    pool = new_pool(
        name=options.pool,
        session=session,
        host_id=host_id(),
        controller_pid=os.getpid(),
        heartbeat_timeout_s=options.heartbeat_timeout,
        now=time.monotonic(),
    )
    state = pool.state
    state.models, state.start_up = config.models, config.start
    state.host_memory_bytes = config.host_memory_bytes
    state.device_memory_bytes = config.device_memory_bytes
    state.awake_per_rank = config.awake_per_rank
    state.frontend_args = config.frontend_args
    state.num_communicators = config.num_communicators
    state.communicator_memory_bytes = config.communicator_memory_bytes
    state.demand = demand_of(config)
    state.owner_pid = options.owner_pid
    state.has_key = key is not None
    service = Service(pool, endpoint, Journal(directory), options.owner_pid, key)
    pool_file = directory / "pool.json"
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.ask_stop())
        content = {
            "pid": os.getpid(),
            "endpoint": service.endpoint,
            "session": session,
            "owner_pid": options.owner_pid,
        }
        write_pool_file(pool_file, content)
        logger.info("event=listening pool=%s endpoint=%s session=%s",
                     options.pool, service.endpoint, session)  # fmt: skip
        status = service.run()
        if status == 0:
            pool_file.unlink(missing_ok=True)
        return status
    finally:
        service.close()
        if service.endpoint.startswith("ipc://"):
            Path(service.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        os.close(lock)


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s"
    )
    try:
        return serve(options)
    except PoolTaken as error:
        logger.error("%s", error)
        return STATUS_POOL_TAKEN
    except ProcessLookupError:
        logger.error("owner pid %s does not run", options.owner_pid)
        return STATUS_USAGE
    except (ResidentError, zmq.ZMQError, OSError) as error:
        logger.error("cannot start: %s", error)
        return STATUS_USAGE


if __name__ == "__main__":
    sys.exit(main())
