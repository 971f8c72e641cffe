"""The command loop of one rank: commands and plans in, engines built, stepped, closed.

The main thread's whole life. Commands come from the control thread, plans from the
leaders of the engines this rank follows; between them every engine that has work takes
its step. It holds engines by generation and knows nothing of the pool beyond them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from vllm.config import VllmConfig

from vllm_resident import messages
from vllm_resident.errors import (
    CommandRejected,
    ErrorInfo,
    RankFailure,
    RankTimeout,
    ReleaseIncomplete,
    ResidentError,
)
from vllm_resident.rank import faults, lockstep
from vllm_resident.rank.control import Control
from vllm_resident.rank.device import Device, messaging_context
from vllm_resident.rank.engine import Engine, PhaseClock, abandon, configure
from vllm_resident.rank.requests import Requests
from vllm_resident.rank.world import Store, World

log = logging.getLogger("vllm_resident.rank")


@dataclass
class Hosted:
    """One engine's part on this rank, from prepare to close."""

    generation: int
    name: str
    ranks: list[int]
    config: VllmConfig | None = None
    world: World | None = None
    engine: Engine | None = None
    leader: lockstep.Leader | None = None
    follower: lockstep.Follower | None = None
    requests: Requests | None = None
    failed: bool = False
    close_deadline: float | None = None
    lines: list[zmq.Socket[bytes]] = field(default_factory=list)


