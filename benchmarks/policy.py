"""How long calls wait for their models: the on-demand policy against simpler ones.

    python -m benchmarks.policy [--trace NAME ...] [--seed N] [--json FILE]

A simulation of discrete events: no process, no real time, no torch. What it leaves out:
calls do not slow each other down, switches take what they are expected to and never
fail, memory is enough for every sleeper.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import traces
from benchmarks.traces import LONGEST, Call, Model, Scale, Trace
from vllm_resident.controller import policy
from vllm_resident.controller.policy import (
    BringUp,
    Decision,
    GiveUp,
    ModelView,
    Phase,
    PoolView,
    PutToSleep,
)

MEASURED = Path(__file__).parent / "results" / "switch-cpu.json"
# Where the file of results has no such row yet.
MEASURED_WAKE_S = 0.05
SERVICE_WEIGHT = 0.05

EPILOG = """\
policies
  policy     vllm_resident/controller/policy.py
  fifo       calls in the order in which they came: the next one's model is brought up
             at once, what is busy there is drained; calls behind one that has to wait
             wait too (those behind one whose model is coming up already do not)
  lru        calls go to engines that are awake; for a model that waits, the least
             recently used engine that is idle sleeps at once, busy ones never do; a
             model that sleeps wakes up where it is
  lru-moves  the same, but a model whose own ranks are busy is loaded anew on others

columns
  waits      seconds from a call's arrival to its start; a refused call waits for ever
  lost       share of the ranks' time spent on falling asleep, waking up and loading
  goodput    share of the calls that waited at most 10 times a wake-up and a mean call
  beats      whether the policy's p95 is below that of both fifo and lru ("=" where no
             switch is needed and it cannot be)

Every trace runs with small models (switches as measured on CPU, calls of 1 s) and with
large ones (--wake, --load, calls of 10 s). The simulator asserts throughout that every
call is answered by its model on ranks that are its own, and for the policy that no
model starves (starvation_bound_s).

examples
  python -m benchmarks.policy                        all traces, some minutes
  python -m benchmarks.policy --trace light wide     two of them, some seconds
  python -m benchmarks.policy --wake 1 --load 60     other large models
"""


@dataclass(frozen=True)
class Contender:
    """A policy to simulate. `in_order`: no call starts before one that came earlier,
    but for those whose model is coming up."""

    name: str
    decide: Callable[[PoolView, float], Decision]
    in_order: bool = False


# ------------------------------------------------------------------ baselines


def serve_next(
    pool: PoolView, _now: float, *, drains: bool = False, moves: bool = False
) -> Decision:
    """FIFO (`drains`) and LRU: the model whose oldest call is the oldest comes up, at
    once, where the least recently used engine is. `moves` lets a sleeper be loaded on
    other ranks than its own. FIFO looks no further than the first it cannot serve."""
    actions: list[BringUp] = []
    taken: set[int] = set()
    for model in sorted((m for m in pool.models if m.queue), key=lambda m: m.queue[0]):
        if model.phase is Phase.COMING:
            continue
        ways = _ways(pool, model, taken, drains, moves) if model.is_down else []
        if ways:
            _, best = min(ways, key=lambda way: way[0])
            actions.append(best)
            gone = {*best.sleep, *best.drain}
            taken.update(best.ranks, *(m.ranks for m in pool.models if m.name in gone))
        elif drains:
            break
    return Decision(tuple(actions))


def _ways(
    pool: PoolView, model: ModelView, taken: set[int], drains: bool, moves: bool
) -> list[tuple[tuple[int, bool, float], BringUp]]:
    """Each way with its rating: fewest drained, at home if it can be, then by use."""
    ways = []
    for ranks in _places(pool, model):
        is_move = model.phase is Phase.ASLEEP and ranks != model.ranks
        out = _evicted(pool, ranks)
        busy = [v for v in out if v.is_busy]
        if any(v.phase is not Phase.AWAKE or v.pinned for v in out):
            continue
        if (is_move and not moves) or (busy and not drains) or taken & set(ranks):
            continue
        rating = (len(busy), is_move, max((v.last_call for v in out), default=0.0))
        sleep = tuple(v.name for v in out if not v.in_flight)
        drain = tuple(v.name for v in out if v.in_flight)
        ways.append((rating, BringUp(model.name, ranks, sleep, drain, is_move)))
    return ways


def _places(pool: PoolView, model: ModelView) -> Iterator[tuple[int, ...]]:
    if model.ranks:
        yield model.ranks
    for start in range(0, len(pool.ranks), model.num_ranks):
        yield tuple(range(start, start + model.num_ranks))


def _evicted(pool: PoolView, ranks: tuple[int, ...]) -> list[ModelView]:
    there = [
        m for m in pool.models if m.is_placed and not set(ranks).isdisjoint(m.ranks)
    ]
    wide = [m for m in there if len(ranks) > 1 and len(m.ranks) > 1]
    out = [m for m in wide if m.ranks[0] != ranks[0]]
    for rank in ranks:
        here = [m for m in there if rank in m.ranks and m not in out]
        here.sort(key=lambda m: (m.phase is not Phase.AWAKE, m.is_busy, m.last_call))
        out += here[: max(0, len(here) - pool.awake_per_rank + 1)]
    return out


CONTENDERS = (
    Contender("policy", policy.decide),
    Contender("fifo", partial(serve_next, drains=True), in_order=True),
    Contender("lru", serve_next),
    Contender("lru-moves", partial(serve_next, moves=True)),
)
# Whose p95 the policy's is to be below.
TO_BEAT = ("fifo", "lru")


# ------------------------------------------------------------------ simulation


class Engine:
    """What the simulated pool knows of one model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.queue: deque[tuple[int, Call]] = deque()
        self.view = ModelView(
            model.name, model.costs, model.num_ranks, model.limits, model.pinned,
            num_slots=model.num_slots, service_s=model.service_s,
        )  # fmt: skip
        # When its oldest call became the oldest, for the bound on starving.
        self.head_since = 0.0
        self.when_idle: Callable[[], None] | None = None

    @property
    def can_start(self) -> bool:
        view = self.view
        return view.phase is Phase.AWAKE and view.in_flight < view.num_slots

    def change(self, **changes: Any) -> None:
        self.view = replace(self.view, **changes)

    def queue_changed(self) -> None:
        self.change(queue=tuple(call.at for _, call in self.queue))


