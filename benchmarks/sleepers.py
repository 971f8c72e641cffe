"""Switches between engines that stay resident: asleep at level 1, at level 2, staged.

Both models of a pair are loaded once into a pool of their own; then one serves while
the other sleeps. Timed at the public client, first token included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.contenders import (
    ENGINE,
    PROMPT,
    SAMPLING,
    Pool,
    Resources,
    engine_args,
    phases_of,
)
from benchmarks.pairs import Model, Pair
from benchmarks.rows import Heading, Sample, with_other
from vllm_resident import EngineSpec, SwitchReport
from vllm_resident.client import Client

OTHER_ENGINE = f"{ENGINE}-other"


class Sleepers(Resources):
    """The measured model is brought up beside the other; then they change back."""

    def __init__(self, pair: Pair, pool: Pool, *, eager: bool = True) -> None:
        super().__init__()
        self._pair = pair
        self._pool = pool
        self._args = {**engine_args(pair), "enforce_eager": eager}
        end = pair.suffix if eager else f"_compiled{pair.suffix}"
        self._first_token = f"first_token{end}"
        self._level_1 = f"wake_level_1{end}"
        self._level_2 = f"wake_level_2{end}"
        self._staged = f"staged{end}"
        self._gap = f"staged_unavailable{end}"
        baseline = f"resident{end}"
        self.headings = [
            Heading(self._level_1, "vllm-resident, asleep at level 1", baseline,
                    pair.title),
            Heading(self._level_2, "vllm-resident, asleep at level 2", baseline),
            Heading(self._staged, "vllm-resident, loaded beside, staged", baseline),
            Heading(self._gap, "... of it neither could serve", baseline),
            Heading(self._first_token, "a first token by itself", baseline),
        ]  # fmt: skip

    def __enter__(self) -> Sleepers:
        client = self._client
        for name, model in ((ENGINE, self._pair.measured),
                            (OTHER_ENGINE, self._pair.other)):  # fmt: skip
            client.load(name, model.source, **self._args)
            self._ask(name)
            if name == ENGINE:
                client.sleep(name)
        return self

    @property
    def _client(self) -> Client:
        return self._pool.client

    def turn(self) -> Iterator[Sample]:
        yield self._there(self._level_1)
        since = time.perf_counter()
        tokens = self._ask(ENGINE)
        yield Sample(self._first_token, time.perf_counter() - since,
                     model=self._pair.measured.name, tokens=tokens)  # fmt: skip
        self._back()
        self._client.sleep(ENGINE, level=2)
        yield self._there(self._level_2)
        self._back()
        self._client.unload(ENGINE)
        wanted = self._spec(self._pair.measured)
        yield from self._stage(wanted)
        self._back()

    def _stage(self, wanted: EngineSpec) -> Iterator[Sample]:
        since = time.perf_counter()
        report = self._client.switch(OTHER_ENGINE, wanted, strategy="stage")
        yield self._sample(self._staged, since, report)
        yield Sample(self._gap, report.unavailable_s)

    def _there(self, row: str) -> Sample:
        since = time.perf_counter()
        report = self._client.switch(OTHER_ENGINE, ENGINE)
        return self._sample(row, since, report)

    def _back(self) -> None:
        self._client.switch(ENGINE, OTHER_ENGINE)
        self._ask(OTHER_ENGINE)

    def _sample(self, row: str, since: float, report: SwitchReport) -> Sample:
        asked = time.perf_counter()
        tokens = self._ask(ENGINE)
        now = time.perf_counter()
        phases = {**phases_of([report]), "first_token": now - asked}
        phases = with_other(phases, now - since)
        return Sample(row, now - since, phases, self._pair.measured.name, tokens)

    def _ask(self, name: str) -> tuple[int, ...]:
        return tuple(self._client.generate(name, PROMPT, SAMPLING)[0].token_ids)

    def _spec(self, model: Model) -> EngineSpec:
        return EngineSpec(ENGINE, model.source, engine_args=self._args)
