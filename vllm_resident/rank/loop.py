"""The command loop of one rank: what it hears, and who does it.

The main thread's whole life. Commands come from the control thread, plans from the
leaders of the engines this rank follows; between them every engine that has work takes
its step. How engines are built, serve and stop is `building`'s, `serving`'s and
`stopping`'s; an error nobody foresaw in one of these ends here, with its engine.
"""

from __future__ import annotations

import logging
from collections import deque

import zmq

from vllm_resident import messages
from vllm_resident.rank.building import Building
from vllm_resident.rank.communicators import Budget
from vllm_resident.rank.hosted import Engines, Hosted
from vllm_resident.rank.parts import Parts
from vllm_resident.rank.reports import Reports
from vllm_resident.rank.serving import Serving
from vllm_resident.rank.stopping import Stopping

log = logging.getLogger("vllm_resident.rank")

# They touch no world, so they need not wait for the end of a build.
_OF_REQUESTS = (
    messages.AddRequest
    | messages.AbortRequest
    | messages.ConnectFrontend
    | messages.DisconnectFrontend
)


class RankLoop:
    """Runs until told to exit; `run` returns the process's exit status."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._inbox = parts.control.inbox
        self._engines = Engines()
        self._engines.poller.register(self._inbox.fd, zmq.POLLIN)
        self._reports = Reports(parts.rank, parts.control)
        self._serving = Serving(parts.rank, parts.control)
        self._stopping = Stopping(parts, self._engines, self._reports, self._serving)
        self._building = Building(
            parts,
            self._engines,
            self._reports,
            self._serving,
            self._stopping,
            hear=self._hear_beside,
            step=self._step_engine,
        )
        # Commands not carried out yet: in the middle of a build, most wait for its end.
        self._waiting: deque[messages.ToRankMessage] = deque()
        self._status: int | None = None

    def run(self) -> int:
        while self._status is None:
            busy = self._step_engines()
            self._waiting.extend(self._inbox.take_all())
            if not busy and not self._waiting:
                self._engines.poller.poll(self._patience_ms())
            for _ in range(len(self._waiting)):
                # What a drop has made pointless is gone from it.
                if self._waiting:
                    self._survive(self._waiting.popleft())
        for hosted in self._engines:
            self._stopping.release(hosted)
        self._parts.lines.close()
        self._parts.communicators.close()
        return self._status

    def generations(self) -> list[int]:
        """Of everything held here, from prepare to release; any thread."""
        return self._engines.generations()

    def _patience_ms(self) -> int:
        return 100 if any(each.awaits_stop for each in self._engines) else 1000

    # ------------------------------------------------------------------ commands

    def _survive(self, command: messages.ToRankMessage) -> None:
        """Handle a command; an error nobody foresaw ends its engine, not the rank."""
        try:
            self._handle(command)
        except Exception as error:
            log.exception("event=command_failed command=%s", type(command).__name__)
            generation = getattr(command, "generation", None)
            if generation is None:
                return
            if (hosted := self._engines.get(generation)) is not None:
                hosted.failed = True
            self._reports.fail(generation, error, "step")

    def _hear_beside(self) -> None:
        """In the middle of a build: what is about requests, and the end of what is not
        built here. All other commands wait for the end of the build."""
        for command in self._inbox.take_all():
            match command:
                case messages.DropEngine(generation=gone) if self._is_unbuilt(gone):
                    self._forget_commands(gone)
                    self._survive(command)
                case _ if isinstance(command, _OF_REQUESTS):
                    self._survive(command)
                case _:
                    self._waiting.append(command)

    def _is_unbuilt(self, generation: int) -> bool:
        """Whether the rank has at most prepared it."""
        hosted = self._engines.get(generation)
        return hosted is None or (hosted.engine is None and not hosted.is_building)

    def _forget_commands(self, generation: int) -> None:
        """Carried out after its end they would bring it back."""
        self._waiting = deque(
            each
            for each in self._waiting
            if getattr(each, "generation", None) != generation
        )

    def _handle(self, command: messages.ToRankMessage) -> None:
        match command:
            case messages.Welcome():
                self._join(command)
            case messages.DropCommunicators(lost_rank=lost):
                self._parts.communicators.discard_of(lost)
            case messages.ExitRank(reason=reason, failed=failed):
                log.info("event=exit rank=%d reason=%r", self._parts.rank, reason)
                self._status = int(failed)
            case _ if isinstance(command, _OF_REQUESTS):
                self._handle_requests(command)
            case _:
                self._handle_engine(command)

    def _handle_requests(self, command: messages.ToRankMessage) -> None:
        hosted = self._engines.get(command.generation)
        match command:
            case messages.ConnectFrontend():
                self._serving.connect(hosted, command)
            case messages.AddRequest() if hosted is not None:
                self._serving.add(hosted, command)
            case messages.AbortRequest(request=request) if hosted is not None:
                self._serving.end_request(hosted, request)
            case messages.DisconnectFrontend(frontend=frontend):
                if hosted is not None and hosted.frontends is not None:
                    hosted.frontends.disconnect(frontend)

    def _handle_engine(self, command: messages.ToRankMessage) -> None:
        with self._parts.control.at_work_on(command.generation):
            self._move_engine(command)

    def _move_engine(self, command: messages.ToRankMessage) -> None:
        match command:
            case messages.PrepareEngine():
                self._building.prepare(command)
            case messages.BuildEngine():
                self._building.build(command)
            case messages.SuspendEngine():
                self._stopping.suspend(command)
            case messages.ResumeEngine():
                self._stopping.resume(command)
            case messages.CloseEngine():
                self._stopping.close(command)
            case messages.DropEngine(generation=generation):
                self._stopping.drop(generation)

    def _join(self, welcome: messages.Welcome) -> None:
        self._building.join(welcome.session)
        self._parts.communicators.set_budget(self._budget(welcome))
        log.info("event=welcome rank=%d session=%s", self._parts.rank, welcome.session)

    def _budget(self, welcome: messages.Welcome) -> Budget:
        budget = self._parts.device.communicator_budget
        num, num_bytes = welcome.max_communicators, welcome.max_communicator_bytes
        return Budget(
            budget.num if num is None else num,
            budget.num_bytes if num_bytes is None else num_bytes,
        )

    # --------------------------------------------------------------------- steps

    def _step_engines(self) -> bool:
        """Let every engine that can do something do one step; True if any did."""
        stepped = [self._step_engine(each) for each in self._engines]
        return any(stepped)

    def _step_engine(self, hosted: Hosted) -> bool:
        busy = self._serving.hear(hosted)
        if not hosted.steps and not hosted.awaits_stop:
            return busy
        try:
            if hosted.steps:
                busy |= self._serving.step(hosted)
            self._stopping.check(hosted)
        # A step runs the model's code and collectives: an error ends the engine.
        except Exception as error:
            if hosted.suspension is not None:
                self._stopping.fail_suspension(hosted, error)
                return busy
            log.exception("event=step_failed generation=%d", hosted.generation)
            hosted.failed = True
            self._reports.fail(hosted.generation, error, "step")
        return busy
