"""The OpenAI servers that take turns in `benchmarks.serve`: the gateway and plain vLLM.

Each is up all the time and idle while another is asked; all are on the same cores,
which the callers share with them.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from benchmarks.contenders import Pool, Resources
from benchmarks.plain import PlainServer, free_port
from vllm_resident import Client, ResidentError
from vllm_resident.cli import gateway

READY_TIMEOUT_S = 300.0


class GatewayServer(Resources):
    """A pool of `num_ranks` with its gateway; what is loaded into it is the caller's
    to say, through `client`, or pool.toml's, `config`. `pid` is the gateway's."""

    label = "gateway"

    def __init__(
        self, num_ranks: int, *, config: Path | None = None, title: str = "serve"
    ) -> None:
        super().__init__()
        self._pool = Pool(num_ranks, title, config)

    def __enter__(self) -> Self:
        pool = self.stack.enter_context(self._pool)
        try:
            self.client: Client = pool.client
            process = gateway.start(
                self.client.status().pool,
                f"127.0.0.1:{free_port()}",
                self.client.endpoint,
                api_key=None,
                owner_pid=os.getpid(),
                detach=False,
            )
            self.stack.callback(process.end)
            process.wait_listening(READY_TIMEOUT_S)
        except BaseException:
            self.stack.close()  # nobody will leave what was not entered
            raise
        self.url = process.url
        self.pid = process.process.pid
        return self


def interruptible(main: Callable[[], int]) -> int:
    """`main`'s exit status; whoever asks this process to end gets what it started ended
    first. Python leaves SIGINT ignored where a shell started it in the background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    except ResidentError as error:
        print(f"the pool failed: {error}", file=sys.stderr)
        return 1


class VllmServer(Resources):
    """`vllm.entrypoints.openai.api_server` as installed. `bind`: its workers' cores."""

    def __init__(
        self, name: str, model: str, engine_args: dict[str, Any], bind: str
    ) -> None:
        super().__init__()
        self.label = f"vllm, cores {bind}"
        self._what = (name, model, engine_args)
        self._bind = bind

    def __enter__(self) -> Self:
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            server = PlainServer(*self._what, bind=self._bind, folder=folder)
            self.stack.enter_context(server)
            server.wait_ready(READY_TIMEOUT_S)
        except BaseException:
            self.stack.close()
            raise
        self.url = server.url
        return self
