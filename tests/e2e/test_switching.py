"""Many engines resident at once, and switches that either happen or do not."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.at_rest import ranks_at_rest
from tests.e2e.pools import (
    ARCHITECTURES,
    ENGINE_ARGS,
    PROMPTS,
    SAMPLING,
    meanwhile,
    pids,
    running_pool,
)
from tests.members import standing_still
from vllm_resident import AsyncClient, Client, CommandRejected, EngineSpec
from vllm_resident.messages import Progress, SwitchReport

Reference = Callable[[str], list[list[int]]]
LONG = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True}
# (ranks, engine arguments): two halves, and the whole in two ways.
LAYOUTS: dict[str, tuple[list[int], dict[str, int]]] = {
    "left": ([0], {}),
    "right": ([1], {}),
    "tensor": ([0, 1], {"tensor_parallel_size": 2}),
    "pipeline": ([0, 1], {"pipeline_parallel_size": 2}),
}


def spec(
    name: str, model: str, layout: str, checkpoints: dict[str, str], **more: bool
) -> EngineSpec:
    ranks, sizes = LAYOUTS[layout]
    return EngineSpec(name, checkpoints[model], ranks, {**ENGINE_ARGS, **sizes}, **more)


def load(pool: Client, wanted: EngineSpec) -> None:
    pool.load(
        wanted.name, wanted.model, ranks=wanted.ranks, asleep=wanted.asleep,
        **wanted.engine_args,
    )  # fmt: skip


def tokens(pool: Client, engine: str) -> list[list[int]]:
    return [each.token_ids for each in pool.generate(engine, PROMPTS, SAMPLING)]


def phases(pool: Client) -> dict[str, tuple[str, int]]:
    return {e.name: (e.phase, e.sleep_level) for e in pool.status().engines}


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("layout", ["left", "tensor", "pipeline"])
def test_asleep_and_awake_again(
    layout: str,
    level: int,
    pool: Client,
    checkpoints: dict[str, str],
    reference: Reference,
) -> None:
    load(pool, spec("a", "llama", layout, checkpoints))
    assert tokens(pool, "a") == reference("llama")
    assert pool.sleep("a", level=level).path == ["sleep"]
    assert phases(pool) == {"a": ("asleep", level)}
    with pytest.raises(CommandRejected, match="wake it up"):
        pool.generate("a", "hello", SAMPLING)
    pool.wake_up("a")
    assert tokens(pool, "a") == reference("llama")


def test_overlapping_layouts_take_turns(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    models = dict(zip(LAYOUTS, ("llama", "qwen2", "qwen3", "opt"), strict=True))
    for layout, model in models.items():
        load(pool, spec(layout, model, layout, checkpoints, asleep=True))
    awake: set[str] = set()
    for layout in ("tensor", "left", "right", "pipeline", "tensor", "right", "left"):
        pool.wake_up(layout)
        awake = {name for name, (phase, _) in phases(pool).items() if phase == "ready"}
        for name in awake:
            assert tokens(pool, name) == reference(models[name]), (layout, name)
    assert awake == {"left", "right"}


@pytest.mark.parametrize(("drain_s", "reason"), [(60.0, "length"), (0.0, "abort")])
def test_requests_in_flight_when_their_engine_is_told_to_sleep(
    drain_s: float, reason: str, pool: Client, checkpoints: dict[str, str]
) -> None:
    load(pool, spec("a", "llama", "tensor", checkpoints))
    pieces: list[str | None] = []

    def read() -> None:
        for piece in pool.stream("a", "hello", LONG):
            pieces[len(pieces) :] = [piece.finish_reason]

    reader = threading.Thread(target=read)
    reader.start()
    (leader, _) = pids(pool)
    wait_for(lambda: len(pieces) > 3)
    with meanwhile(pool, "a", leader, command=lambda: pool.sleep("a", drain_s=drain_s)):
        reader.join(60)
    assert not reader.is_alive()
    assert pieces[-1] == reason


def test_what_comes_in_while_an_engine_wakes_up_is_held_for_it(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    load(pool, spec("b", "qwen2", "left", checkpoints, asleep=True))
    load(pool, spec("a", "llama", "left", checkpoints))
    answers: list[list[int]] = []

    def ask() -> None:
        while not answers:
            try:
                answers.extend(tokens(pool, "b"))
            except CommandRejected:  # it sleeps still
                time.sleep(0.001)

    asking = threading.Thread(target=ask)
    asking.start()
    pool.switch("a", "b")
    asking.join(20)
    assert answers == reference("qwen2")


@pytest.mark.parametrize(
    ("strategy", "path"),
    [
        ("sleep", ["sleep", "load"]),
        ("unload", ["unload", "load"]),
        ("stage", ["stage", "sleep", "wake_up"]),
    ],
)
def test_switch_to_a_new_engine(
    strategy: str,
    path: list[str],
    pool: Client,
    checkpoints: dict[str, str],
    reference: Reference,
) -> None:
    load(pool, spec("a", "llama", "tensor", checkpoints))
    wanted = spec("b", "qwen2", "pipeline", checkpoints)
    report = pool.switch("a", wanted, strategy=strategy)
    assert report.path == path
    assert 0 < report.unavailable_s <= report.seconds
    assert tokens(pool, "b") == reference("qwen2")
    if strategy != "unload":
        pool.switch("b", "a")
        assert tokens(pool, "a") == reference("llama")


def test_what_goes_serves_while_what_comes_is_staged(
    pool: Client, smollm2: str, checkpoints: dict[str, str]
) -> None:
    """A stream of the old engine goes on while the new one reads its weights, with the
    tokens it always has."""
    old_args = {**ENGINE_ARGS, "max_model_len": 512}
    load(pool, EngineSpec("old", checkpoints["llama"], [0], old_args))
    greedy = {"temperature": 0.0, "max_tokens": 480, "ignore_eos": True}
    alone = pool.generate("old", "hello", greedy)[0].token_ids
    # Once before, so that what a process does only once is done.
    args = {**ENGINE_ARGS, "dtype": "bfloat16"}
    pool.load("new", smollm2, ranks=[0], asleep=True, **args)
    pool.unload("new")
    rank = pids(pool)[0]
    # Tokens of the old one and phases of either, as they came.
    came: list[list[int] | tuple[str, str]] = []

    async def switch() -> SwitchReport:
        async with AsyncClient(pool.endpoint) as client:
            has_begun = asyncio.Event()

            def note(progress: Progress) -> None:
                came.append((progress.engine, progress.phase))
                has_begun.set()

            async def read() -> None:
                async for piece in client.stream("old", "hello", greedy):
                    came[len(came) :] = [piece.token_ids]

            # It finds both when it goes on: the stream does not end before the load.
            with standing_still(rank):
                reading = asyncio.create_task(read())
                await asyncio.sleep(0)  # it is asked for first
                switching = asyncio.create_task(
                    client.switch(
                        "old",
                        EngineSpec("new", smollm2, [0], args),
                        strategy="stage",
                        drain_s=60,
                        on_progress=note,
                    )
                )
                await asyncio.wait_for(has_begun.wait(), 20)
            await reading
            return await switching

    report = asyncio.run(switch())
    pieces = [each for each in came if isinstance(each, list)]
    assert [token for piece in pieces for token in piece] == alone
    is_built = came[came.index(("new", "load_model")) : came.index(("new", "stop"))]
    assert sum(isinstance(each, list) for each in is_built) > 5
    # Only after the load was over was there a time in which neither served.
    (load_report,) = [each for each in report.engines if each.action == "load"]
    loaded_s = load_report.began_s + load_report.seconds
    assert 0 < report.unavailable_s <= report.seconds - loaded_s
    assert pool.generate("new", "The capital of France is", max_tokens=1, temperature=0)


# ------------------------------------------------------------ memory


@pytest.mark.timeout(300)
def test_sleepers_stay_within_the_host_memory_budget(
    pool_folder: Path,
    checkpoints: dict[str, str],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """Room for three sleepers, six models in rotation."""
    file = tmp_path / "pool.toml"
    models = [*ARCHITECTURES, "llama"]
    # Three of most of them; the mixture is twice the size of the others.
    sizes = [Path(checkpoints[m], "model.safetensors").stat().st_size for m in models]
    budget = int(3.5 * sorted(sizes)[len(sizes) // 2])
    file.write_text(f"[pool]\nhost_memory = {budget}\n")
    with running_pool("budget", pool_folder, num_ranks=1, config=file) as pool:
        assert pool.status().host_memory_bytes == budget
        pool.load("m0", checkpoints[models[0]], **ENGINE_ARGS)
        order = ["m0"]
        for number in [*range(1, 6), 0, 2, 4, 1, 3, 5]:
            name = f"m{number}"
            new = EngineSpec(name, checkpoints[models[number]], None, ENGINE_ARGS)
            is_there = name in phases(pool)
            pool.switch(order[-1], name if is_there else new)
            order = [*(each for each in order if each != name), name]
            assert tokens(pool, name) == reference(models[number])
            engines = {e.name: e for e in pool.status().engines}
            kept = {n: sum(m.host_bytes for m in e.memory.values())
                    for n, e in engines.items()}  # fmt: skip
            assert sum(kept.values()) <= budget
            # Those demoted are the ones that were used longest ago.
            levels = [engines[each].sleep_level for each in order]
            assert levels == sorted(levels, reverse=True)
            assert levels[-1] == 0
        assert levels.count(1) >= 1
        assert levels.count(2) >= 1


# ------------------------------------------------------------ many, for long


class Crowd:
    """Twelve engines of four architectures in three layouts, all resident: takes
    random commands and checks after each what those that are awake generate."""

    def __init__(
        self, pool: Client, checkpoints: dict[str, str], reference: Reference, seed: int
    ) -> None:
        self._pool = pool
        self._checkpoints = checkpoints
        self._reference = reference
        self._choose = random.Random(seed)
        self._names = [
            f"{model}-{layout}"
            for model in ARCHITECTURES
            if model != "mixtral"
            for layout in ("left", "right", "tensor")
        ]
        self.num_taken: Counter[str] = Counter()

    def take_steps(self, num_steps: int) -> None:
        self._apply([])
        before = pids(self._pool)
        ways = {
            "sleep": self._sleep,
            "wake_up": self._wake_up,
            "switch": self._switch,
            "apply": self._apply_some,
        }
        for step in range(num_steps):
            way = self._choose.choice(sorted(ways))
            self.num_taken[way] += ways[way]()
            now = phases(self._pool)
            assert sorted(now) == sorted(self._names)
            for name in [n for n, (phase, _) in now.items() if phase == "ready"]:
                expected = self._reference(name.partition("-")[0])
                assert tokens(self._pool, name) == expected, (step, way, name)
        assert pids(self._pool) == before

    def _levels(self) -> dict[str, int]:
        return {name: level for name, (_, level) in phases(self._pool).items()}

    def _sleep(self) -> bool:
        """One that is awake, or a sleeper that goes deeper."""
        level = self._choose.choice([1, 2])
        fit = [name for name, at in sorted(self._levels().items()) if at < level]
        if fit:
            self._pool.sleep(self._choose.choice(fit), level=level)
        return bool(fit)

    def _wake_up(self) -> bool:
        self._pool.wake_up(self._choose.choice(self._names))
        return True

    def _switch(self) -> bool:
        """From one that is awake to one that has its place, whatever else is awake."""
        levels = self._levels()
        awake = sorted(name for name, level in levels.items() if not level)
        if not awake:
            return False
        old = self._choose.choice(awake)
        fit = [
            name
            for name, level in sorted(levels.items())
            if level and all(other == old or apart(name, other) for other in awake)
        ]
        if fit:
            self._pool.switch(old, self._choose.choice(fit))
        return bool(fit)

    def _apply_some(self) -> bool:
        """A random layout of those that may be awake together."""
        awake: list[str] = []
        for name in self._choose.sample(self._names, 3):
            if all(apart(name, other) for other in awake):
                awake.append(name)
        self._apply(awake)
        return True

    def _apply(self, awake: list[str]) -> None:
        specs = []
        for name in self._names:
            model, _, layout = name.partition("-")
            asleep = name not in awake
            specs.append(spec(name, model, layout, self._checkpoints, asleep=asleep))
        self._pool.apply(specs)


def apart(one: str, other: str) -> bool:
    ranks = (LAYOUTS[name.partition("-")[2]][0] for name in (one, other))
    return set(next(ranks)).isdisjoint(next(ranks))


@pytest.mark.timeout(400)
def test_twelve_engines_take_turns(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    crowd = Crowd(pool, checkpoints, reference, seed=4)
    crowd.take_steps(25)
    assert set(crowd.num_taken) == {"sleep", "wake_up", "switch", "apply"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_hundred_steps_leave_nothing_behind(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    crowd = Crowd(pool, checkpoints, reference, seed=5)
    crowd.take_steps(30)
    at_first = ranks_at_rest(pool)
    crowd.take_steps(500)
    for was, now in zip(at_first, ranks_at_rest(pool), strict=True):
        assert now.num_file_descriptors <= was.num_file_descriptors + 2
        assert now.num_threads <= was.num_threads + 2
        assert now.num_shm_segments <= was.num_shm_segments
        assert now.num_process_groups <= was.num_process_groups
        assert now.num_engines == was.num_engines
        assert now.memory_used_bytes <= 1.05 * was.memory_used_bytes
