"""Frontends attached to the leaders of engines: calls that stay open.

Not among the client's commands: only a process that listens as vLLM's `AsyncLLM` does
has a use for it. Knows the pool's messages and nothing of frontends.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from vllm_resident.client.connection import Connection, OnProgress, expect
from vllm_resident.keys import PoolKey
from vllm_resident.messages import AttachFrontend, FrontendAttached, FrontendDetached

# The leader may be in the middle of a build.
ATTACH_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0


class Attachments:
    """Makes attachments over a connection of its own; of one event loop."""

    def __init__(self, endpoint: str, key: PoolKey | None = None) -> None:
        self.connection = Connection(endpoint, CONNECT_TIMEOUT_S, key)

    async def attach(
        self,
        engine: str,
        input_address: str,
        output_address: str,
        on_progress: OnProgress,
    ) -> AsyncGenerator[FrontendAttached | FrontendDetached]:
        """Attach a frontend to the engine's leader: an `AsyncLLM` that is given these
        as its `client_addresses`, before or after.

        Yields `FrontendAttached` once the leader has connected; then, when it ends
        because the engine was unloaded, `FrontendDetached`, or raises what the engine
        failed of. `on_progress` hears the engine's phase each second and whenever it
        changes. Leaving the iterator detaches.
        """
        command = AttachFrontend(
            call=self.connection.next_call(),
            engine=engine,
            input_address=input_address,
            output_address=output_address,
            timeout_s=ATTACH_TIMEOUT_S,
        )
        replies = self.connection.replies(command, float("inf"), on_progress)
        async with contextlib.aclosing(replies):
            async for reply in replies:
                if isinstance(reply, FrontendAttached):
                    yield reply
                else:
                    yield expect(FrontendDetached, reply)

    async def close(self) -> None:
        """Detach all that is attached. No-op if already closed."""
        await self.connection.close()
