"""`python -m vllm_resident.gateway`: the pool's models over HTTP, in one process.

Exit status: 0 stopped in order, 1 its own failure, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn

from vllm_resident import patching, process_arguments, transport
from vllm_resident.client import AsyncClient
from vllm_resident.client.connection import ENDPOINT_VARIABLE
from vllm_resident.errors import CommandRejected, ResidentError
from vllm_resident.gateway.app import Gateway
from vllm_resident.gateway.asgi import Bodies, Keys
from vllm_resident.gateway.attachment import Attachments
from vllm_resident.gateway.connections import BoundedProtocol, Crowd, max_connections
from vllm_resident.gateway.pool_routes import PoolRoutes
from vllm_resident.gateway.relay import Relay
from vllm_resident.gateway.residents import MakeRelay, Residents
from vllm_resident.gateway.turns import Turns
from vllm_resident.keys import PoolKey
from vllm_resident.transport import is_loopback, parse_http_address

log = logging.getLogger("vllm_resident.gateway")

DEFAULT_ADDRESS = "127.0.0.1:8000"
# A controller that does not answer for so long is not there: callers wait on it.
CONNECT_TIMEOUT_S = 5.0
# A leader has said that it is ready before its frontend is built, or never will: where
# it went away meanwhile vLLM waits ten minutes, and every other build with it.
READY_TIMEOUT_S = 20
# What is being answered when the gateway is told to stop may go on for so long.
GRACE_S = 10


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_resident.gateway",
        description="vLLM's OpenAI-compatible server for every model of a pool, behind "
        "one address: a request goes to the model it names, which is woken or loaded "
        "first if need be. Start a pool with `vllm-resident up`.",
    )
    parser.add_argument(
        "--http",
        metavar="HOST:PORT",
        default=DEFAULT_ADDRESS,
        help="where to listen; beyond loopback only with --api-key "
        "(default: %(default)s)",
    )
    process_arguments.add_pool(parser)
    parser.add_argument(
        "--controller",
        metavar="ENDPOINT",
        help=f"default: ${ENDPOINT_VARIABLE}, else the pool's own",
    )
    process_arguments.add_key_file(parser)
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=None,
        help="a key that inference needs then (Authorization: Bearer KEY); may be "
        "given more than once (default: $VLLM_API_KEY, else none)",
    )
    parser.add_argument(
        "--operator-key",
        metavar="KEY",
        action="append",
        default=None,
        help="a key for /pool and what is below it; without one they answer on "
        "loopback only (default: $VLLM_RESIDENT_OPERATOR_KEY)",
    )
    process_arguments.add_owner_pid(parser)
    options = parser.parse_args(argv)
    options.api_key = _keys(options.api_key, "VLLM_API_KEY")
    options.operator_key = _keys(options.operator_key, "VLLM_RESIDENT_OPERATOR_KEY")
    return options


def _keys(given: list[str] | None, variable: str) -> list[str]:
    """Those that were given, else the environment's; an empty one is none."""
    return [key for key in given or [os.environ.get(variable, "")] if key]


class Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: it would raise a caught signal again
    when it has ended, and that would end this process before it has tidied up.

    `end_streams` is called when it begins to stop: it waits for answers to end.
    """

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_streams = end_streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_streams()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s"
    )
    try:
        host, port = parse_http_address(options.http)
        if not is_loopback(host) and not options.api_key:
            raise CommandRejected(
                f"{options.http} listens beyond this machine: give it an --api-key"
            )
        prepare_imports()
        directory = transport.ensure_private(transport.pool_directory(options.pool))
        key = process_arguments.read_key(options)
    except ResidentError as error:
        sys.stderr.write(f"vllm_resident.gateway: {error}\n")
        return 2
    # vLLM's own server runs on it (0.32.0, entrypoints/launchers/api_server/entry.py).
    import uvloop

    return uvloop.run(_serve(options, host, port, directory, key))


def prepare_imports() -> None:
    """What must be so before torch and vLLM are imported."""
    # As ranks do: both ends must be of the same vLLM.
    os.environ.update(patching.FLAGS)
    # The cores are the ranks': what torch computes here is next to nothing.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(READY_TIMEOUT_S))
    patching.activate()


async def _serve(
    options: argparse.Namespace,
    host: str,
    port: int,
    directory: Path,
    key: PoolKey | None,
) -> int:
    from vllm_resident.gateway.frontend import VLLM_VERSION, VllmFrontend

    # The imports' 600,000 objects stay: a collection that looks through them holds
    # every stream up for a quarter of a second.
    gc.collect()
    gc.freeze()
    async with AsyncClient(
        options.controller,
        pool=options.pool,
        key_file=options.key_file,
        connect_timeout_s=CONNECT_TIMEOUT_S,
    ) as client:
        build = partial(VllmFrontend.build, api_keys=options.api_key)
        attachments = Attachments(client.endpoint, key)
        bodies = Bodies()
        turns = Turns(attachments.connection)
        relay = _relay(client.endpoint, key)
        residents = Residents(turns, attachments, build, directory, relay)
        pool_routes = PoolRoutes(
            client, Keys(options.operator_key), bodies, is_open=is_loopback(host)
        )
        app = Gateway(
            client,
            residents,
            pool_routes,
            Keys(options.api_key),
            bodies,
            VLLM_VERSION,
        )
        server = Server(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                http=partial(BoundedProtocol, crowd=Crowd(max_connections())),
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=GRACE_S,
            ),
            pool_routes.end_streams,
        )
        _stop_on_signals(server)
        with _stop_with(options.owner_pid, server):
            residents.start()
            try:
                log.info("event=listening http=%s:%d pool=%s", host, port, options.pool)
                await server.serve()
            finally:
                await residents.close()
                await attachments.close()
    return 0 if server.started else 1


def _relay(endpoint: str, key: PoolKey | None) -> MakeRelay | None:
    """What makes relays where leaders may be on other machines: the controller is
    reached over TCP, with a key."""
    if key is None or not transport.is_tcp(endpoint):
        return None
    return partial(Relay, address=transport.own_address(endpoint), key=key)


def _stop_on_signals(server: Server) -> None:
    """The first asks it to stop, the second to stop waiting for what it answers."""

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


@contextlib.contextmanager
def _stop_with(pid: int | None, server: Server) -> Iterator[None]:
    """Stop the server when that process ends, if there is one to wait for."""
    if pid is None:
        yield
        return
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(pid)

    def ended() -> None:
        loop.remove_reader(fd)
        server.should_exit = True

    loop.add_reader(fd, ended)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
