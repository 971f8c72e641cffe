"""Callers of every kind for the soak: a mixed trace of them, and what they see.

Some read a whole answer or a stream, some leave in the middle or before, some ask for
what cannot be. Each compares what it gets with what its model answers. Knows HTTP and
nothing of pools.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks import traces

PROMPTS = ("hello world", "the quick brown fox", "a", "fox " * 20, "1 2 3 4 5", "Why?")
MAX_TOKENS = 64
LENGTHS = (2, 8, 24, MAX_TOKENS)
SAMPLING: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
# Calls a second: those in bursts (each model is on a fifth of the time), and others.
BURST_RATE, STEADY_RATE = 6.0, 2.0
# How often callers do what.
MANNERS = {"whole": 8, "stream": 8, "cancel": 3, "leave": 1, "bad": 2}
# A model comes up within the pool's max_wait_s (120 s) or the call is refused.
CALL_TIMEOUT_S = 150.0

BAD: tuple[tuple[dict[str, Any] | bytes, int], ...] = (
    (b"{nope", 400),
    (b"[1, 2]", 400),
    ({"model": "nobody", "prompt": "x"}, 404),
    ({"model": 7, "prompt": "x"}, 400),
    ({"max_tokens": -1}, 400),
    ({"prompt": {"no": "text"}}, 400),
    ({"prompt": "long " * 400}, 400),
    ({"temperature": "hot"}, 400),
    ({"n": 0}, 400),
)


@dataclass(frozen=True)
class Call:
    """One caller: when, in seconds from the round's beginning, for what and how."""

    at_s: float
    model: str
    manner: str
    prompt: int
    num_tokens: int


@dataclass
class Seen:
    """What callers saw. `wrong` says what must not be, and is empty."""

    num_calls: int = 0
    by_manner: Counter[str] = field(default_factory=Counter)
    # Why, and how often.
    refusals: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    # From a call to the first of its answer.
    answer_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def num_refused(self) -> int:
        return self.refusals.total()

    def fail(self, what: str) -> None:
        self.wrong.append(what)


def trace(rng: random.Random, names: Sequence[str], seconds: float) -> list[Call]:
    """One round's calls for these models, oldest first."""
    # Of the recipe they read how many models there are and how popular each is.
    recipe = traces.Recipe("mixed", "", len(names), 0, 0.0, traces.bursts, zipf=0.5)
    arrivals = itertools.chain(
        traces.bursts(rng, recipe, BURST_RATE, seconds),
        traces.poisson(rng, recipe, STEADY_RATE, seconds),
    )
    manners = [name for name, weight in MANNERS.items() for _ in range(weight)]
    return [
        Call(
            at_s,
            names[place],
            rng.choice(manners),
            rng.randrange(len(PROMPTS)),
            rng.choice(LENGTHS),
        )
        for at_s, place in sorted(arrivals)
    ]


class Callers:
    """Makes the calls of a round at their times and looks at what comes back."""

    def __init__(
        self,
        url: str,
        answers: dict[str, list[list[int]]],
        rng: random.Random,
        seen: Seen,
    ) -> None:
        self._url = f"{url}/completions"
        self._answers = answers
        self._rng = rng
        self._seen = seen

    async def run(self, calls: Sequence[Call]) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout
        ) as self._session:
            began = time.monotonic()
            await asyncio.gather(*(self._make(call, began) for call in calls))

    async def _make(self, call: Call, began: float) -> None:
        await asyncio.sleep(began + call.at_s - time.monotonic())
        manners: dict[str, Callable[[Call], Awaitable[None]]] = {
            "whole": self._whole,
            "stream": self._stream,
            "cancel": self._cancel,
            "leave": self._leave,
            "bad": self._bad,
        }
        self._seen.num_calls += 1
        try:
            await manners[call.manner](call)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            self._seen.fail(f"{call}: {error!r}")

    def _body(self, call: Call, **more: Any) -> dict[str, Any]:
        return {
            "model": call.model,
            "prompt": PROMPTS[call.prompt],
            "max_tokens": call.num_tokens,
            "return_token_ids": True,
            **SAMPLING,
            **more,
        }

    async def _whole(self, call: Call) -> None:
        began = time.monotonic()
        async with self._session.post(self._url, json=self._body(call)) as answer:
            if not await self._is_accepted(call, answer):
                return
            document = await answer.json()
        choice = document["choices"][0]
        self._seen.answer_s.append(time.monotonic() - began)
        self._check(call, document["model"], choice["token_ids"])
        self._check_end(call, choice["finish_reason"])

    async def _stream(self, call: Call) -> None:
        await self._read(call, call.num_tokens)

    async def _cancel(self, call: Call) -> None:
        """Leave in the middle of it."""
        await self._read(call, self._rng.randrange(1, call.num_tokens))

    async def _read(self, call: Call, num_wanted: int) -> None:
        began = time.monotonic()
        body = self._body(call, stream=True)
        got: list[int] = []
        reason, model, is_done = None, call.model, False
        async with self._session.post(self._url, json=body) as answer:
            if not await self._is_accepted(call, answer):
                return
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self._seen.fail(f"{call}: after {len(got)} tokens: {event}")
                        return
                    if not got:
                        self._seen.answer_s.append(time.monotonic() - began)
                    model = event["model"]
                    got += event["choices"][0]["token_ids"]
                    reason = event["choices"][0]["finish_reason"]
                is_done = is_done or line.startswith(b"data: [DONE]")
                if num_wanted < call.num_tokens and len(got) >= num_wanted:
                    answer.close()
                    break
        self._check(call, model, got)
        if num_wanted == call.num_tokens:
            self._check_end(call, reason if is_done else "no end of the stream")

    async def _leave(self, call: Call) -> None:
        """Leave before there is an answer, if that takes a moment."""
        seconds = self._rng.uniform(0.0, 0.1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                async with self._session.post(self._url, json=self._body(call)):
                    pass
        self._seen.by_manner["leave"] += 1

    async def _bad(self, call: Call) -> None:
        wrong, status = self._rng.choice(BAD)
        data = wrong
        if isinstance(wrong, dict):
            data = json.dumps({**self._body(call), **wrong}).encode()
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=data, headers=headers) as answer:
            message = (await answer.json())["error"]["message"]
        if answer.status == 503 and answer.headers.get("retry-after"):
            self._seen.refusals[message] += 1
        elif answer.status != status or not message:
            self._seen.fail(f"{wrong!r:.80}: {answer.status}, not {status}")
        self._seen.by_manner["bad"] += 1

    async def _is_accepted(self, call: Call, answer: aiohttp.ClientResponse) -> bool:
        if answer.status == 200:
            self._seen.by_manner[call.manner] += 1
            return True
        message = (await answer.json())["error"]["message"]
        if answer.status == 503 and answer.headers.get("retry-after"):
            self._seen.refusals[message] += 1
        else:
            self._seen.fail(f"{call}: {answer.status} {message}")
        return False

    def _check(self, call: Call, model: str, tokens: list[int]) -> None:
        self._seen.num_tokens += len(tokens)
        wanted = self._answers[call.model][call.prompt][: len(tokens)]
        if model != call.model or tokens != wanted:
            self._seen.fail(f"{call}: {model} answered {tokens}, not {wanted}")
        is_whole = call.manner != "cancel"
        if is_whole and len(tokens) != call.num_tokens:
            self._seen.fail(f"{call}: {len(tokens)} tokens")

    def _check_end(self, call: Call, reason: str | None) -> None:
        if reason != "length":
            self._seen.fail(f"{call}: ended with {reason!r}")
