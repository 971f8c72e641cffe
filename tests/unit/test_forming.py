"""Worlds that form never wait for each other in a cycle, nor for engines that serve.

The controller is the real one; ranks are modelled as `rank/loop.py`, `rank/beside.py`
and `rank/world.py` behave where they wait: commands one by one in the order they came,
a meeting in which the rank goes on stepping until all have come, a hold at the same
step on all ranks of an engine, a second meeting of those that are held, then nothing
else until the world is formed. A random scheduler decides who does what next. What
would break this is tried too: the same model must then lock up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from msgspec import structs

from tests.unit.controller_harness import Harness, answer, spec
from vllm_resident.controller.effects import Effect, SendToRank
from vllm_resident.controller.state import EnginePhase
from vllm_resident.messages import (
    BuildEngine,
    CloseEngine,
    DropEngine,
    EngineSpec,
    PrepareEngine,
    ResumeEngine,
    SuspendEngine,
    ToRankMessage,
)

NUM_RANKS = 4
NUM_COMMANDS = 20
READY = EnginePhase.READY

Move = Callable[[], None]


@dataclass
class ModelEngine:
    """One engine as one rank has it."""

    generation: int
    ranks: list[int]
    built: bool = False
    asleep: bool = False
    # Of a follower: what its leader has said and it has not read, and what it has.
    plans: list[tuple[str, int]] = field(default_factory=list)
    stopped: bool = False
    # Worlds that its leader has stopped it for.
    held: set[int] = field(default_factory=set)
    ending: ToRankMessage | None = None
    num_steps: int = 0
    # Of a leader: steps that its requests need; who holds it, for which world; what
    # followers have asked ("hold") or told ("done") and it has not read.
    work: int = 0
    holds: set[tuple[int, int]] = field(default_factory=set)
    wishes: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def steps(self) -> bool:
        return self.built and not self.asleep and len(self.ranks) > 1


@dataclass
class ModelRank:
    """One rank's main thread: where it is, and what it is to do next."""

    number: int
    inbox: list[ToRankMessage] = field(default_factory=list)
    engines: dict[int, ModelEngine] = field(default_factory=dict)
    forming: BuildEngine | None = None
    stage: str = "meet"  # then "hold", perhaps "held", and "form"
    # Whether it said at the meeting that other ranks lead what is to be held.
    waits_for_leaders: bool = False
    # (generation, step) of the collective it is in.
    collective: tuple[int, int] | None = None


