"""The engines of one rank at work: requests in, steps taken, outputs out.

What is done between an engine's building and its end, on leaders and followers. How
one is built is `building`'s, how it is put to sleep and given back `stopping`'s.
"""

from __future__ import annotations

import time

from vllm.v1.engine import FinishReason

from vllm_resident import messages
from vllm_resident.errors import CommandRejected, RankTimeout
from vllm_resident.rank import ledger, lockstep
from vllm_resident.rank.control import Control
from vllm_resident.rank.hosted import Hosted


class Serving:
    """What is done with a rank's engines between their building and their end."""

    def __init__(self, rank: int, control: Control) -> None:
        self._rank = rank
        self._control = control

    def add(self, hosted: Hosted, command: messages.AddRequest) -> None:
        """Take a generate call in, or answer why not."""
        if hosted.requests is None or hosted.failed:
            return
        try:
            if hosted.asleep:
                raise CommandRejected(f"{hosted.name} is asleep: wake it up first")
            hosted.requests.add(
                command.request,
                command.prompts,
                command.sampling_params,
                command.stream,
            )
        except CommandRejected as error:
            self._control.send(
                messages.RequestFailed(
                    rank=self._rank,
                    generation=command.generation,
                    request=command.request,
                    error=error.to_info(),
                )
            )
            return
        self._control.send(
            messages.RequestsAccepted(
                rank=self._rank,
                generation=command.generation,
                request=command.request,
            )
        )

    def end_request(self, hosted: Hosted, number: int) -> None:
        """Abort a request that is there; whoever waits for it gets its end."""
        if hosted.requests is not None and number in hosted.requests.numbers:
            self._output(hosted, number, hosted.requests.abort(number), True)

    def end_requests(self, hosted: Hosted) -> None:
        """Abort all that is left, of whomever it is."""
        if hosted.requests is not None:
            for number in hosted.requests.numbers:
                self.end_request(hosted, number)
        if hosted.frontends is not None:
            hosted.frontends.end_requests(FinishReason.ABORT)

    def connect(self, hosted: Hosted | None, command: messages.ConnectFrontend) -> None:
        """Serve a frontend, or answer why not."""
        error = None
        try:
            if hosted is None or hosted.frontends is None or hosted.failed:
                raise CommandRejected("this rank leads no such engine")
            hosted.frontends.connect(
                command.frontend, command.input_address, command.output_address
            )
        except CommandRejected as refused:
            error = refused.to_info()
        self._control.send(
            messages.FrontendConnected(
                rank=self._rank,
                generation=command.generation,
                frontend=command.frontend,
                error=error,
            )
        )

    def hear(self, hosted: Hosted) -> bool:
        """Take what an engine's frontends have sent; True if there was anything."""
        if hosted.leader is not None:
            self.hear_followers(hosted)
        if hosted.frontends is None or hosted.failed:
            return False
        takes_nothing = hosted.asleep or hosted.suspension is not None
        return hosted.frontends.receive(hold=takes_nothing)

    def hear_followers(self, hosted: Hosted) -> None:
        """On the leader: hold the engine, or no longer, as they have asked."""
        assert hosted.leader is not None
        for follower, wish in hosted.leader.take_wishes():
            if wish.done:
                hosted.holds.discard((follower, wish.generation))
            else:
                self.hold(hosted, follower, wish.generation)

    def hold(self, hosted: Hosted, place: int, generation: int) -> None:
        """On the leader: no step from here on, until whoever asked (by its place in
        the engine) has formed the world of `generation`. Its rank could not take part:
        whoever steps would wait for it, and it perhaps for them."""
        assert hosted.leader is not None
        assert hosted.engine is not None
        if not any(world == generation for _, world in hosted.holds):
            hosted.engine.world.enter()
            hosted.leader.hold(generation)
        hosted.holds.add((place, generation))

    def step(self, hosted: Hosted) -> bool:
        """Let an engine do what it can: a leader one step, a follower what the next
        plan says, if there is one. True if there was anything."""
        engine = hosted.engine
        assert engine is not None
        if hosted.follower is not None:
            if hosted.follower.stopped:
                return False
            engine.world.enter()
            return self._follow(hosted.name, hosted.follower)
        assert hosted.leader is not None
        if not hosted.has_work or hosted.holds:
            return False
        self._lead(hosted)
        if not hosted.has_work:
            hosted.leader.settle()
        return True

    def _follow(self, name: str, follower: lockstep.Follower) -> bool:
        num_steps, began = follower.num_steps, time.monotonic()
        has_followed = follower.follow()
        if follower.num_steps != num_steps:
            ledger.count_step(name, time.monotonic() - began)
        return has_followed

    def stop(self, hosted: Hosted, finish_by: float, deadline: float) -> bool:
        """On the leader: finish what runs, abort what still does at `finish_by`, step
        until nothing is in flight on any rank, then tell the followers that this was
        the last step. Takes nothing in meanwhile: what comes is there when it is awake
        again. Blocks while it steps; False if it is held and has to be called again,
        or was given up. Raises `RankTimeout` at the deadline."""
        engine, leader = hosted.engine, hosted.leader
        assert engine is not None
        assert leader is not None
        while True:
            if not hosted.has_work or time.monotonic() >= finish_by:
                self.end_requests(hosted)
            if not hosted.has_work:
                break
            if time.monotonic() > deadline:
                raise RankTimeout("it still has work at the deadline", phase="stop")
            if hosted.holds or self._control.is_dropped(hosted.generation):
                return False
            self._lead(hosted)
        engine.world.enter()
        leader.stop()
        return True

    def _lead(self, hosted: Hosted) -> None:
        assert hosted.engine is not None
        assert hosted.requests is not None
        began = time.monotonic()
        outputs = hosted.engine.step()
        ledger.count_step(hosted.name, time.monotonic() - began)
        for number, completions, done in hosted.requests.collect(outputs):
            self._output(hosted, number, completions, done)
        if hosted.frontends is not None:
            hosted.frontends.send_outputs()

    def _output(
        self,
        hosted: Hosted,
        number: int,
        completions: list[messages.Completion],
        done: bool,
    ) -> None:
        self._control.send(
            messages.RequestOutput(
                rank=self._rank,
                generation=hosted.generation,
                request=number,
                completions=completions,
                done=done,
            )
        )
