"""The ways to change a model that take turns in `benchmarks.switch`.

Each is a context manager: entering starts what it needs and warms it up, so that a
first time is never counted among the others (where it is worth knowing it has a row of
its own); `turn` makes a switch and says what it took; leaving ends everything.
`headings` are the rows it fills. All of them give vLLM the same arguments.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from benchmarks.pairs import Model, Pair
from benchmarks.plain import PlainLauncher, PlainProcess
from benchmarks.rows import Heading, Sample, with_other
from vllm_resident import Client, SwitchReport
from vllm_resident.launch import launch
from vllm_resident.transport import pool_directory

READY_TIMEOUT_S = 300.0
ENGINE = "bench"
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
}
PROMPT = "The capital of France is"
SAMPLING = {"temperature": 0.0, "max_tokens": 1}
# Larger checkpoints are copied in part and the time is scaled.
COPY_BYTES = 1 << 30

Say = Callable[[str], None]


class Contender(Protocol):
    headings: list[Heading]

    def turn(self) -> Iterable[Sample]:
        """One measured turn; empty where there is nothing more to measure."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def engine_args(pair: Pair) -> dict[str, Any]:
    return {**ENGINE_ARGS, **pair.parallel_args}


def _request(pair: Pair) -> dict[str, Any]:
    """What the plain processes are told."""
    return {
        "model": pair.measured.source,
        "engine_args": engine_args(pair),
        "sampling": SAMPLING,
        "prompts": [PROMPT],
        "rounds": 1,
    }


class Resources:
    """What a contender started, ended when it is left."""

    def __init__(self) -> None:
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


class Cold(Resources):
    """A new torchrun of plain vLLM for the model, from spawning to its first token."""

    def __init__(self, pair: Pair, *, rehearse: bool) -> None:
        super().__init__()
        self._pair = pair
        self._rehearse = rehearse
        self._name = f"cold{pair.suffix}"
        self.headings = [
            Heading(
                self._name,
                "restart: new torchrun, plain vLLM",
                f"resident{pair.suffix}",
                pair.title,
            )
        ]

    def __enter__(self) -> Self:
        if self._rehearse:
            self.turn()
        return self

    def turn(self) -> list[Sample]:
        with tempfile.TemporaryDirectory() as folder:
            since = time.perf_counter()
            request, num_ranks = _request(self._pair), self._pair.num_ranks
            with PlainLauncher(request, num_ranks, Path(folder)) as plain:
                _, tokens = plain.turn()
                seconds = time.perf_counter() - since
        model = self._pair.measured.name
        return [Sample(self._name, seconds, {}, model, tuple(tokens[0]))]


class InProcess(Resources):
    """Plain vLLM in one process: release, load, first token; there and back."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._pair = pair
        self._first: list[Sample] = []
        self._there, self._back = _there_and_back("in_process", pair)
        self.headings = [
            Heading(
                self._there, "one process, plain vLLM", f"resident{pair.suffix}",
                pair.title,
            ),
            Heading(
                self._back, f"one process, plain vLLM, {pair.other.name}",
                _there_and_back("resident", pair)[1],
            ),
            Heading(
                f"in_process_first{pair.suffix}", "one process, the model's first time",
                f"resident_first{pair.suffix}",
            ),
        ]  # fmt: skip

    def __enter__(self) -> Self:
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        plain = PlainProcess(_request(self._pair), folder)
        self._plain = self.stack.enter_context(plain)
        pair = self._pair
        with _ended_on_error(self.stack):
            self._plain.switch(pair.other.source)
            self._first = [self._switch(self.headings[-1].name, pair.measured)]
            self._plain.switch(pair.other.source)
        return self

    def turn(self) -> Iterator[Sample]:
        yield from self._first
        self._first = []
        yield self._switch(self._there, self._pair.measured)
        yield self._switch(self._back, self._pair.other)

    def _switch(self, row: str, model: Model) -> Sample:
        since = time.perf_counter()
        answer = self._plain.switch(model.source)
        seconds = time.perf_counter() - since
        tokens = tuple(answer["tokens"][0])
        phases = with_other(answer["phases"], seconds)
        return Sample(row, seconds, phases, model.name, tokens)


class MemoryCopy(Resources):
    """Copying as many bytes as the weights have, by one core, into touched pages."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._num_bytes = pair.measured.weights_bytes
        self._name = f"memory_copy{pair.suffix}"
        self.headings = [
            Heading(
                self._name, "limit: copying the weights",
                f"resident{pair.suffix}", pair.title,
            )
        ]  # fmt: skip

    def turn(self) -> list[Sample]:
        return [Sample(self._name, copy_seconds(self._num_bytes))]


def copy_seconds(num_bytes: int) -> float:
    """Seconds to copy `num_bytes` in memory, measured on at most COPY_BYTES of them."""
    measured_bytes = min(num_bytes, COPY_BYTES)
    source = memoryview(b"\1" * measured_bytes)
    target = memoryview(bytearray(measured_bytes))
    target[:] = source  # touches the pages
    since = time.perf_counter()
    target[:] = source
    return (time.perf_counter() - since) * num_bytes / measured_bytes


@dataclass(frozen=True)
class Switched:
    """What one switch of the pool took, first token included."""

    seconds: float
    phases: dict[str, float]
    model: Model
    tokens: tuple[int, ...]

    def sample(self, row: str) -> Sample:
        return Sample(row, self.seconds, self.phases, self.model.name, self.tokens)


