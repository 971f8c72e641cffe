"""The pool against a model of it: hypothesis gives commands, both must agree.

The model is a dozen lines: which engines there are, at which sleep level, and in which
order they were used. `VLLM_RESIDENT_MODEL_STEPS` makes it run longer (default: 40).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.e2e.pools import ENGINE_ARGS, PROMPTS, SAMPLING, pids
from vllm_resident import Client, CommandRejected, EngineSpec, RankFailure
from vllm_resident.messages import SwitchReport

NUM_STEPS = int(os.environ.get("VLLM_RESIDENT_MODEL_STEPS", "40"))
MODELS = ("llama", "qwen2", "qwen3")
LAYOUTS: dict[str, tuple[list[int], dict[str, int]]] = {
    "left": ([0], {}),
    "right": ([1], {}),
    "tensor": ([0, 1], {"tensor_parallel_size": 2}),
    "pipeline": ([0, 1], {"pipeline_parallel_size": 2}),
}
# The name says what it is: no two engines of a name are different.
NAMES = [f"{model}-{layout}" for model in MODELS for layout in LAYOUTS]


@dataclass
class Modelled:
    """One engine as it should be. `used` orders engines by their last use."""

    level: int
    used: int


class PoolMachine(RuleBasedStateMachine):
    pool: ClassVar[Client]
    checkpoints: ClassVar[dict[str, str]]
    reference: ClassVar[Callable[[str], list[list[int]]]]

    def __init__(self) -> None:
        super().__init__()
        self.engines: dict[str, Modelled] = {}
        self.clock = 0
        self.pids: list[int] = []

    @initialize()
    def empty(self) -> None:
        self.pool.apply([])
        self.pids = pids(self.pool)

    # ------------------------------------------------------------ the model

    def ranks(self, name: str) -> set[int]:
        return set(LAYOUTS[name.partition("-")[2]][0])

    def awake_on(self, name: str) -> list[str]:
        """Other engines that are awake on its ranks."""
        return [
            other
            for other, engine in self.engines.items()
            if other != name
            and engine.level == 0
            and self.ranks(other) & self.ranks(name)
        ]

    def put(self, name: str, level: int) -> None:
        self.clock += 1
        known = self.engines.get(name)
        used = self.clock if level == 0 or known is None else known.used
        self.engines[name] = Modelled(level, used)

    # ------------------------------------------------------------ commands

    def spec(self, name: str, *, asleep: bool = False) -> EngineSpec:
        model, _, layout = name.partition("-")
        ranks, sizes = LAYOUTS[layout]
        args = {**ENGINE_ARGS, **sizes}
        return EngineSpec(name, self.checkpoints[model], ranks, args, asleep)

    def rejected(self, call: Callable[[], Any]) -> None:
        with pytest.raises(CommandRejected):
            call()

    @rule(name=st.sampled_from(NAMES), asleep=st.booleans())
    def load(self, name: str, asleep: bool) -> None:
        wanted = self.spec(name, asleep=asleep)

        def call() -> SwitchReport:
            return self.pool.load(
                name, wanted.model, ranks=wanted.ranks, asleep=asleep,
                **wanted.engine_args,
            )  # fmt: skip

        if name in self.engines or (not asleep and self.awake_on(name)):
            self.rejected(call)
            return
        call()
        self.put(name, int(asleep))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        if name not in self.engines:
            self.rejected(lambda: self.pool.unload(name))
            return
        self.pool.unload(name)
        del self.engines[name]

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), level=st.integers(1, 2))
    def sleep(self, data: st.DataObject, level: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.engines)))
        if self.engines[name].level > level:
            self.rejected(lambda: self.pool.sleep(name, level=level))
            return
        self.pool.sleep(name, level=level)
        self.put(name, level)

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def wake_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engines)))
        self.pool.wake_up(name)
        if self.engines[name].level:
            for other in self.awake_on(name):
                self.put(other, 1)
            self.put(name, 0)

    @precondition(lambda self: any(not e.level for e in self.engines.values()))
    @rule(data=st.data(), new=st.sampled_from(NAMES),
          strategy=st.sampled_from(["sleep", "unload", "stage"]))  # fmt: skip
    def switch(self, data: st.DataObject, new: str, strategy: str) -> None:
        awake = sorted(n for n, e in self.engines.items() if not e.level)
        old = data.draw(st.sampled_from(awake))
        known = self.engines.get(new)
        wanted = new if known else self.spec(new)
        in_the_way = [each for each in self.awake_on(new) if each != old]

        def call() -> SwitchReport:
            return self.pool.switch(old, wanted, strategy=strategy)

        if old == new or in_the_way or (known and not known.level):
            self.rejected(call)
            return
        call()
        if strategy == "unload":
            del self.engines[old]
        else:
            self.put(old, 1)
        self.put(new, 0)

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=3, unique=True),
          asleep=st.booleans())  # fmt: skip
    def apply(self, names: list[str], asleep: bool) -> None:
        """The first is awake, the others sleep, if `asleep`; else all are awake."""
        levels = {n: int(asleep and i > 0) for i, n in enumerate(names)}
        awake = [n for n, level in levels.items() if not level]
        wanted = [self.spec(n, asleep=bool(level)) for n, level in levels.items()]
        ranks = [rank for name in awake for rank in self.ranks(name)]
        if len(ranks) != len(set(ranks)):
            self.rejected(lambda: self.pool.apply(wanted))
            return
        self.pool.apply(wanted)
        for name in set(self.engines) - set(names):
            del self.engines[name]
        for name, level in levels.items():
            known = self.engines.get(name)
            # One that sleeps deeper already is as asked.
            if known is None or bool(known.level) != bool(level):
                self.put(name, level)

    @rule(name=st.sampled_from(NAMES))
    def generate(self, name: str) -> None:
        engine = self.engines.get(name)
        if engine is None or engine.level:
            self.rejected(lambda: self.pool.generate(name, PROMPTS, SAMPLING))
            return
        self.put(name, 0)
        completions = self.pool.generate(name, PROMPTS, SAMPLING)
        expected = type(self).reference(name.partition("-")[0])
        assert [each.token_ids for each in completions] == expected

    @rule(strategy=st.sampled_from(["sleep", "stage"]))
    def fail(self, strategy: str) -> None:
        """A switch to an engine whose load fails on a rank: nothing is changed."""
        awake = sorted(n for n, e in self.engines.items() if not e.level)
        wanted = EngineSpec(
            "fails-on-1-in-load-model", self.checkpoints["llama"], [0, 1], ENGINE_ARGS
        )
        if not awake:
            return
        error = RankFailure if set(self.awake_on("x-tensor")) <= {awake[0]} else (
            CommandRejected
        )  # fmt: skip
        with pytest.raises(error):
            self.pool.switch(awake[0], wanted, strategy=strategy)

    # ------------------------------------------------------------ agreement

    @invariant()
    def agrees(self) -> None:
        status = self.pool.status()
        seen = {e.name: (e.phase, e.sleep_level) for e in status.engines}
        assert seen == {
            name: ("asleep" if engine.level else "ready", engine.level)
            for name, engine in self.engines.items()
        }
        assert [rank.pid for rank in status.ranks] == self.pids or not self.pids


@pytest.mark.timeout(240 + 6 * NUM_STEPS)
def test_the_pool_does_what_its_model_says(
    pool: Client,
    checkpoints: dict[str, str],
    reference: Callable[[str], list[list[int]]],
) -> None:
    for model in MODELS:
        reference(model)
    PoolMachine.pool = pool
    PoolMachine.checkpoints = checkpoints
    PoolMachine.reference = staticmethod(reference)
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=max(1, NUM_STEPS // 20),
            stateful_step_count=20,
            deadline=None,
            # Finding a shorter sequence would take as long as finding this one.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
