"""Calls for models that are not awake: announced to the pool, which decides when each
has its turn; and what was served without asking, reported.

Knows the pool's messages and nothing of HTTP.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping

from vllm_resident.client.connection import Connection
from vllm_resident.errors import ProtocolError
from vllm_resident.messages import (
    AwaitEngine,
    EngineAwake,
    EngineRefused,
    ModelCalls,
    ReportCalls,
)


class Turns:
    """Over a connection that is shared with the attachments, so that a model's phase is
    heard before those who wait for it are called; of one event loop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def wait(
        self, model: str, waited_s: float = 0.0, *, is_held: bool = False
    ) -> AsyncGenerator[EngineAwake | EngineRefused]:
        """Yields once: when the model is up, or when it is known that it will not be.
        Until the iterator is left the call counts as one of the model's requests.

        `waited_s` is how long it has waited before; one that `is_held` waits with the
        engine's leader. Raises a `ResidentError` where the pool stops or does not
        answer.
        """
        command = AwaitEngine(
            call=self._connection.next_call(),
            engine=model,
            waited_s=waited_s,
            is_held=is_held,
        )
        replies = self._connection.replies(command, float("inf"))
        async with contextlib.aclosing(replies):
            async for reply in replies:
                if not isinstance(reply, EngineAwake | EngineRefused):
                    raise ProtocolError(f"{type(reply).__name__} answers no turn")
                yield reply

    async def report(self, models: Mapping[str, ModelCalls]) -> None:
        """Tell the pool what was served. Not answered, and not waited for."""
        call = self._connection.next_call()
        await self._connection.tell(ReportCalls(call=call, models=dict(models)))