class Pool(Resources):
    """A pool of this benchmark's own that holds one engine at a time.

    vLLM keeps on disk what it found out about an architecture; the pool gets an empty
    folder for that, so that what it has never seen is new to it indeed.
    """

    def __init__(self, num_ranks: int, title: str, config: Path | None = None) -> None:
        super().__init__()
        self._num_ranks = num_ranks
        self._config = config
        self._name = f"switch-{os.getpid()}-{title}"
        self._is_loaded = False

    def __enter__(self) -> Self:
        cache = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.stack.push(self._clear)
        with _ended_on_error(self.stack):
            with environment("VLLM_CACHE_ROOT", cache):
                started = launch(
                    self._name, self._num_ranks, config=self._config, max_restarts=0
                )
            self.stack.enter_context(started)
            self._client = self.stack.enter_context(Client(started.endpoint))
            started.wait_ready(self._client, READY_TIMEOUT_S)
        return self

    @property
    def client(self) -> Client:
        return self._client

    def switch(self, model: Model, args: dict[str, Any]) -> Switched:
        """Unload what is there, load `model`, generate one token."""
        client, reports = self._client, []
        since = time.perf_counter()
        if self._is_loaded:
            reports.append(client.unload(ENGINE))
            self._is_loaded = False
        reports.append(client.load(ENGINE, model.source, **args))
        self._is_loaded = True
        asked = time.perf_counter()
        completions = client.generate(ENGINE, PROMPT, SAMPLING)
        now = time.perf_counter()
        phases = {**phases_of(reports), "first_token": now - asked}
        return Switched(
            now - since,
            with_other(phases, now - since),
            model,
            tuple(completions[0].token_ids),
        )

    def _clear(self, kind: type[BaseException] | None, *_: object) -> None:
        """Last of all: its folder, unless someone will want to read the logs in it."""
        if kind is None or issubclass(kind, KeyboardInterrupt):
            shutil.rmtree(pool_directory(self._name), ignore_errors=True)


def phases_of(reports: Iterable[SwitchReport]) -> dict[str, float]:
    """Seconds by phase of an unload and a load; what both have by the same name, the
    unload's is called by its own."""
    phases: dict[str, float] = {}
    for report in reports:
        for engine in report.engines:
            for phase, seconds in engine.phases.items():
                is_shared = engine.action == "unload" and phase == "coordinate"
                name = "coordinate_unload" if is_shared else phase
                phases[name] = phases.get(name, 0.0) + seconds
    return phases


class Resident(Resources):
    """This project: unload, load, first token, through the public client."""

    def __init__(self, pair: Pair, pool: Pool) -> None:
        super().__init__()
        self._pair = pair
        self._pool = pool
        self._args = engine_args(pair)
        self._first: list[Sample] = []
        self._there, self._back = _there_and_back("resident", pair)
        first = f"resident_first{pair.suffix}"
        self.headings = [
            Heading(self._there, "vllm-resident", self._there, pair.title),
            Heading(self._back, f"vllm-resident, {pair.other.name}", self._back),
            Heading(first, "vllm-resident, the model's first time", first),
        ]

    def __enter__(self) -> Self:
        self._pool.switch(self._pair.other, self._args)
        there = self._pool.switch(self._pair.measured, self._args)
        self._first = [there.sample(self.headings[-1].name)]
        self._pool.switch(self._pair.other, self._args)
        return self

    def turn(self) -> Iterator[Sample]:
        yield from self._first
        self._first = []
        there = self._pool.switch(self._pair.measured, self._args)
        yield there.sample(self._there)
        back = self._pool.switch(self._pair.other, self._args)
        yield back.sample(self._back)


class FirstSeen(Resources):
    """An architecture new to the pool, and the same one again, while there are any.

    Its turns begin and end with the pair's other model loaded, as `Resident`'s do.
    """

    def __init__(self, pair: Pair, pool: Pool, models: list[Model]) -> None:
        super().__init__()
        self._pair = pair
        self._pool = pool
        self._models = iter(models)
        self._args = engine_args(pair)
        self._rows = (f"first_seen{pair.suffix}", f"seen_again{pair.suffix}")
        first, again = self._rows
        self.headings = [
            Heading(first, "vllm-resident, architecture never seen", again),
            Heading(again, "vllm-resident, the same once more", again),
        ]

    def turn(self) -> Iterator[Sample]:
        model = next(self._models, None)
        if model is None:
            return
        for row in self._rows:
            there = self._pool.switch(model, self._args)
            yield there.sample(row)
            self._pool.switch(self._pair.other, self._args)


class Compiled(Resources):
    """With torch.compile: the first load of a model in its processes, then later ones.

    Takes a pool of its own: both models of the pair as they are, not eager.
    """

    def __init__(self, pair: Pair, pool: Pool) -> None:
        super().__init__()
        self._pair = pair
        self._pool = pool
        later = f"resident_compiled{pair.suffix}"
        self._row = first = f"resident_compiled_first{pair.suffix}"
        self._later = later
        self.headings = [
            Heading(first, "vllm-resident, compiled, first load", later),
            Heading(later, "vllm-resident, compiled, later load", later),
        ]

    def turn(self) -> list[Sample]:
        eager = engine_args(self._pair)
        self._pool.switch(self._pair.other, eager)
        compiled = {**eager, "enforce_eager": False}
        there = self._pool.switch(self._pair.measured, compiled)
        row, self._row = self._row, self._later
        return [there.sample(row)]


def _there_and_back(name: str, pair: Pair) -> tuple[str, str]:
    return f"{name}{pair.suffix}", f"{name}{pair.suffix}_{pair.other.nickname}"


@contextlib.contextmanager
def _ended_on_error(stack: ExitStack) -> Iterator[None]:
    """Entering may fail half way: then nobody will leave."""
    with contextlib.ExitStack() as guard:
        guard.push(stack)
        yield
        guard.pop_all()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable for what is started inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
