"""One rank's command loop with a real control, engines that are not there and no
controller: scenarios of what comes while it is busy.

Run as `python -m tests.process.loop_rank SCENARIO...` (`tests/members.py`), in a
process of its own since the loop imports the patched vLLM. Prints `RESULT {...}` lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm_resident.rank.prepare import prepare_process

DEVICE = prepare_process(0, 1)

# ruff: noqa: E402
from vllm.config import VllmConfig

from vllm_resident.errors import CommandRejected
from vllm_resident.messages import (
    BuildEngine,
    DropEngine,
    EngineClosed,
    EngineFailed,
    EngineMemory,
    ExitRank,
    PrepareEngine,
    RankGauges,
    SuspendEngine,
    ToRankMessage,
)
from vllm_resident.rank.control import Control
from vllm_resident.rank.hosted import Hosted
from vllm_resident.rank.lockstep import Wish
from vllm_resident.rank.loop import RankLoop
from vllm_resident.rank.transfer import Moved

BUILT, OTHER, LAST = 1, 2, 3


class Rank:
    """A rank whose build of `BUILT` is the `meanwhile` that a scenario gives."""

    def __init__(self) -> None:
        gauges = RankGauges(0, 0, 0, 0, 0)
        self.control = Control(0, 0, "inproc://nowhere", lambda: None, lambda: gauges)  # type: ignore[arg-type,return-value]
        closed = SimpleNamespace(close=lambda: None)
        parts: Any = SimpleNamespace(
            rank=0,
            device=DEVICE,
            control=self.control,
            lines=closed,
            communicators=closed,
            sockets=SimpleNamespace(sweep=lambda: None),
            memory_used=lambda: 0,
        )
        self.loop = RankLoop(parts)
        self.meanwhile: Callable[[], None] = lambda: None
        self.told: list[tuple[str, int]] = []
        self.loop._building.prepare = self._prepare  # type: ignore[method-assign]
        self.loop._building.build = self._build  # type: ignore[method-assign]

    def host(self, generation: int, **state: Any) -> Hosted:
        hosted = Hosted(generation, f"e{generation}", [0], **state)
        self.loop._engines.add(hosted)
        assert self.control.begin(generation)
        return hosted

    def _prepare(self, command: PrepareEngine) -> None:
        self.told.append(("prepare", command.generation))

    def _build(self, command: BuildEngine) -> None:
        self.told.append(("build", command.generation))
        if command.generation == BUILT:
            self.meanwhile()

    def tell(self, *commands: ToRankMessage) -> None:
        for command in commands:
            self.control._deliver(command)

    def hear(self, *commands: ToRankMessage) -> None:
        """As a build does."""
        self.tell(*commands)
        self.loop._hear_beside()

    def closed(self) -> list[int]:
        """The generations whose end was reported since the last call."""
        said = self.control._outbox.take_all()
        return [each.generation for each in said if isinstance(each, EngineClosed)]

    def said(self) -> list[str]:
        """The kinds of what was said since the last call, but for phases."""
        said = self.control._outbox.take_all()
        names = [type(each).__name__ for each in said]
        return [each for each in names if each.startswith("Engine")]

    def run(self) -> None:
        """Until everything that was told is done."""
        step = self.loop._step_engines

        def exit_when_done() -> bool:
            if not self.loop._waiting and self.control.inbox._queue.empty():
                self.tell(ExitRank(reason="done"))
            return step()

        self.loop._step_engines = exit_when_done  # type: ignore[method-assign]
        self.loop.run()


def prepare(generation: int) -> PrepareEngine:
    return PrepareEngine(
        generation=generation, name="b", model="m", engine_args={}, ranks=[0]
    )


def build(generation: int) -> BuildEngine:
    return BuildEngine(generation=generation, timeout_s=60.0)


def drop(generation: int) -> DropEngine:
    return DropEngine(generation=generation, reason="refused", timeout_s=10.0)


def _drop_beside(rank: Rank) -> dict[str, Any]:
    meanwhile: list[Any] = []

    def hear() -> None:
        rank.hear(drop(OTHER))
        meanwhile.extend([rank.closed(), rank.control._at_work])

    rank.meanwhile = hear
    rank.tell(build(BUILT))
    rank.run()
    return {
        "meanwhile": meanwhile,
        "afterwards": [rank.closed(), rank.control._at_work],
        "left": rank.loop.generations(),
    }


def drop_of_nothing() -> dict[str, Any]:
    return _drop_beside(Rank())


def drop_of_prepared() -> dict[str, Any]:
    rank = Rank()
    rank.host(OTHER)
    return _drop_beside(rank)


def drop_of_built() -> dict[str, Any]:
    rank = Rank()
    asleep: Any = SimpleNamespace(sleep_level=1, release=lambda *, orderly: None)
    rank.host(OTHER, engine=asleep)
    return _drop_beside(rank)


def drop_of_what_is_building() -> dict[str, Any]:
    rank = Rank()
    rank.host(OTHER, is_building=True)
    return _drop_beside(rank)


def _drop_behind(rank: Rank) -> dict[str, Any]:
    rank.run()
    return {"told": rank.told, "closed": rank.closed()}


def drop_behind_what_was_heard() -> dict[str, Any]:
    rank = Rank()
    rank.meanwhile = lambda: rank.hear(
        prepare(OTHER), build(OTHER), prepare(LAST), drop(OTHER)
    )
    rank.tell(build(BUILT))
    return _drop_behind(rank)


def drop_behind_what_came_with_the_build() -> dict[str, Any]:
    rank = Rank()
    rank.meanwhile = lambda: rank.hear(prepare(LAST), drop(OTHER))
    rank.tell(build(BUILT), prepare(OTHER), build(OTHER))
    return _drop_behind(rank)


class FakeEngine:
    """Has work for some steps; its own leader and requests, as far as asked."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.sleep_level = 0
        self.has_pending = False
        self.has_stopped = False
        self.wishes: list[tuple[int, Wish]] = []
        self.held: list[int] = []
        self.config = VllmConfig()
        self.world = SimpleNamespace(enter=lambda: None)
        self.numbers: list[int] = []

    @property
    def has_work(self) -> bool:
        return self.num_steps > 0

    def step(self) -> list[Any]:
        self.num_steps -= 1
        return []

    def collect(self, outputs: list[Any]) -> list[Any]:
        return outputs

    def settle(self) -> None:
        pass

    def stop(self) -> None:
        self.has_stopped = True

    def hold(self, generation: int) -> None:
        self.held.append(generation)

    def take_wishes(self) -> list[tuple[int, Wish]]:
        wishes, self.wishes = self.wishes, []
        return wishes

    def check_sleep(self, level: int) -> None:
        pass

    def sleep(self, level: int, start: Callable[[str], None]) -> Moved:
        self.sleep_level = level
        return Moved()

    def memory(self) -> EngineMemory:
        return EngineMemory()

    def release(self, *, orderly: bool) -> None:
        pass