class ModelPool:
    """The real controller over model ranks, driven by one source of chance."""

    def __init__(self, seed: int, broken: str = ""):
        self.draw = random.Random(seed)
        self.broken = broken
        self.harness = Harness(NUM_RANKS)
        self.harness.state.awake_per_rank = 3
        self.ranks = [ModelRank(number) for number in range(NUM_RANKS)]
        self.num_names = 0
        self.num_formed = 0
        self.num_steps_beside = 0

    # ------------------------------------------------------------ chance

    def run(self) -> None:
        """Commands and moves as chance has it, then moves until there are none."""
        for _ in range(NUM_COMMANDS):
            self.draw.choice([self.command, self.request])()
            for _ in range(self.draw.randrange(8)):
                self.move()
        self.settle()

    def settle(self) -> None:
        """Moves until there are none."""
        while self.move():
            pass

    def load(self, engine: EngineSpec) -> None:
        self.harness.load(engine)
        self.deliver(self.harness.effects)

    def move(self) -> bool:
        moves = [move for rank in self.ranks for move in self.moves(rank)]
        if moves:
            self.draw.choice(moves)()
        return bool(moves)

    def command(self) -> None:
        """Of a client; what the controller rejects has changed nothing."""
        state, draw = self.harness.state, self.draw
        names = [engine.name for engine in state.engines.values()]
        members = draw.sample(range(NUM_RANKS), draw.randint(1, NUM_RANKS))
        self.num_names += 1
        new = spec(f"e{self.num_names}", members)
        kind = draw.choice(["load", "load", "unload", "sleep", "wake_up", "switch"])
        if kind == "load" or not names:
            self.harness.load(new)
        elif kind == "unload":
            self.harness.unload(draw.choice(names))
        elif kind == "sleep":
            self.harness.sleep(draw.choice(names))
        elif kind == "wake_up":
            self.harness.wake_up(draw.choice(names))
        else:
            strategy = draw.choice(["stage", "stage", "sleep", "unload"])
            self.harness.switch(draw.choice(names), new, strategy)
        self.deliver(self.harness.effects)

    def request(self) -> None:
        """One that takes some steps, of an engine that serves."""
        serving = [e for e in self.harness.state.engines.values() if e.phase is READY]
        if serving:
            engine = self.draw.choice(serving)
            theirs = self.ranks[engine.leader].engines[engine.generation]
            theirs.work += self.draw.randint(1, 4)

    def deliver(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendToRank):
                self.ranks[effect.rank].inbox.append(effect.message)

    def reply(self, rank: ModelRank, command: ToRankMessage) -> None:
        reply = answer(rank.number, command)
        assert reply is not None
        self.deliver(self.harness.rank(reply))

    # ------------------------------------------------------------ what a rank can do

    def moves(self, rank: ModelRank) -> Iterator[Move]:
        if rank.collective is not None or rank.stage == "form":
            return
        alone = self.broken == "stops alone" and any(
            self.is_to_stop(rank, each) for each in rank.engines.values()
        )
        if rank.forming is None and rank.inbox and not alone:
            yield lambda: self.handle(rank, self.next_command(rank))
        if rank.forming is not None and self.can_go_on(rank):
            yield lambda: self.go_on(rank)
        if rank.forming is not None and self.broken == "deaf":
            return
        for engine in list(rank.engines.values()):
            if not alone or self.is_to_stop(rank, engine):
                yield from self.moves_of(rank, engine)

    def moves_of(self, rank: ModelRank, engine: ModelEngine) -> Iterator[Move]:
        if engine.wishes:
            yield lambda: self.hear(rank, engine)
        if not engine.steps:
            return
        if engine.ranks[0] != rank.number:
            if engine.plans:
                yield lambda: self.follow(rank, engine)
        elif not engine.holds:
            if engine.work:
                yield lambda: self.lead(rank, engine)
            if engine.ending is not None:
                yield lambda: self.stop(rank, engine)

    def next_command(self, rank: ModelRank) -> ToRankMessage:
        any_order = self.broken == "any order"
        place = self.draw.randrange(len(rank.inbox)) if any_order else 0
        return rank.inbox.pop(place)

    def handle(self, rank: ModelRank, command: ToRankMessage) -> None:
        generation = getattr(command, "generation", 0)
        engine = rank.engines.get(generation)
        match command:
            case PrepareEngine(ranks=ranks):
                rank.engines[generation] = ModelEngine(generation, ranks)
                self.reply(rank, command)
            case BuildEngine():
                rank.forming, rank.stage = command, "meet"
                rank.waits_for_leaders = any(
                    each.steps and each.ranks[0] != rank.number
                    for each in rank.engines.values()
                )
            case SuspendEngine() | CloseEngine() if engine is not None:
                engine.ending = command
                self.stop(rank, engine)
            case ResumeEngine() if engine is not None:
                engine.asleep = engine.stopped = False
                self.reply(rank, command)
            case DropEngine():
                rank.engines.pop(generation, None)
                self.reply(rank, command)

    @staticmethod
    def is_to_stop(rank: ModelRank, engine: ModelEngine) -> bool:
        """Of a leader that is held: it has work that only a step could end."""
        return engine.ranks[0] == rank.number and engine.ending is not None

    def stop(self, rank: ModelRank, engine: ModelEngine) -> None:
        """A leader says that there is no next step, a follower waits to hear it."""
        leads = engine.ranks[0] == rank.number
        sleeps = isinstance(engine.ending, SuspendEngine) and not engine.asleep
        if leads and sleeps and engine.work and engine.holds:
            return
        if leads and not engine.asleep:
            engine.work = 0
            self.tell_followers(engine, ("stop", 0))
        if leads or engine.asleep or engine.stopped:
            self.end(rank, engine)

    def end(self, rank: ModelRank, engine: ModelEngine) -> None:
        command, engine.ending = engine.ending, None
        assert command is not None
        engine.asleep = True
        if isinstance(command, CloseEngine):
            del rank.engines[engine.generation]
        self.reply(rank, command)

    # ------------------------------------------------------------ forming

    def can_go_on(self, rank: ModelRank) -> bool:
        assert rank.forming is not None
        generation = rank.forming.generation
        ranks = rank.engines[generation].ranks
        if rank.stage == "meet":
            there = [self.ranks[each].forming for each in ranks]
            return all(each and each.generation == generation for each in there)
        if rank.stage == "held":
            stages = [self.ranks[each].stage for each in ranks]
            return not {"meet", "hold"} & set(stages)
        return self.broken in ("deaf", "no hold") or all(
            each.stopped or generation in each.held
            for each in rank.engines.values()
            if each.steps and each.ranks[0] != rank.number
        )

    def go_on(self, rank: ModelRank) -> None:
        assert rank.forming is not None
        generation = rank.forming.generation
        if rank.stage == "meet":
            rank.stage = "hold"
            self.wish(rank, "hold", generation)
            return
        members = [self.ranks[each] for each in rank.engines[generation].ranks]
        meets_again = self.broken not in ("met once", "no hold") and any(
            each.waits_for_leaders for each in members
        )
        if rank.stage == "hold" and meets_again:
            rank.stage = "held"
            return
        rank.stage = "form"
        if all(each.stage == "form" for each in members):
            self.num_formed += 1
            for each in members:
                self.formed(each)

    def wish(self, rank: ModelRank, kind: str, generation: int) -> None:
        """Of each engine that steps here: that its leader holds it, or need not."""
        for each in rank.engines.values():
            if not each.steps or each.generation == generation:
                continue
            theirs = self.ranks[each.ranks[0]].engines.get(each.generation)
            if theirs is not None:
                theirs.wishes.append((kind, rank.number, generation))
            if each.ranks[0] == rank.number:
                self.hear(rank, each)

    def hear(self, rank: ModelRank, engine: ModelEngine) -> None:
        while engine.wishes:
            kind, who, generation = engine.wishes.pop(0)
            if kind == "done":
                engine.holds.discard((who, generation))
                continue
            if not any(each == generation for _, each in engine.holds):
                self.tell_followers(engine, ("hold", generation))
            engine.holds.add((who, generation))

    def formed(self, rank: ModelRank) -> None:
        command, rank.forming, rank.stage = rank.forming, None, "meet"
        assert command is not None
        rank.engines[command.generation].built = True
        self.wish(rank, "done", command.generation)
        self.reply(rank, command)

    # ------------------------------------------------------------ serving

    def tell_followers(self, engine: ModelEngine, plan: tuple[str, int]) -> None:
        for number in engine.ranks[1:]:
            theirs = self.ranks[number].engines.get(engine.generation)
            if theirs is not None:
                theirs.plans.append(plan)

    def lead(self, rank: ModelRank, engine: ModelEngine) -> None:
        engine.work -= 1
        self.num_steps_beside += rank.forming is not None
        self.tell_followers(engine, ("step", 0))
        self.step(rank, engine)

    def follow(self, rank: ModelRank, engine: ModelEngine) -> None:
        kind, what = engine.plans.pop(0)
        if kind == "step":
            self.step(rank, engine)
        elif kind == "hold":
            engine.held.add(what)
        else:
            engine.stopped = True
            if engine.ending is not None:
                self.end(rank, engine)

    def step(self, rank: ModelRank, engine: ModelEngine) -> None:
        """A collective of the engine: it ends when all its ranks are in it."""
        engine.num_steps += 1
        rank.collective = (engine.generation, engine.num_steps)
        members = [self.ranks[each] for each in engine.ranks]
        if all(each.collective == rank.collective for each in members):
            for each in members:
                each.collective = None

    # ------------------------------------------------------------ in the end

    def stuck(self) -> list[str]:
        """Who waits for what, when nobody can do anything any more."""
        return [
            f"rank {r.number}: {r.stage if r.forming else ''} {r.forming} "
            f"{r.collective} {r.inbox}"
            for r in self.ranks
            if r.forming is not None or r.collective is not None or r.inbox
        ] + [switch.action for switch in self.harness.state.switches]


