"""The command loop of one rank: engines built, stepped, put to sleep, woken, closed.

The main thread's whole life. Commands come from the control thread, plans from the
leaders of the engines this rank follows; between them every engine that has work takes
its step. It holds engines by generation and knows nothing of the pool beyond them.
"""

from __future__ import annotations

import logging
import time

import zmq

from vllm_resident import config, messages
from vllm_resident.errors import (
    CommandRejected,
    ErrorInfo,
    RankFailure,
    RankTimeout,
    ReleaseIncomplete,
    ResidentError,
)
from vllm_resident.rank import faults, lockstep, prefetch, server_options, turns
from vllm_resident.rank.communicators import Budget, CommunicatorPool
from vllm_resident.rank.control import Control
from vllm_resident.rank.device import Device
from vllm_resident.rank.engine import Engine, PhaseClock, abandon, configure
from vllm_resident.rank.frontends import Frontends
from vllm_resident.rank.lines import Lines
from vllm_resident.rank.requests import Requests
from vllm_resident.rank.serving import Hosted, Serving, Suspension
from vllm_resident.rank.world import Store, World

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

    def __init__(
        self,
        rank: int,
        device: Device,
        store: Store,
        control: Control,
        lines: Lines,
        owner: str,
        communicators: CommunicatorPool,
    ) -> None:
        self._rank = rank
        self._device = device
        self._store = store
        self._control = control
        self._lines = lines
        self._owner = owner
        self._communicators = communicators
        self._session = ""
        # Of what this rank was told to form last (`BuildEngine.turn`).
        self._turn = 0
        self._hosted: dict[int, Hosted] = {}
        self._serving = Serving(rank, control)
        self._faults = faults.declared()
        self._poller = zmq.Poller()
        self._poller.register(control.inbox.fd, zmq.POLLIN)
        # Commands that came in the middle of a build.
        self._deferred: list[messages.ToRankMessage] = []
        self._status: int | None = None

    def run(self) -> int:
        while self._status is None:
            busy = self._step_engines()
            commands = [*self._deferred, *self._control.inbox.take_all()]
            self._deferred.clear()
            if not busy and not commands:
                self._poller.poll(self._patience_ms())
            for command in commands:
                self._survive(command)
        for hosted in list(self._hosted.values()):
            self._release(hosted)
        self._lines.close()
        self._communicators.close()
        return self._status

    def generations(self) -> list[int]:
        """Of everything held here, from prepare to release; any thread."""
        return sorted(self._hosted.copy())

    def _patience_ms(self) -> int:
        return 100 if any(h.awaits_stop for h in self._hosted.values()) else 1000

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
            case messages.Welcome():
                self._join(command)
            case messages.ExitRank(reason=reason, failed=failed):
                log.info("event=exit rank=%d reason=%r", self._rank, reason)
                self._status = int(failed)
            case _ if isinstance(command, _OF_REQUESTS):
                self._handle_requests(command)
            case _:
                self._handle_engine(command)

    def _handle_requests(self, command: messages.ToRankMessage) -> None:
        hosted = self._hosted.get(command.generation)
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
        match command:
            case messages.PrepareEngine():
                self._prepare(command)
            case messages.BuildEngine():
                self._build(command)
            case messages.SuspendEngine():
                self._suspend(command)
            case messages.ResumeEngine():
                self._resume(command)
            case messages.CloseEngine():
                self._close(command)
            case messages.DropEngine(generation=generation):
                self._drop(generation)
            case messages.DropCommunicators(lost_rank=lost):
                self._communicators.discard_of(lost)

    def _join(self, welcome: messages.Welcome) -> None:
        """Belong to this life of the controller; what an earlier one had built here is
        not in its books and goes."""
        session = welcome.session
        if self._session != session:
            for hosted in list(self._hosted.values()):
                self._release(hosted)
            self._turn = 0
        self._session = session
        self._communicators.set_budget(self._budget(welcome))
        log.info("event=welcome rank=%d session=%s", self._rank, session)

    def _budget(self, welcome: messages.Welcome) -> Budget:
        budget = self._device.communicator_budget
        num, num_bytes = welcome.max_communicators, welcome.max_communicator_bytes
        return Budget(
            budget.num if num is None else num,
            budget.num_bytes if num_bytes is None else num_bytes,
        )

    def _prepare(self, command: messages.PrepareEngine) -> None:
        since = time.monotonic()
        generation = command.generation
        if self._control.is_dropped(generation):
            return
        self._phase(generation, "prepare")
        try:
            faults.trip(self._faults, self._rank, "prepare", command.name)
            prepared = configure(command.model, command.engine_args)
            server_options.check(
                command.model,
                prepared.config,
                command.engine_args,
                command.frontend_args,
            )
        except (ResidentError, faults.InjectedFault) as error:
            self._fail(generation, error, "prepare")
            return
        # Read while what goes still serves.
        prefetch.hint(command.model)
        self._hosted[generation] = Hosted(
            generation,
            command.name,
            command.ranks,
            prepared,
            adapters=config.adapters(command.frontend_args),
        )
        self._control.send(
            messages.EnginePrepared(
                rank=self._rank,
                generation=generation,
                seconds=time.monotonic() - since,
                memory=prepared.memory,
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
            self._take_place(command.turn)
            self._construct(hosted, command, clock)
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
        finally:
            self._end_hold(hosted)
        clock.stop()
        assert hosted.engine is not None
        self._control.send(
            messages.EngineBuilt(
                rank=self._rank,
                generation=generation,
                phases=clock.phases,
                memory_before_bytes=before,
                memory_after_bytes=self._device.memory()[0],
                memory=hosted.engine.memory(),
            )
        )

    def _take_place(self, turn: int) -> None:
        """Worlds are formed in the controller's order alone: out of it, this rank and
        another could wait for each other in two of them."""
        if 0 < turn <= self._turn:
            raise RankFailure(
                f"told to form world {turn} after {self._turn}", phase="form_world"
            )
        self._turn = max(self._turn, turn)

    def _construct(
        self, hosted: Hosted, command: messages.BuildEngine, clock: PhaseClock
    ) -> None:
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
            timeout_s=command.timeout_s,
            on_start=lambda world: self._control.watch_world(generation, world),
            device=self._device.bound(),
            members=hosted.ranks,
            communicators=self._communicators,
            memory_used=lambda: self._device.memory()[0],
            meanwhile=Beside(self, hosted),
        )
        hosted.world = world
        prepared, hosted.prepared = hosted.prepared, None
        assert prepared is not None
        hosted.engine = Engine.build(
            prepared, world, self._device, clock.start, lambda: self._take_turn(hosted)
        )
        clock.start("lockstep")
        if world.rank == 0:
            hosted.lines = self._lines.lead(
                generation,
                world.store,
                world.size - 1,
                spans_machines=command.spans_machines,
            )
            hosted.leader = lockstep.Leader(hosted.engine.core, hosted.lines)
            hosted.engine.llm.engine_core = hosted.leader
            hosted.requests = Requests(hosted.engine.llm, hosted.leader)
            for line in hosted.lines:
                self._poller.register(line, zmq.POLLIN)
            hosted.frontends = Frontends(
                hosted.engine.core,
                hosted.leader,
                self._lines.context,
                self._poller,
                lambda count: self._count_requests(generation, count),
                hosted.adapters,
                self._lines.key,
            )
        else:
            line = self._lines.follow(world.rank, world.store)
            hosted.lines = [line]
            hosted.follower = lockstep.Follower(hosted.engine.core, line)
            self._listen(hosted)

    def _take_turn(self, building: Hosted) -> None:
        """In the middle of a build: a step of each engine that serves here alone.

        An engine of several ranks has to wait: the others may be in a collective of
        what is built, which this rank has not come to. Commands but those about
        requests wait too.
        """
        if self._control.is_dropped(building.generation):
            raise RankFailure("called off by the controller", phase="load_model")
        for command in self._control.inbox.take_all():
            if isinstance(command, _OF_REQUESTS):
                self._survive(command)
            else:
                self._deferred.append(command)
        serving = list(self._hosted.values()) if turns.may_step(self._device) else []
        for hosted in serving:
            if not hosted.steps or len(hosted.ranks) > 1:
                continue
            self._serving.hear(hosted)
            if hosted.has_work:
                assert hosted.engine is not None
                with turns.aside(hosted.engine.config, self._device):
                    self._step_engine(hosted)
        assert building.world is not None
        building.world.enter()

    def serve_beside(self) -> None:
        """While the others of a world to be formed are not there yet: a step of each
        engine, of several ranks too. Only commands about requests are heard."""
        for command in self._control.inbox.take_all():
            if isinstance(command, _OF_REQUESTS):
                self._survive(command)
            else:
                self._deferred.append(command)
        self._step_engines()

    def hold_beside(self, building: Hosted) -> bool:
        """Have the engines of several ranks here stopped, each at the same step on all
        of its ranks, while this one forms a world; True when they are.

        Otherwise a rank that is in such a step would wait for one that is forming, and
        that one, by way of the others of its world, for the first.
        """
        generation = building.generation
        are_held = True
        for each in self._beside(building):
            if each.leader is not None:
                self._serving.hold(each, 0, generation)
            elif each.follower is not None and not each.follower.stopped:
                each.follower.ask_to_hold(generation)
                # Of one that was given up nothing is to be expected any more.
                is_dropped = self._control.is_dropped(each.generation)
                are_held &= is_dropped or generation in each.follower.held
        return are_held

    def _end_hold(self, building: Hosted) -> None:
        for each in self._hosted.values():
            each.holds.discard((0, building.generation))
            if each.follower is not None:
                each.follower.end_hold(building.generation)

    def _beside(self, building: Hosted) -> list[Hosted]:
        return [
            each
            for each in self._hosted.values()
            if each is not building and each.steps and len(each.ranks) > 1
        ]

    def _enter_phase(self, hosted: Hosted, phase: str) -> None:
        self._phase(hosted.generation, phase)
        faults.trip(self._faults, self._rank, phase, hosted.name)
        if self._control.is_dropped(hosted.generation):
            raise RankFailure("called off by the controller", phase=phase)

    # ------------------------------------------------------------ sleep and wake

    def _suspend(self, command: messages.SuspendEngine) -> None:
        """Put an engine to sleep: here and now where nothing steps, else at the same
        step on every rank."""
        hosted = self._hosted.get(command.generation)
        if hosted is None or hosted.engine is None or hosted.failed:
            return
        try:
            hosted.engine.check_sleep(command.level)
        except CommandRejected as error:
            # On every rank alike: they were built of the same arguments.
            self._fail(hosted.generation, error, "suspend")
            return
        now = time.monotonic()
        hosted.suspension = Suspension(
            command.level,
            now + command.timeout_s,
            # With time left to abort it.
            now + min(command.finish_s, command.timeout_s / 2),
            PhaseClock(lambda phase: self._enter_phase(hosted, phase)),
            self._device.memory()[0],
        )
        try:
            if hosted.asleep:
                self._fall_asleep(hosted)
                return
            hosted.suspension.clock.start("stop")
            if hosted.leader is not None:
                suspension = hosted.suspension
                self._serving.stop(hosted, suspension.finish_by, suspension.deadline)
                self._fall_asleep(hosted)
            else:
                self._check_stop(hosted)
        # What is in flight still steps, and giving memory back is vLLM's and torch's.
        except Exception as error:  # noqa: BLE001 (logged there)
            self._fail_suspension(hosted, error)

    def _fall_asleep(self, hosted: Hosted) -> None:
        suspension, engine = hosted.suspension, hosted.engine
        assert suspension is not None
        assert engine is not None
        moved = engine.sleep(suspension.level, suspension.clock.start)
        suspension.clock.stop()
        hosted.suspension = None
        # Its leader may be awake again, and plan, before this rank is.
        self._stop_listening(hosted)
        self._control.send(
            messages.EngineSuspended(
                rank=self._rank,
                generation=hosted.generation,
                level=engine.sleep_level,
                phases=suspension.clock.phases,
                memory_before_bytes=suspension.memory_before_bytes,
                memory_after_bytes=self._device.memory()[0],
                memory=engine.memory(),
                moved_bytes=moved.num_bytes,
                moved_s=moved.seconds,
                link_bytes_per_s=moved.link_bytes_per_s,
            )
        )

    def _fail_suspension(self, hosted: Hosted, error: Exception) -> None:
        assert hosted.suspension is not None
        log.error(
            "event=suspend_failed generation=%d", hosted.generation, exc_info=error
        )
        phase = hosted.suspension.clock.current
        hosted.suspension = None
        hosted.failed = True
        self._fail(hosted.generation, error, phase)

    def _resume(self, command: messages.ResumeEngine) -> None:
        hosted = self._hosted.get(command.generation)
        if hosted is None or hosted.engine is None or hosted.failed:
            return
        before = self._device.memory()[0]
        clock = PhaseClock(lambda phase: self._enter_phase(hosted, phase))
        try:
            moved = hosted.engine.wake_up(clock.start)
        # Waking reads weights with the model's own code.
        except Exception as error:
            log.exception("event=resume_failed generation=%d", hosted.generation)
            hosted.failed = True
            self._fail(hosted.generation, error, clock.current)
            return
        self._listen(hosted)
        if hosted.frontends is not None:
            hosted.frontends.admit_held()
        clock.stop()
        self._control.send(
            messages.EngineResumed(
                rank=self._rank,
                generation=hosted.generation,
                phases=clock.phases,
                memory_before_bytes=before,
                memory_after_bytes=self._device.memory()[0],
                memory=hosted.engine.memory(),
                moved_bytes=moved.num_bytes,
                moved_s=moved.seconds,
                link_bytes_per_s=moved.link_bytes_per_s,
            )
        )

    def _listen(self, hosted: Hosted) -> None:
        """Take plans, if this rank follows; may be called twice."""
        if hosted.follower is not None:
            hosted.follower.stopped = False
            self._poller.register(hosted.follower.socket, zmq.POLLIN)

    def _stop_listening(self, hosted: Hosted) -> None:
        if hosted.follower is not None and hosted.follower.socket in self._poller:
            self._poller.unregister(hosted.follower.socket)

    def _stop_hearing(self, hosted: Hosted) -> None:
        """Of a leader: its followers, for good."""
        for line in hosted.lines:
            if hosted.leader is not None and line in self._poller:
                self._poller.unregister(line)

    # ------------------------------------------------------------------- the end

    def _close(self, command: messages.CloseEngine) -> None:
        hosted = self._hosted.get(command.generation)
        if hosted is None or hosted.engine is None:
            # Nothing that steps: there is no step to stop at, and the answer is due.
            self._drop(command.generation)
        elif hosted.asleep and not hosted.failed:
            self._finish_close(hosted, orderly=True)
        elif hosted.leader is not None and not hosted.failed:
            self._serving.end_requests(hosted)
            hosted.leader.stop()
            self._finish_close(hosted, orderly=True)
        else:
            hosted.close_deadline = time.monotonic() + command.timeout_s
            self._check_stop(hosted)

    def _check_stop(self, hosted: Hosted) -> None:
        """A follower closes, or sleeps, at its leader's stop plan, or gives up at the
        deadline."""
        if not hosted.awaits_stop:
            return
        now = time.monotonic()
        stopped = hosted.follower is not None and hosted.follower.stopped
        late = RankTimeout("the leader's stop plan did not come within the deadline")
        if hosted.close_deadline is not None:
            if stopped:
                self._finish_close(hosted, orderly=not hosted.failed)
            elif now > hosted.close_deadline:
                self._release(hosted)
                self._fail(hosted.generation, late, "close")
        elif hosted.suspension is not None:
            if stopped:
                self._fall_asleep(hosted)
            elif now > hosted.suspension.deadline:
                raise late

    def _drop(self, generation: int) -> None:
        hosted = self._hosted.get(generation)
        if hosted is not None:
            self._finish_close(hosted)
        else:
            self._closed(generation, {}, self._device.memory()[0])
        self._control.forget(generation)

    def _finish_close(self, hosted: Hosted, *, orderly: bool = False) -> None:
        before = self._device.memory()[0]
        since = time.monotonic()
        error = self._release(hosted, orderly=orderly)
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

    def _release(self, hosted: Hosted, *, orderly: bool = False) -> Exception | None:
        """Give back what the rank holds of the engine; returns what went wrong.
        `orderly`: its other ranks do so too, at the same step."""
        self._hosted.pop(hosted.generation, None)
        self._stop_listening(hosted)
        self._stop_hearing(hosted)
        if hosted.frontends is not None:
            hosted.frontends.close()
        for line in hosted.lines:
            line.close()
        engine, hosted.engine = hosted.engine, None
        hosted.world = None
        hosted.leader = hosted.follower = None
        hosted.requests = hosted.frontends = None
        try:
            if engine is not None:
                engine.release(orderly=orderly)
        # Releasing runs vLLM's and torch's clean-up in whatever state a failure left.
        except Exception as error:
            log.exception("event=release_failed generation=%d", hosted.generation)
            return error
        finally:
            self._control.forget(hosted.generation)
        return None

    def _step_engines(self) -> bool:
        """Let every engine that can do something do one step; True if any did."""
        stepped = [self._step_engine(each) for each in list(self._hosted.values())]
        return any(stepped)

    def _step_engine(self, hosted: Hosted) -> bool:
        busy = self._serving.hear(hosted)
        if not hosted.steps and not hosted.awaits_stop:
            return busy
        try:
            if hosted.steps:
                busy |= self._serving.step(hosted)
            self._check_stop(hosted)
        # A step runs the model's code and collectives: an error ends the engine.
        except Exception as error:
            if hosted.suspension is not None:
                self._fail_suspension(hosted, error)
                return busy
            log.exception("event=step_failed generation=%d", hosted.generation)
            hosted.failed = True
            self._fail(hosted.generation, error, "step")
        return busy

    # ------------------------------------------------------------------- reports

    def _count_requests(self, generation: int, count: int) -> None:
        self._control.send(
            messages.FrontendRequests(
                rank=self._rank, generation=generation, num_requests=count
            )
        )

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


class Beside:
    """What a rank does while the others of a world it forms are not there yet."""

    def __init__(self, loop: RankLoop, building: Hosted) -> None:
        self._loop = loop
        self._building = building

    def serve(self) -> None:
        self._loop.serve_beside()

    def hold(self) -> bool:
        return self._loop.hold_beside(self._building)
