"""`up --http`: one gateway process beside the pool, ended before it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from vllm_resident import transport
from vllm_resident.errors import CommandRejected, ResidentError
from vllm_resident.launch import POLL_INTERVAL_S, spawn

# It lets what it answers go on for ten seconds.
END_TIMEOUT_S = 20.0
_LOG_TAIL_LINES = 15


class GatewayProcess:
    """A gateway that was started here; `url` is what OpenAI clients call the base."""

    def __init__(
        self, process: subprocess.Popen[bytes], host: str, port: int, log: Path
    ) -> None:
        self.process = process
        self.log = log
        self._address = (host, port)
        bracketed = f"[{host}]" if ":" in host else host
        self.url = f"http://{bracketed}:{port}/v1"

    def wait_listening(self, timeout_s: float) -> None:
        """Wait until it takes connections. Raises `ResidentError` when it ends first,
        or does not within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (status := self.process.poll()) is not None:
                raise ResidentError(
                    f"the gateway ended with status {status}; the end of {self.log}:\n"
                    f"{self._tail()}"
                )
            with (
                contextlib.suppress(OSError),
                socket.create_connection(self._address, timeout=1.0),
            ):
                return
            time.sleep(POLL_INTERVAL_S)
        raise ResidentError(
            f"the gateway did not listen within {timeout_s:g} s: see {self.log}"
        )

    def end(self) -> None:
        """Stop it in order, by force if it does not. No-op if it has ended."""
        self.process.terminate()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


def check(http: str, api_key: str | None) -> tuple[str, int]:
    """The host and port to listen at; raises what is wrong with them, before anything
    is started."""
    host, port = transport.parse_http_address(http)
    is_open = not (api_key or os.environ.get("VLLM_API_KEY"))
    if is_open and not transport.is_loopback(host):
        raise CommandRejected(
            f"{http} listens beyond this machine: give it an --api-key"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CommandRejected(f"cannot listen at {http}: {error}") from error
    return host, port


def start(
    pool: str,
    http: str,
    controller: str,
    *,
    api_key: str | None,
    owner_pid: int,
    detach: bool,
) -> GatewayProcess:
    """Start one; returns at once. It ends when the process `owner_pid` does and,
    unless detached, with this one."""
    host, port = transport.parse_http_address(http)
    log = transport.pool_directory(pool) / "logs" / "gateway.log"
    environment = dict(os.environ)
    if api_key:
        # Arguments of a process are for all to see.
        environment["VLLM_API_KEY"] = api_key
    command = [
        *(sys.executable, "-m", "vllm_resident.gateway", "--pool", pool),
        *("--controller", controller, "--http", http, "--owner-pid", str(owner_pid)),
    ]
    with log.open("ab") as output:
        process = spawn(command, output, environment, detach=detach)
    return GatewayProcess(process, host, port, log)