def _held_rank() -> tuple[Rank, FakeEngine]:
    """Its engine is held by a follower, has work, and is told to sleep."""
    rank, engine = Rank(), FakeEngine(num_steps=3)
    fake: Any = engine
    hosted = rank.host(OTHER, engine=fake, leader=fake, requests=fake)
    hosted.holds.add((1, LAST))
    rank.loop._survive(
        SuspendEngine(generation=OTHER, level=1, timeout_s=60.0, finish_s=30.0)
    )
    return rank, engine


def sleep_while_held() -> dict[str, Any]:
    """Its work is done when the follower holds it no longer."""
    rank, engine = _held_rank()
    rank.loop._step_engines()
    held = [rank.said(), engine.num_steps, engine.has_stopped]
    engine.wishes.append((1, Wish(LAST, done=True)))
    rank.loop._step_engines()
    return {
        "held": held,
        "free": [rank.said(), engine.num_steps, engine.has_stopped],
        "level": engine.sleep_level,
    }


def drop_while_held() -> dict[str, Any]:
    """The follower is dead: it will hold it for ever."""
    rank, _ = _held_rank()
    rank.tell(drop(OTHER))
    rank.run()
    return {"said": rank.said(), "left": rank.loop.generations()}


def hold_beside_a_build() -> dict[str, Any]:
    """A follower asks for it while its leader builds another engine."""
    rank, engine = Rank(), FakeEngine(num_steps=3)
    fake: Any = engine
    shared = rank.host(OTHER, engine=fake, leader=fake, requests=fake)
    shared.ranks.append(1)
    shared.holds.add((0, BUILT))
    world: Any = SimpleNamespace(enter=lambda: None)
    building = rank.host(BUILT, is_building=True, world=world)
    engine.wishes.append((1, Wish(LAST, done=False)))
    rank.loop._building._beside(building).take_turn()
    return {"held": engine.held, "num_steps": engine.num_steps}


def sleep_refused_too_late() -> dict[str, Any]:
    """When it has begun: what it needs was there before it was held."""
    rank, engine = _held_rank()

    def refuse(level: int, start: Callable[[str], None]) -> Moved:
        start("free_weights")
        raise CommandRejected("no pinned memory is left")

    engine.sleep = refuse  # type: ignore[method-assign]
    engine.wishes.append((1, Wish(LAST, done=True)))
    rank.loop._step_engines()
    said = rank.control._outbox.take_all()
    errors = [each.error for each in said if isinstance(each, EngineFailed)]
    return {"errors": [[each.kind, each.phase] for each in errors]}


def main() -> None:
    for name in sys.argv[1:]:
        line = {"scenario": name, **globals()[name]()}
        sys.stdout.write(f"RESULT {json.dumps(line)}\n")


if __name__ == "__main__":
    main()