class RankLoop:
    """Runs until told to exit; `run` returns the process's exit status."""

    def __init__(
        self,
        rank: int,
        device: Device,
        store: Store,
        control: Control,
        directory: Path,
        owner: str,
    ) -> None:
        self._rank = rank
        self._device = device
        self._store = store
        self._control = control
        self._directory = directory
        self._owner = owner
        self._session = ""
        self._hosted: dict[int, Hosted] = {}
        self._faults = faults.declared()
        self._context = messaging_context()
        self._poller = zmq.Poller()
        self._poller.register(control.inbox.fd, zmq.POLLIN)
        self._status: int | None = None

    def run(self) -> int:
        while self._status is None:
            busy = self._step_engines()
            commands = self._control.inbox.take_all()
            if not busy and not commands:
                self._poller.poll(self._patience_ms())
            for command in commands:
                self._survive(command)
        for hosted in list(self._hosted.values()):
            self._release(hosted)
        return self._status

    def generations(self) -> list[int]:
        """Of everything held here, from prepare to release; any thread."""
        return sorted(self._hosted.copy())

    def _patience_ms(self) -> int:
        return 100 if any(h.close_deadline for h in self._hosted.values()) else 1000

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
            if (hosted := self._hosted.get(generation)) is not None:
                hosted.failed = True
            self._fail(generation, error, "step")

    def _handle(self, command: messages.ToRankMessage) -> None:
        match command:
            case messages.Welcome(session=session):
                self._join(session)
            case messages.ExitRank(reason=reason, failed=failed):
                log.info("event=exit rank=%d reason=%r", self._rank, reason)
                self._status = int(failed)
            case messages.PrepareEngine():
                self._prepare(command)
            case messages.BuildEngine():
                self._build(command)
            case messages.CloseEngine():
                self._close(command)
            case messages.DropEngine(generation=generation):
                self._drop(generation)
            case messages.AddRequest():
                self._add(command)
            case messages.AbortRequest():
                self._abort(command)

    def _join(self, session: str) -> None:
        """Belong to this life of the controller; what an earlier one had built here is
        not in its books and goes."""
        if self._session not in ("", session):
            for hosted in list(self._hosted.values()):
                self._release(hosted)
        self._session = session
        log.info("event=welcome rank=%d session=%s", self._rank, session)

    def _prepare(self, command: messages.PrepareEngine) -> None:
        since = time.monotonic()
        generation = command.generation
        if self._control.is_dropped(generation):
            return
        self._phase(generation, "prepare")
        try:
            faults.trip(self._faults, self._rank, "prepare", command.name)
            config = configure(command.model, command.engine_args)
        except (ResidentError, faults.InjectedFault) as error:
            self._fail(generation, error, "prepare")
            return
        self._hosted[generation] = Hosted(
            generation, command.name, command.ranks, config
        )
        self._control.send(
            messages.EnginePrepared(
                rank=self._rank,
                generation=generation,
                seconds=time.monotonic() - since,
            )
        )

    def _build(self, command: messages.BuildEngine) -> None:
        generation = command.generation
        hosted = self._hosted.get(generation)
        if hosted is None or self._control.is_dropped(generation):
            return
        before = self._device.memory()[0]
        clock = PhaseClock(lambda phase: self._enter_phase(hosted, phase))
        try:
            self._construct(hosted, command.timeout_s, clock)
        # Building runs all of vLLM and the model's code: whatever it raises ends this
        # build, not this process.
        except Exception as error:
            log.exception("event=build_failed generation=%d", generation)
            # First the word, then the close: the others' collectives fail at it, and
            # the cause should be heard before its consequences.
            self._fail(generation, error, clock.current)
            if hosted.world is not None and hosted.engine is None:
                abandon(error, hosted.world, self._device)
            self._release(hosted)
            return
        clock.stop()
        self._control.send(
            messages.EngineBuilt(
                rank=self._rank,
                generation=generation,
                phases=clock.phases,
                memory_before_bytes=before,
                memory_after_bytes=self._device.memory()[0],
            )
        )

    def _construct(self, hosted: Hosted, timeout_s: float, clock: PhaseClock) -> None:
        generation = hosted.generation
        clock.start("form_world")
        world = World.form(
            identity=f"{self._session}-{generation}",
            rank=hosted.ranks.index(self._rank),
            size=len(hosted.ranks),
            local_rank=self._device.index,
            owner=self._owner,
            store=self._store,
            backend=self._device.backend,
            timeout_s=timeout_s,
            on_start=lambda world: self._control.watch_world(generation, world),
        )
        hosted.world = world
        config, hosted.config = hosted.config, None
        assert config is not None
        hosted.engine = Engine.build(config, world, self._device, clock.start)
        clock.start("lockstep")
        if world.rank == 0:
            hosted.lines = lockstep.lead(
                self._context,
                self._directory,
                generation,
                world.store,
                world.size - 1,
            )
            hosted.leader = lockstep.Leader(hosted.engine.core, hosted.lines)
            hosted.engine.llm.engine_core = hosted.leader
            hosted.requests = Requests(hosted.engine.llm, hosted.leader)
        else:
            line = lockstep.follow(self._context, world.rank, world.store)
            hosted.lines = [line]
            hosted.follower = lockstep.Follower(hosted.engine.core, line)
            self._poller.register(line, zmq.POLLIN)

    def _enter_phase(self, hosted: Hosted, phase: str) -> None:
        self._phase(hosted.generation, phase)
        faults.trip(self._faults, self._rank, phase, hosted.name)
        if self._control.is_dropped(hosted.generation):
            raise RankFailure("called off by the controller", phase=phase)

    def _close(self, command: messages.CloseEngine) -> None:
        hosted = self._hosted.get(command.generation)
        if hosted is None or hosted.engine is None:
            # Nothing that steps: there is no step to stop at, and the answer is due.
            self._drop(command.generation)
        elif hosted.leader is not None and not hosted.failed:
            self._end_requests(hosted)
            hosted.leader.stop()
            self._finish_close(hosted)
        else:
            hosted.close_deadline = time.monotonic() + command.timeout_s
            self._check_close(hosted)

    def _check_close(self, hosted: Hosted) -> None:
        """A follower closes at its leader's stop plan, or at the deadline."""
        if hosted.close_deadline is None:
            return
        if hosted.follower is not None and hosted.follower.stopped:
            self._finish_close(hosted)
        elif time.monotonic() > hosted.close_deadline:
            self._release(hosted)
            self._fail(
                hosted.generation,
                RankTimeout("the leader's stop plan did not come within the deadline"),
                "close",
            )

    def _drop(self, generation: int) -> None:
        hosted = self._hosted.get(generation)
        if hosted is not None:
            self._finish_close(hosted)
        else:
            self._closed(generation, {}, self._device.memory()[0])
        self._control.forget(generation)

    def _finish_close(self, hosted: Hosted) -> None:
        before = self._device.memory()[0]
        since = time.monotonic()
        error = self._release(hosted)
        if error is not None:
            if not isinstance(error, ReleaseIncomplete):
                # Whatever it was, it cannot be said that everything was given back.
                error = ReleaseIncomplete(f"{type(error).__name__}: {error}")
            self._fail(hosted.generation, error, "release")
        else:
            phases = {"release": time.monotonic() - since}
            self._closed(hosted.generation, phases, before)

    def _closed(self, generation: int, phases: dict[str, float], before: int) -> None:
        self._control.send(
            messages.EngineClosed(
                rank=self._rank,
                generation=generation,
                phases=phases,
                memory_before_bytes=before,
                memory_after_bytes=self._device.memory()[0],
            )
        )

    def _release(self, hosted: Hosted) -> Exception | None:
        """Give back what the rank holds of the engine; returns what went wrong."""
        self._hosted.pop(hosted.generation, None)
        if hosted.follower is not None:
            self._poller.unregister(hosted.follower.socket)
        for line in hosted.lines:
            line.close()
        engine, hosted.engine = hosted.engine, None
        hosted.world = None
        hosted.leader = hosted.follower = hosted.requests = None
        try:
            if engine is not None:
                engine.release()
        # Releasing runs vLLM's and torch's clean-up in whatever state a failure left.
        except Exception as error:
            log.exception("event=release_failed generation=%d", hosted.generation)
            return error
        finally:
            self._control.forget(hosted.generation)
        return None

    # ------------------------------------------------------------------- serving

    def _add(self, command: messages.AddRequest) -> None:
        hosted = self._hosted.get(command.generation)
        if hosted is None or hosted.requests is None or hosted.failed:
            return
        try:
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

    def _abort(self, command: messages.AbortRequest) -> None:
        hosted = self._hosted.get(command.generation)
        if hosted is not None and hosted.requests is not None:
            self._end_request(hosted, command.request)

    def _end_requests(self, hosted: Hosted) -> None:
        if hosted.requests is not None:
            for number in hosted.requests.numbers:
                self._end_request(hosted, number)

    def _end_request(self, hosted: Hosted, number: int) -> None:
        if hosted.requests is not None and number in hosted.requests.numbers:
            self._output(hosted, number, hosted.requests.abort(number), True)

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

    def _step_engines(self) -> bool:
        """Let every engine that can do something do one step; True if any did."""
        busy = False
        for hosted in list(self._hosted.values()):
            if hosted.failed or hosted.engine is None:
                continue
            try:
                busy |= self._step(hosted)
            # A step runs the model's code and collectives: an error ends the engine.
            except Exception as error:
                log.exception("event=step_failed generation=%d", hosted.generation)
                hosted.failed = True
                self._fail(hosted.generation, error, "step")
            self._check_close(hosted)
        return busy

    def _step(self, hosted: Hosted) -> bool:
        engine = hosted.engine
        assert engine is not None
        if hosted.follower is not None:
            if hosted.follower.stopped:
                return False
            engine.world.enter()
            return hosted.follower.follow()
        assert hosted.leader is not None
        assert hosted.requests is not None
        if not engine.has_work and not hosted.leader.has_pending:
            return False
        outputs = engine.step()
        for number, completions, done in hosted.requests.collect(outputs):
            self._output(hosted, number, completions, done)
        if not engine.has_work and not hosted.leader.has_pending:
            hosted.leader.settle()
        return True

    # ------------------------------------------------------------------- reports

    def _phase(self, generation: int, phase: str) -> None:
        self._control.send(
            messages.PhaseStarted(rank=self._rank, generation=generation, phase=phase)
        )

    def _fail(self, generation: int, error: Exception, phase: str) -> None:
        kind = (
            type(error).__name__ if isinstance(error, ResidentError) else "RankFailure"
        )
        text = (
            str(error)
            if isinstance(error, ResidentError)
            else (f"{type(error).__name__}: {error}")
        )
        self._control.send_first(
            messages.EngineFailed(
                rank=self._rank,
                generation=generation,
                error=ErrorInfo(kind, text, self._rank, generation, phase),
            )
        )