class Simulation:
    """One trace under one policy; `run` it, then read the figures."""

    def __init__(self, trace: Trace, contender: Contender) -> None:
        self.trace = trace
        self.contender = contender
        self.engines = {m.name: Engine(m) for m in trace.models}
        self.now = 0.0
        self.waits: list[float] = []
        self.num_refused = self.num_switches = self.num_loads = 0
        self.lost_rank_s = 0.0
        self.longest_head_s = 0.0
        self.num_idled = self.num_answered = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._look_at = math.inf
        self._in_memory: dict[str, tuple[int, ...]] = {}
        if trace.is_warm:
            self._load_all()

    def _load_all(self) -> None:
        start = 0
        for engine in self.engines.values():
            width = engine.view.num_ranks
            start = -(-start // width) * width % self.trace.num_ranks
            ranks = tuple(range(start, start + width))
            engine.change(phase=Phase.ASLEEP, sleep_level=1, ranks=ranks)
            start += width

    @property
    def pool(self) -> PoolView:
        return PoolView(
            tuple(range(self.trace.num_ranks)),
            tuple(engine.view for engine in self.engines.values()),
            self.trace.awake_per_rank,
            drain_s=LONGEST * max(m.service_s for m in self.trace.models),
        )

    @property
    def bound_s(self) -> float:
        """`starvation_bound_s` where calls take as long as they may."""
        models = tuple(
            replace(view, service_s=LONGEST * self.engines[view.name].model.service_s)
            for view in self.pool.models
        )
        return policy.starvation_bound_s(replace(self.pool, models=models))

    def run(self) -> Simulation:
        for call in self.trace.calls:
            self.add(call)
        self.advance(math.inf)
        assert not any(engine.queue for engine in self.engines.values()), "starved"
        assert self.num_answered + self.num_refused == len(self.trace.calls)
        if self.contender.decide is policy.decide:
            assert self.longest_head_s <= self.bound_s, "starved"
        return self

    def add(self, call: Call) -> None:
        """A call that arrives at `call.at`, now at the earliest."""
        self._at(call.at, partial(self._arrive, call))

    def advance(self, until: float) -> None:
        """Let everything happen that happens up to then."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
            self._start_calls()
            self._decide()
        if math.isfinite(until):
            self.now = until

    def _at(self, at: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), event))

    def _arrive(self, call: Call) -> None:
        engine = self.engines[call.model]
        limits = engine.model.limits
        is_limited = limits.max_queue is not None or limits.max_wait_s is not None
        if is_limited and policy.admit(self.pool, call.model, self.now):
            self.num_refused += 1
            return
        view = engine.view
        gap_s = policy.average_gap(view.gap_s, view.last_call, self.now)
        engine.change(gap_s=gap_s, last_call=self.now)
        if not engine.queue:
            engine.head_since = self.now
        engine.queue.append((next(self._numbers), call))
        engine.queue_changed()

    def _start_calls(self) -> None:
        while engine := self._next_to_start():
            _, call = engine.queue.popleft()
            assert call.model == engine.view.name
            assert self._in_memory[call.model] == engine.view.ranks
            self.waits.append(self.now - call.at)
            head_s = self.now - engine.head_since
            self.longest_head_s = max(self.longest_head_s, head_s)
            engine.head_since = self.now
            engine.change(in_flight=engine.view.in_flight + 1)
            engine.queue_changed()
            self._at(self.now + call.service_s, partial(self._finish, engine, call))

    def _next_to_start(self) -> Engine | None:
        waiting = [engine for engine in self.engines.values() if engine.queue]
        if not self.contender.in_order:
            return next((engine for engine in waiting if engine.can_start), None)
        waiting = [e for e in waiting if e.view.phase is not Phase.COMING]
        first = min(waiting, key=lambda e: e.queue[0][0], default=None)
        return first if first and first.can_start else None

    def _finish(self, engine: Engine, call: Call) -> None:
        self.num_answered += 1
        view = engine.view
        service_s = view.service_s + SERVICE_WEIGHT * (call.service_s - view.service_s)
        engine.change(in_flight=view.in_flight - 1, service_s=service_s)
        if engine.view.in_flight:
            return
        engine.change(idle_since=self.now)
        if (then := engine.when_idle) is not None:
            engine.when_idle = None
            then()

    def _decide(self) -> None:
        decision = self.contender.decide(self.pool, self.now)
        for action in decision.actions:
            match action:
                case BringUp():
                    self._bring_up(action)
                case PutToSleep():
                    self._put_to_sleep(action)
                case GiveUp():
                    self._give_up(action)
        look_at = decision.look_again_at
        if look_at is not None and not self.now < self._look_at <= look_at:
            self._look_at = look_at
            self._at(look_at, lambda: None)

    def _bring_up(self, action: BringUp) -> None:
        engine = self.engines[action.model]
        victims = [self.engines[name] for name in (*action.sleep, *action.drain)]
        assert engine.view.is_down
        assert not any(self.engines[name].view.in_flight for name in action.sleep)
        is_wake = engine.view.phase is Phase.ASLEEP and not action.is_move
        costs = engine.model.costs
        up_s = costs.wake_up_s[1] if is_wake else costs.load_s
        sleep_s = max((v.model.costs.sleep_s for v in victims), default=0.0)
        drain_s = max(
            (v.view.service_s for v in victims if v.view.in_flight), default=0
        )
        self.num_switches += 1
        self.num_loads += not is_wake
        until = self.now + drain_s + sleep_s
        engine.change(phase=Phase.COMING, ranks=action.ranks, phase_until=until + up_s)
        draining = {v.view.name for v in victims if v.view.in_flight}

        def drained(name: str = "") -> None:
            draining.discard(name)
            if draining:
                return
            self.lost_rank_s += (sleep_s + up_s) * len(action.ranks)
            engine.change(phase_until=self.now + sleep_s + up_s)
            self._at(self.now + sleep_s, asleep)

        def asleep() -> None:
            for victim in victims:
                self._fell_asleep(victim)
            self._in_memory[action.model] = action.ranks
            self._check_memory()
            self._at(self.now + up_s, partial(self._came_up, engine))

        for victim in victims:
            assert victim.view.phase is Phase.AWAKE
            assert not victim.view.pinned
            victim.change(phase=Phase.GOING, phase_until=until)
            if victim.view.in_flight:
                victim.when_idle = partial(drained, victim.view.name)
        if not draining:
            drained()

    def _put_to_sleep(self, action: PutToSleep) -> None:
        engine = self.engines[action.model]
        assert not engine.view.is_busy
        assert not engine.view.pinned
        self.num_idled += 1
        until = self.now + engine.model.costs.sleep_s
        engine.change(phase=Phase.GOING, phase_until=until)
        self._at(until, partial(self._fell_asleep, engine))

    def _give_up(self, action: GiveUp) -> None:
        engine = self.engines[action.model]
        for _ in range(action.num_requests):
            engine.queue.popleft()
            self.num_refused += 1
        engine.head_since = self.now
        engine.queue_changed()

    def _fell_asleep(self, engine: Engine) -> None:
        assert engine.view.in_flight == 0
        del self._in_memory[engine.view.name]
        engine.change(phase=Phase.ASLEEP, sleep_level=1, down_since=self.now)

    def _came_up(self, engine: Engine) -> None:
        engine.change(
            phase=Phase.AWAKE, sleep_level=0, awake_since=self.now, idle_since=self.now
        )

    def _check_memory(self) -> None:
        for rank in range(self.trace.num_ranks):
            there = [name for name, ranks in self._in_memory.items() if rank in ranks]
            assert len(there) <= self.trace.awake_per_rank, there


# ------------------------------------------------------------------ figures


@dataclass(frozen=True)
class Row:
    """What one policy made of one trace. Waits in seconds, shares from 0 to 1."""

    trace: str
    policy: str
    num_calls: int
    median_s: float
    p95_s: float
    p99_s: float
    max_s: float
    num_switches: int
    num_loads: int
    lost_share: float
    goodput_share: float
    num_refused: int


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def simulate(trace: Trace, contender: Contender) -> Row:
    done = Simulation(trace, contender).run()
    waits = sorted([*done.waits, *([math.inf] * done.num_refused)])
    good = sum(wait <= trace.patience_s for wait in waits)
    median_s, p95_s, p99_s, max_s = (
        percentile(waits, share) for share in (0.5, 0.95, 0.99, 1.0)
    )
    return Row(
        trace.name, contender.name, len(waits), median_s, p95_s, p99_s, max_s,
        done.num_switches, done.num_loads,
        done.lost_rank_s / (done.now * trace.num_ranks),
        good / len(waits), done.num_refused,
    )  # fmt: skip


def beats(rows: Sequence[Row], needs_switches: bool) -> bool:
    """Whether the policy's p95 is below both baselines', or equal where no switch is
    needed; and it refuses no more than they do."""
    by_name = {row.policy: row for row in rows}
    own = by_name["policy"]
    others = [by_name[name] for name in TO_BEAT]
    if own.num_refused > min(row.num_refused for row in others):
        return False
    best = min(row.p95_s for row in others)
    return own.p95_s < best or (not needs_switches and own.p95_s <= best)


# ------------------------------------------------------------------ command line


def measured(file: Path = MEASURED) -> Scale:
    """Small models: what `benchmarks.switch` measured on CPU."""
    rows = {
        row["name"]: row["median_s"] for row in json.loads(file.read_text())["rows"]
    }
    wake_s = rows.get("wake_level_1", MEASURED_WAKE_S)
    return Scale("small", wake_s, rows["resident"], service_s=1.0)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policy",
        description="Simulate which models are up when calls for more models come than "
        "fit, and\nhow long the calls wait: the pool's policy against simpler ones.",
        epilog="traces\n"
        + "".join(f"  {r.name:<12} {r.note}\n" for r in traces.RECIPES)
        + "\n"
        + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [recipe.name for recipe in traces.RECIPES]
    parser.add_argument(
        "--trace", nargs="+", choices=names, default=names, metavar="NAME",
        help="which traces, of those below (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the arrivals (default: 0)"
    )
    parser.add_argument(
        "--wake", type=_seconds, default=3.0, metavar="S",
        help="large models: from one that is awake to one at level 1 (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--load", type=_seconds, default=30.0, metavar="S",
        help="large models: from one that is awake to one not loaded (default: 30)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    arguments = parser.parse_args(argv)
    if arguments.load < arguments.wake:
        parser.error("--load: a load takes no less than a wake-up (--wake)")
    return arguments


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text}: not a positive number of seconds")
    return value


def _table(title: str) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0)
    )
    for name in ("trace", "policy"):
        table.add_column(name, no_wrap=True)
    for name in ("median", "p95", "p99", "max", "switches", "loads", "lost",
                 "goodput", "refused", "beats"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, row: Row, verdict: str) -> None:
    waits = (row.median_s, row.p95_s, row.p99_s, row.max_s)
    is_own = row.policy == "policy"
    table.add_row(
        row.trace if is_own else "", row.policy, *(f"{wait:.2f}" for wait in waits),
        str(row.num_switches), str(row.num_loads), f"{row.lost_share:.1%}",
        f"{row.goodput_share:.1%}", str(row.num_refused), verdict if is_own else "",
        style="bold" if is_own else "",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where the policy is beaten."""
    arguments = parse_arguments(argv)
    scales = (measured(), Scale("large", arguments.wake, arguments.load, 10.0, 16))
    table = _table(f"Waits in seconds, seed {arguments.seed}")
    rows: list[Row] = []
    lost = []
    for scale in scales:
        for recipe in (r for r in traces.RECIPES if r.name in arguments.trace):
            trace = traces.make(recipe, scale, arguments.seed)
            print(f"{trace.name} ...", file=sys.stderr, flush=True)
            found = [simulate(trace, contender) for contender in CONTENDERS]
            is_better = beats(found, trace.needs_switches)
            if not is_better:
                lost.append(trace.name)
            verdict = "yes" if trace.needs_switches else "="
            for row in found:
                _add(table, row, verdict if is_better else "NO")
            rows += found
    Console(width=120).print(table)
    if arguments.json:
        document = {
            "seed": arguments.seed,
            "scales": [{**asdict(scale), "costs": None} for scale in scales],
            "rows": [asdict(row) for row in rows],
            "beaten_on": lost,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if lost:
        print(f"beaten on: {', '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