def locked_up(seeds: range, broken: str = "") -> tuple[list[int], int, int]:
    """The seeds that ended with somebody waiting; how many worlds were formed, and
    steps taken by ranks that were waiting to form one."""
    stuck, num_formed, num_steps = [], 0, 0
    for seed in seeds:
        pool = ModelPool(seed, broken)
        pool.run()
        num_formed += pool.num_formed
        num_steps += pool.num_steps_beside
        if pool.stuck():
            stuck.append(seed)
    return stuck, num_formed, num_steps


def test_two_thousand_interleavings_never_lock_up() -> None:
    stuck, num_formed, num_steps = locked_up(range(2000))
    assert not stuck
    assert num_formed > 4000
    assert num_steps > 100


def cross_locked_up(seeds: range, broken: str = "") -> list[int]:
    """Two engines serve on a pair of ranks each; a world over the first and the last
    rank forms, and one over the two between. Each has a rank that the other's follower
    needs: its leader. The seeds that ended with somebody waiting."""
    stuck = []
    for seed in seeds:
        pool = ModelPool(seed, broken)
        for each in (spec("left", [0, 1]), spec("right", [2, 3])):
            pool.load(each)
            pool.settle()
        for each in (spec("outer", [0, 3]), spec("inner", [1, 2])):
            pool.load(structs.replace(each, asleep=True))
        pool.settle()
        if pool.stuck():
            stuck.append(seed)
    return stuck


