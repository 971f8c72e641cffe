"""A fault at every phase of every command that moves engines, on either rank.

After each the old layout is there and serves the same tokens, and the caller was told
rank, phase and cause; after all of them nothing is left on any rank. No combination is
left out: the cases are made from tables of what each command goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.at_rest import ranks_at_rest
from tests.e2e.conftest import (
    LOAD_PHASES,
    SLEEP_PHASES,
    WAKE_PHASES,
    failing_engine,
)
from tests.e2e.pools import ENGINE_ARGS, PROMPTS, SAMPLING, eventually
from vllm_resident import Client, EngineSpec, RankFailure
from vllm_resident.messages import RankStatus

# Plain vLLM may have to be asked first.
pytestmark = pytest.mark.timeout(300)

Reference = Callable[[str], list[list[int]]]

OLD_MODEL, NEW_MODEL = "llama", "qwen2"
# What comes is loaded by these,
LOADS = ("load", "load_asleep", "switch", "switch_unload", "stage", "apply")
# falls asleep in these once it is built,
NEW_SLEEPS = ("load_asleep", "stage")
# and wakes up in these.
WAKES = ("wake_up", "switch", "stage", "apply")
# What goes falls asleep in these, or is what is put to sleep.
OLD_SLEEPS = ("sleep_1", "sleep_2", "wake_up", "switch", "stage", "apply")


@dataclass(frozen=True)
class Case:
    """`command` fails on `rank` in `phase` of what goes ("old") or of what comes
    ("new"), which is loaded and sleeps at `new_level` before, unless that is None."""

    command: str
    phase: str
    rank: int
    fails: str
    new_level: int | None = None

    def __str__(self) -> str:
        return f"{self.command}-{self.fails}-{self.phase}-{self.rank}"

    def name(self, role: str) -> str:
        return failing_engine(self.rank, self.phase) if self.fails == role else role


def _cases() -> Iterator[Case]:
    for rank in (0, 1):
        for command in LOADS:
            for phase in LOAD_PHASES:
                yield Case(command, phase, rank, "new")
        for phase in SLEEP_PHASES:
            for command in NEW_SLEEPS:
                yield Case(command, phase, rank, "new")
            for command in OLD_SLEEPS:
                yield Case(command, phase, rank, "old", _level(command, phase))
        for phase in WAKE_PHASES:
            for command in WAKES:
                yield Case(command, phase, rank, "new", _level(command, phase))


def _level(command: str, phase: str) -> int | None:
    """Staged, what comes is asleep because it was built so; weights are read again
    after level 2 alone."""
    if command == "stage":
        return None
    return 2 if phase == "read_weights" else 1


class Situation:
    """One case on the pool: an old engine awake, a new one asleep or not there."""

    def __init__(self, pool: Client, case: Case, checkpoints: dict[str, str]) -> None:
        self._pool = pool
        self._case = case
        self._checkpoints = checkpoints
        self.old, self.new = case.name("old"), case.name("new")
        self._new_spec = self._spec(self.new, NEW_MODEL)

    def _spec(self, name: str, model: str, *, asleep: bool = False) -> EngineSpec:
        path = self._checkpoints[model]
        return EngineSpec(name, path, [0, 1], ENGINE_ARGS, asleep=asleep)

    def arrange(self) -> None:
        """What a case before this one left is used where it fits."""
        engines = [self._spec(self.old, OLD_MODEL)]
        if self._case.new_level:
            engines.append(self._spec(self.new, NEW_MODEL, asleep=True))
        # A load that brings its engine up awake needs its ranks free.
        if self._case.command == "load":
            engines = []
        # What cannot fall asleep cannot be set aside by an apply either.
        for name in self.engines().keys() - {each.name for each in engines}:
            self._pool.unload(name)
        self._pool.apply(engines)
        if self._case.new_level == 2:
            self._pool.sleep(self.new, level=2)

    def carry_out(self) -> None:
        pool, old = self._pool, self.old
        wanted = self.new if self._case.new_level else self._new_spec
        ways: dict[str, Callable[[], Any]] = {
            "load": lambda: self._load(asleep=False),
            "load_asleep": lambda: self._load(asleep=True),
            "sleep_1": lambda: pool.sleep(old, level=1),
            "sleep_2": lambda: pool.sleep(old, level=2),
            "wake_up": lambda: pool.wake_up(self.new),
            "switch": lambda: pool.switch(old, wanted),
            "switch_unload": lambda: pool.switch(old, wanted, strategy="unload"),
            "stage": lambda: pool.switch(old, self._new_spec, strategy="stage"),
            "apply": lambda: pool.apply([self._new_spec]),
        }
        ways[self._case.command]()

    def _load(self, *, asleep: bool) -> None:
        path = self._checkpoints[NEW_MODEL]
        self._pool.load(self.new, path, ranks=[0, 1], asleep=asleep, **ENGINE_ARGS)

    def engines(self) -> dict[str, tuple[str, int]]:
        status = self._pool.status()
        return {e.name: (e.phase, e.sleep_level) for e in status.engines}

    def generation(self) -> int:
        status = self._pool.status()
        return next((e.generation for e in status.engines if e.name == self.old), 0)

    def tokens(self) -> list[list[int]]:
        completions = self._pool.generate(self.old, PROMPTS, SAMPLING)
        return [each.token_ids for each in completions]


@pytest.fixture(scope="module")
def at_first(shared_pool: Client, checkpoints: dict[str, str]) -> list[RankStatus]:
    """What the ranks hold when what a process does but once is done."""
    for phase in ("kv_cache", "free_weights"):
        situation = Situation(
            shared_pool, Case("stage", phase, 1, "new"), checkpoints
        )  # fmt: skip
        situation.arrange()
        with pytest.raises(RankFailure):
            situation.carry_out()
        situation.tokens()
    shared_pool.apply([])
    return ranks_at_rest(shared_pool)


@pytest.mark.usefixtures("at_first")
@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_the_old_layout_is_there_after_a_fault(
    case: Case,
    shared_pool: Client,
    checkpoints: dict[str, str],
    reference: Reference,
) -> None:
    situation = Situation(shared_pool, case, checkpoints)
    situation.arrange()
    before, generation = situation.engines(), situation.generation()
    with pytest.raises(RankFailure) as raised:
        situation.carry_out()
    assert (raised.value.rank, raised.value.phase) == (case.rank, case.phase)
    assert f"declared fault in phase {case.phase}" in str(raised.value)
    if case.command == "load":
        assert {phase for phase, _ in situation.engines().values()} <= {"failed"}
        return
    assert situation.engines() == before
    assert situation.tokens() == reference(OLD_MODEL)
    if case.fails == "new" and case.command != "switch_unload":
        # The very engine, not one like it.
        assert situation.generation() == generation


def test_nothing_is_left_of_all_this(
    at_first: list[RankStatus], shared_pool: Client
) -> None:
    shared_pool.apply([])

    def check() -> None:
        for was, now in zip(at_first, ranks_at_rest(shared_pool), strict=True):
            assert now.pid == was.pid
            assert now.num_engines == 0
            assert now.num_process_groups == 0
            assert now.num_shm_segments == 0
            assert now.num_file_descriptors <= was.num_file_descriptors
            assert now.num_threads <= was.num_threads
            assert now.memory_used_bytes <= 1.05 * was.memory_used_bytes

    eventually(check)
