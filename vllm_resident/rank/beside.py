"""What a rank does for its other engines while it forms a world or builds an engine.

Until the world's other ranks have come, everything goes on; while the engine is built,
engines that serve on this rank alone take a step now and then. Engines of several ranks
are held meanwhile. Which commands may be heard then, and how an engine steps, is the
loop's; how a build is interrupted is `turns`'.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_resident.errors import RankFailure
from vllm_resident.rank import turns
from vllm_resident.rank.hosted import Engines, Hosted
from vllm_resident.rank.parts import Parts
from vllm_resident.rank.serving import Serving


class Beside:
    """Of one build (a `meeting.Meanwhile`); on the main thread.

    `hear` takes the commands that touch no world and lets the others wait, `step` lets
    one engine do one step.
    """

    def __init__(
        self,
        building: Hosted,
        parts: Parts,
        engines: Engines,
        serving: Serving,
        hear: Callable[[], None],
        step: Callable[[Hosted], bool],
    ) -> None:
        self._building = building
        self._parts = parts
        self._engines = engines
        self._serving = serving
        self._hear = hear
        self._step = step

    def serve(self) -> None:
        """While the others of a world to be formed are not there or not held yet: a
        step of each engine, of several ranks too, and what followers ask."""
        self._hear()
        for hosted in self._engines:
            self._step_beside(hosted)

    def waits_for_leaders(self) -> bool:
        """Whether an engine of several ranks, which another rank leads, may be here."""
        return any(each.follower is not None for each in self._shared())

    def hold(self) -> bool:
        """Have the engines of several ranks here stopped, each at the same step on all
        of its ranks, while this one forms a world; True when they are.

        Otherwise a rank that is in such a step would wait for one that is forming, and
        that one, by way of the others of its world, for the first.
        """
        generation = self._building.generation
        are_held = True
        for each in self._shared():
            if each.leader is not None:
                self._serving.hold(each, 0, generation)
            elif each.follower is not None and not each.follower.stopped:
                each.follower.ask_to_hold(generation)
                # Of one that was given up nothing is to be expected any more.
                is_dropped = self._parts.control.is_dropped(each.generation)
                are_held &= is_dropped or generation in each.follower.held
        return are_held

    def end_hold(self) -> None:
        """The world's engine is built, or will not be. May be called without a hold."""
        generation = self._building.generation
        for each in self._engines:
            each.holds.discard((0, generation))
            if each.follower is not None:
                each.follower.end_hold(generation)

    def take_turn(self) -> None:
        """In the middle of a build: a step of each engine that serves here alone.

        An engine of several ranks has to wait: the others may be in a collective of
        what is built, which this rank has not come to. Its followers may be about to
        form a world as well, and wait to be told that it does.
        """
        building, device = self._building, self._parts.device
        if self._parts.control.is_dropped(building.generation):
            raise RankFailure("called off by the controller", phase="load_model")
        self._hear()
        for hosted in self._engines if turns.may_step(device) else ():
            if not hosted.steps:
                continue
            assert hosted.engine is not None
            if len(hosted.ranks) > 1:
                if hosted.leader is not None:
                    with turns.aside(hosted.engine.config, device):
                        self._serving.hear_followers(hosted)
                continue
            self._serving.hear(hosted)
            if hosted.has_work:
                with turns.aside(hosted.engine.config, device):
                    self._step_beside(hosted)
        assert building.world is not None
        building.world.enter()

    def _step_beside(self, hosted: Hosted) -> None:
        control = self._parts.control
        # One that was given up goes when the build is over.
        if not control.is_dropped(hosted.generation):
            with control.at_work_on(hosted.generation):
                self._step(hosted)

    def _shared(self) -> list[Hosted]:
        return [
            each
            for each in self._engines
            if each is not self._building and each.steps and len(each.ranks) > 1
        ]
