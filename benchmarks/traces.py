"""What arrives when: traces of calls for the policy's simulator, by seed (pure).

A trace is a pool, its models and every call with its arrival and its service time;
the same seed gives the same trace. Nothing here knows of policies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from vllm_resident.controller.policy import Costs, Limits

# A share of the seconds of a wake-up is the other engine's falling asleep.
SLEEP_SHARE = 0.4
# No call lasts longer than this many times the mean.
LONGEST = 4.0


@dataclass(frozen=True)
class Scale:
    """A kind of models: what their switches and calls take, in seconds."""

    name: str
    wake_s: float
    load_s: float
    service_s: float
    num_slots: int = 8

    @property
    def costs(self) -> Costs:
        """As the policy takes them; wake_s and load_s are from an engine that is up."""
        sleep_s = self.wake_s * SLEEP_SHARE
        wake_up_s = {1: self.wake_s - sleep_s, 2: self.load_s - sleep_s}
        return Costs(sleep_s, wake_up_s, self.load_s - sleep_s)


@dataclass(frozen=True)
class Model:
    name: str
    costs: Costs
    num_ranks: int = 1
    num_slots: int = 8
    pinned: bool = False
    limits: Limits = field(default_factory=Limits)
    service_s: float = 1.0


@dataclass(frozen=True)
class Call:
    at: float
    model: str
    service_s: float


@dataclass(frozen=True)
class Trace:
    """`patience_s` is the wait up to which a call counts for goodput. Where it
    `is_warm`, all models were loaded before and sleep; else none was."""

    name: str
    num_ranks: int
    models: tuple[Model, ...]
    calls: tuple[Call, ...]
    patience_s: float
    awake_per_rank: int = 1
    needs_switches: bool = True
    is_warm: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to make a trace. `load` is the calls in service per slot of the pool, if each
    rank's engine were always the right one; `make` gives the arrivals."""

    name: str
    note: str
    num_models: int
    num_ranks: int
    load: float
    make: Callable[[random.Random, Recipe, float, float], Iterator[tuple[float, int]]]
    widths: tuple[int, ...] = (1,)
    zipf: float = 1.0
    num_calls: int = 3000
    awake_per_rank: int = 1
    is_warm: bool = False


def zipf(num: int, exponent: float) -> list[float]:
    """Shares of `num` models, the first the most popular; they sum to 1."""
    weights = [1 / (place + 1) ** exponent for place in range(num)]
    return [weight / sum(weights) for weight in weights]


def poisson(
    rng: random.Random, recipe: Recipe, rate: float, end: float
) -> Iterator[tuple[float, int]]:
    shares = zipf(recipe.num_models, recipe.zipf)
    at = 0.0
    while (at := at + rng.expovariate(rate)) < end:
        yield at, rng.choices(range(recipe.num_models), shares)[0]


def bursts(
    rng: random.Random, recipe: Recipe, rate: float, end: float
) -> Iterator[tuple[float, int]]:
    """Each model is on a fifth of the time, at five times its rate."""
    share_on = 0.2
    for model, share in enumerate(zipf(recipe.num_models, recipe.zipf)):
        at = 0.0
        on_s = end / 40
        while at < end:
            at += rng.expovariate(share_on / (1 - share_on) / on_s)
            until = min(end, at + rng.expovariate(1 / on_s))
            while (at := at + rng.expovariate(rate * share / share_on)) < until:
                yield at, model
            at = until


def diurnal(
    rng: random.Random, recipe: Recipe, rate: float, end: float
) -> Iterator[tuple[float, int]]:
    """Who is popular moves on: a quarter of the models every quarter of the trace."""
    for at, place in poisson(rng, recipe, rate, end):
        shift = int(4 * at / end) * max(1, recipe.num_models // 4)
        yield at, (place + shift) % recipe.num_models


def alternating(
    rng: random.Random, recipe: Recipe, rate: float, end: float
) -> Iterator[tuple[float, int]]:
    """Each call is for the model that was not called for longest."""
    at = 0.0
    for number in count():
        if (at := at + rng.expovariate(rate)) >= end:
            return
        yield at, number % recipe.num_models


RECIPES = (
    Recipe("light", "8 models on 2 ranks, few calls", 8, 2, 0.08, poisson),
    Recipe("poisson", "8 models on 2 ranks", 8, 2, 0.35, poisson),
    Recipe(
        "many", "64 models on 8 ranks, all loaded before", 64, 8, 0.2, poisson,
        num_calls=2000, is_warm=True,
    ),
    Recipe(
        # Evenly popular: no model's burst is more than its one engine can serve.
        "bursty", "16 models on 4 ranks, on and off", 16, 4, 0.25, bursts, zipf=0.5
    ),
    Recipe("diurnal", "12 models on 4 ranks, whose popularity moves on", 12, 4, 0.35,
           diurnal),
    Recipe("alternating", "4 models on 1 rank, never the same twice", 4, 1, 0.3,
           alternating),
    Recipe("wide", "12 models of 1, 2 and 4 ranks on 8", 12, 8, 0.2, poisson,
           widths=(1, 2, 4, 1)),
    Recipe("pairs", "12 models on 2 ranks, 2 awake on each", 12, 2, 0.3, poisson,
           awake_per_rank=2),
    Recipe("resident", "4 models on 4 ranks: no switch is needed", 4, 4, 0.3, poisson),
)  # fmt: skip


def make(recipe: Recipe, scale: Scale, seed: int) -> Trace:
    rng = random.Random(f"{recipe.name} {scale.name} {seed}")
    models = tuple(
        Model(
            f"m{place:02}",
            scale.costs,
            recipe.widths[place % len(recipe.widths)],
            scale.num_slots,
            service_s=scale.service_s,
        )
        for place in range(recipe.num_models)
    )
    width = sum(
        share * model.num_ranks
        for share, model in zip(
            zipf(recipe.num_models, recipe.zipf), models, strict=True
        )
    )
    slots = recipe.num_ranks * recipe.awake_per_rank * scale.num_slots
    rate = recipe.load * slots / width / scale.service_s
    end = recipe.num_calls / rate
    arrivals = sorted(recipe.make(rng, recipe, rate, end))
    calls = tuple(
        Call(at, models[place].name, _service(rng, scale.service_s))
        for at, place in arrivals
    )
    needs = sum(m.num_ranks for m in models) > recipe.num_ranks * recipe.awake_per_rank
    return Trace(
        f"{recipe.name}-{scale.name}",
        recipe.num_ranks,
        models,
        calls,
        patience_s=10 * (scale.wake_s + scale.service_s),
        awake_per_rank=recipe.awake_per_rank,
        needs_switches=needs,
        is_warm=recipe.is_warm,
    )


def _service(rng: random.Random, mean_s: float) -> float:
    return min(LONGEST * mean_s, rng.expovariate(1 / mean_s))
