"""Callers of an OpenAI server: a fixed schedule of streams, timed where they are read.

The same schedule goes to whatever is compared. Knows HTTP and nothing of who answers;
neither torch nor vLLM is imported, so that the callers cost little of the cores that
the servers compute on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

# No stream of a benchmark takes as long as this.
TIMEOUT_S = 120.0
_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu")
_WORDS = ["".join(parts) for parts in itertools.product(_SYLLABLES, repeat=3)]


@dataclass(frozen=True)
class Ask:
    """One call: when it comes, in seconds after the first, and what it asks for."""

    at_s: float
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Load:
    """A schedule. At most `max_at_once` calls are out: those that come to a full house
    wait at the caller, and their clock starts when they are sent."""

    name: str
    label: str
    asks: tuple[Ask, ...]
    max_at_once: int


@dataclass(frozen=True)
class Heard:
    """What one caller saw, on this process's clock. `first_byte` is of the answer's
    head; `first` and `last` are of its tokens."""

    sent: float
    first_byte: float
    first: float
    last: float
    num_tokens: int
    text: str

    @property
    def first_token_s(self) -> float:
        return self.first - self.sent

    @property
    def per_token_s(self) -> float:
        """Mean time from one token to the next."""
        return (self.last - self.first) / max(1, self.num_tokens - 1)


@dataclass(frozen=True)
class Figures:
    """Of one run of a load."""

    tokens_per_s: float
    per_token_s: float
    first_token_s: float


def closed(name: str, label: str, num_calls: int, at_once: int, **what: int) -> Load:
    """All at once, `at_once` of them out at any time: how much a server can do."""
    asks = _asks(name, [0.0] * num_calls, **what)
    return Load(name, label, asks, at_once)


def steady(name: str, label: str, num_calls: int, rate: float, **what: int) -> Load:
    """Poisson arrivals, `rate` a second, none held back."""
    rng = random.Random(name)
    arrivals = [0.0]
    while len(arrivals) < num_calls:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    return Load(name, label, _asks(name, arrivals, **what), num_calls)


def _asks(
    name: str, arrivals: Sequence[float], *, num_words: int, max_tokens: int
) -> tuple[Ask, ...]:
    """Prompts that have nothing in common, so that no cache shortens one."""
    rng = random.Random(f"prompts of {name}")
    return tuple(
        Ask(at_s, " ".join(rng.choices(_WORDS, k=num_words)), max_tokens)
        for at_s in arrivals
    )


def run(url: str, model: str, load: Load) -> list[Heard]:
    """Make all calls of a load; blocks until the last is answered."""
    return asyncio.run(_run(url, model, load))


async def _run(url: str, model: str, load: Load) -> list[Heard]:
    places = asyncio.Semaphore(load.max_at_once)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        began = time.perf_counter()

        async def call(ask: Ask) -> Heard:
            await asyncio.sleep(began + ask.at_s - time.perf_counter())
            async with places:
                return await _call(session, url, model, ask)

        return list(await asyncio.gather(*map(call, load.asks)))


async def _call(
    session: aiohttp.ClientSession, url: str, model: str, ask: Ask
) -> Heard:
    body: dict[str, Any] = {
        "model": model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first = last = 0.0
    num_tokens = 0
    texts = []
    sent = time.perf_counter()
    async with session.post(f"{url}/completions", json=body) as answer:
        first_byte = time.perf_counter()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} from {url}: {await answer.text()}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices"):
                last = time.perf_counter()
                first = first or last
                texts.append(event["choices"][0]["text"])
            elif usage := event.get("usage"):
                num_tokens = usage["completion_tokens"]
    if num_tokens != ask.max_tokens:
        raise RuntimeError(f"{num_tokens} tokens from {url}, not {ask.max_tokens}")
    return Heard(sent, first_byte, first, last, num_tokens, "".join(texts))


def figures(heard: Sequence[Heard]) -> Figures:
    """Tokens per second of the whole; per call, medians."""
    began = min(each.sent for each in heard)
    ended = max(each.last for each in heard)
    return Figures(
        sum(each.num_tokens for each in heard) / (ended - began),
        statistics.median(each.per_token_s for each in heard),
        statistics.median(each.first_token_s for each in heard),
    )