def stops_locked_up(seeds: range, broken: str = "") -> list[int]:
    """Two engines have the same leader; a world over their followers forms while one of
    them is busy, and that one is put to sleep. The seeds that ended with somebody
    waiting."""
    stuck = []
    for seed in seeds:
        pool = ModelPool(seed, broken)
        for each in (spec("busy", [0, 1]), spec("idle", [0, 2])):
            pool.load(each)
            pool.settle()
        pool.ranks[0].engines[pool.harness.engine("busy").generation].work = 4
        pool.load(structs.replace(spec("new", [1, 2]), asleep=True))
        for _ in range(pool.draw.randrange(12)):
            pool.move()
        pool.harness.sleep("busy")
        pool.deliver(pool.harness.effects)
        pool.settle()
        if pool.stuck():
            stuck.append(seed)
    return stuck


def test_a_leader_that_is_to_stop_what_is_held_serves_its_other_engines() -> None:
    assert not stops_locked_up(range(200))
    assert stops_locked_up(range(200), "stops alone")


def test_worlds_that_need_each_others_leaders_form() -> None:
    assert not cross_locked_up(range(200))
    assert cross_locked_up(range(200), "met once")


@pytest.mark.parametrize("broken", ["any order", "deaf", "no hold"])
def test_the_model_would_notice(broken: str) -> None:
    """Ranks that form worlds in an order of their own, that wait for each other at a
    meeting without serving, or that go on from it at different steps, do lock up."""
    stuck, _, _ = locked_up(range(200), broken)
    assert stuck
