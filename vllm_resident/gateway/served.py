"""One model as a gateway knows it, and one call that is with it.

Of one event loop. What is done with them is `residents`'.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from vllm_resident.gateway.asgi import App
from vllm_resident.gateway.problems import Problem
from vllm_resident.messages import ModelCalls


class Frontend(Protocol):
    """One model's server in this process (`frontend.py`)."""

    @property
    def app(self) -> App: ...

    def has_response(self, name: str) -> bool: ...

    async def open(self) -> None: ...

    def fail(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Served:
    """One model, as this gateway knows it."""

    name: str
    # Of its engine, as the controller last said; "" while there is no attachment.
    phase: str = ""
    generation: int = 0
    frontend: Frontend | None = None
    # Other names it is called by: those of its adapters.
    adapters: frozenset[str] = frozenset()
    attachment: asyncio.Task[None] | None = None
    attaching: asyncio.Task[None] | None = None
    num_waiting: int = 0
    visits: set[Visit] = field(default_factory=set)
    last_used: float = field(default_factory=time.monotonic)
    # Since the last report.
    num_begun: int = 0
    num_ended: int = 0
    service_s: float = 0.0
    # How often an engine of it was given up, with whatever was on its way there.
    num_withdrawn: int = 0

    @property
    def is_ready(self) -> bool:
        return self.frontend is not None and self.phase == "ready"

    @property
    def num_in_flight(self) -> int:
        return len(self.visits)

    @property
    def is_wanted(self) -> bool:
        return self.num_waiting + self.num_in_flight > 0

    def take_calls(self) -> ModelCalls:
        """What is to be reported; it is no more then."""
        calls = ModelCalls(self.num_begun, self.num_ended, self.service_s)
        self.num_begun = self.num_ended = 0
        self.service_s = 0.0
        return calls


@dataclass(eq=False)
class Visit:
    """One request with a model's frontend. If it `is_withdrawn`, the engine was given
    up before the answer began, or does not wake up for it (then there is a `refusal`):
    what the app says of that is no answer."""

    app: App
    served: Served
    num_withdrawn: int
    refusal: asyncio.Future[Problem]
    has_begun: bool = False
    # Asks the pool whether the engine, which sleeps, wakes up for it.
    asking: asyncio.Task[None] | None = None

    @property
    def is_withdrawn(self) -> bool:
        was_given_up = self.served.num_withdrawn != self.num_withdrawn
        return not self.has_begun and (was_given_up or self.refusal.done())

    def begin_answer(self) -> bool:
        """From here on the answer is the app's, whatever comes; False if the visit is
        withdrawn by now."""
        self.has_begun = not self.is_withdrawn
        return self.has_begun

    def refuse(self, problem: Problem) -> None:
        """No-op where the answer has begun."""
        if not self.has_begun:
            self.refusal.set_result(problem)
