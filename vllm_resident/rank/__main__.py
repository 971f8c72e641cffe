"""One rank of a pool: `torchrun --nproc-per-node N -m vllm_resident.rank`.

What torchrun starts is the rank's supervisor. The rank itself prepares its process
(cores, logs, environment) before torch is imported, joins the pool's controller or
starts an embedded one, and runs the command loop.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vllm_resident import process_arguments, transport
from vllm_resident.config import read_pool
from vllm_resident.errors import ResidentError
from vllm_resident.keys import PoolKey
from vllm_resident.rank import supervisor
from vllm_resident.rank.device import Device, roaming
from vllm_resident.rank.prepare import prepare_process
from vllm_resident.rank.rpc import SocketFolder

log = logging.getLogger("vllm_resident.rank")

STORE_TIMEOUT_S = 300.0
CONTROLLER_START_S = 60.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m vllm_resident.rank",
        description="One resident rank. Start one per device with torchrun or any "
        "launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; "
        "then command the pool with `vllm-resident` or the Python client.",
    )
    parser.add_argument(
        "--controller",
        metavar="ENDPOINT",
        default=os.environ.get("VLLM_RESIDENT_CONTROLLER"),
        help="join the controller at this ZMQ endpoint; without it global rank 0 "
        "starts one that ends with the pool",
    )
    process_arguments.add_pool(parser)
    process_arguments.add_config(parser, ", for the controller that rank 0 starts")
    process_arguments.add_key_file(parser)
    parser.add_argument(
        "--no-supervisor",
        dest="supervisor",
        action="store_false",
        help="be the rank itself: when it dies, torchrun restarts all ranks. Without "
        "this, a process beside each rank starts it anew, alone",
    )
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse_arguments()
    missing = [
        name
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        _say(f"{', '.join(missing)} not set: start ranks with torchrun")
        return 2
    try:
        directory = transport.ensure_private(transport.pool_directory(arguments.pool))
        endpoint = arguments.controller or _embedded_endpoint(arguments.pool)
        key = process_arguments.read_key(arguments)
    except ResidentError as error:
        _say(str(error))
        return 2
    if arguments.supervisor:
        pool = supervisor.LaunchedPool(directory / "pool.json")
        return supervisor.supervise(supervisor.rank_command(), _say, pool.has_stopped)
    rank = int(os.environ["RANK"])
    terminal = _log_to_file(directory / "logs" / f"rank-{rank}.log")
    try:
        device = prepare_process(
            int(os.environ["LOCAL_RANK"]),
            int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
        )
    except ResidentError as error:
        _say(str(error), terminal)
        return 2
    if not arguments.controller and rank == 0:
        try:
            _start_controller(arguments.pool, directory, arguments.config)
        except ResidentError as error:
            _say(str(error), terminal)
            return 2
    sockets = SocketFolder(directory, rank)
    try:
        status = _run(rank, device, endpoint, key, directory, terminal, sockets)
    # Whatever keeps this rank from starting: the person at the terminal sees no log.
    except Exception as error:
        log.exception("event=failed rank=%d", rank)
        _say(f"rank {rank}: {type(error).__name__}: {error}", terminal)
        status = 1
    sockets.remove()
    logging.shutdown()
    # Static destructors of communicators may wait for peers that are already gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _say(text: str, terminal: int = 2) -> None:
    """One line to the person at the terminal, wherever this process's output goes."""
    os.write(terminal, f"vllm_resident.rank: {text}\n".encode())


def _embedded_endpoint(pool: str) -> str:
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise ResidentError(
            "a pool on several machines needs a controller all of them reach: start "
            "`python -m vllm_resident.controller --bind ENDPOINT` and pass --controller"
        )
    return transport.controller_endpoint(pool)


def _log_to_file(path: Path) -> int:
    """Send this process's output, C++ included, to `path`; returns a descriptor of the
    terminal for the few lines a person should see."""
    path.parent.mkdir(exist_ok=True, mode=0o700)
    terminal = os.dup(2)
    os.set_inheritable(terminal, False)
    log_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    os.close(log_file)
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    return terminal


def _start_controller(pool: str, directory: Path, config: str | None) -> None:
    """Start the embedded controller, a process of its own that ends with the launcher;
    wait until it, or the one from before a restart of the ranks, has the pool.

    Raises `ResidentError` when another launcher's pool keeps the name, or the pool.toml
    is wrong.
    """
    if config:
        read_pool(
            config
        )  # the person at the terminal does not see the controller's log
    launcher = supervisor.launcher_pid()
    deadline = time.monotonic() + CONTROLLER_START_S
    process: subprocess.Popen[bytes] | None = None
    while time.monotonic() < deadline:
        if _pool_owner(directory) == launcher:
            return
        if process is None or process.poll() is not None:
            process = _spawn_controller(pool, launcher, directory, config)
        time.sleep(0.1)
    raise ResidentError(
        f"no controller took the pool {pool!r} within {CONTROLLER_START_S:g} s: "
        "another pool of that name is up, or see "
        f"{directory / 'logs' / 'controller.log'}"
    )


def _pool_owner(directory: Path) -> int | None:
    """The launcher's pid that the pool's living controller was started for."""
    try:
        state = json.loads((directory / "pool.json").read_text())
        os.kill(state["pid"], 0)
        return int(state["owner_pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _spawn_controller(
    pool: str, launcher: int, directory: Path, config: str | None
) -> subprocess.Popen[bytes]:
    with (
        open(directory / "logs" / "controller.log", "a", encoding="utf-8") as output,
        roaming(),
    ):
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vllm_resident.controller",
                "--pool",
                pool,
                "--owner-pid",
                str(launcher),
                *(["--config", config] if config else []),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _run(
    rank: int,
    device: Device,
    endpoint: str,
    key: PoolKey | None,
    directory: Path,
    terminal: int,
    sockets: SocketFolder,
) -> int:
    since = time.monotonic()
    from vllm_resident.rank.boot import boot

    loop, control = boot(
        rank, device, endpoint, key, directory, STORE_TIMEOUT_S, sockets
    )
    # The control thread acts on the wake-up byte; Python's handlers run on the main
    # thread, which may be inside a collective that never ends.
    signal.set_wakeup_fd(control.signal_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Ctrl-C reaches the whole foreground group; the launcher decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control.start()
    seconds = time.monotonic() - since
    _say(
        f"rank {rank}: pid {os.getpid()}, {device.name}, up in {seconds:.1f} s",
        terminal,
    )
    return loop.run()


if __name__ == "__main__":
    sys.exit(main())
