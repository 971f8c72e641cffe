"""From a command to an engine that serves: prepared, formed, built, connected.

Owns the order in which this rank forms worlds, and the session whose worlds they are.
What fails here leaves nothing behind; how an engine ends otherwise is `stopping`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from vllm_resident import config, messages
from vllm_resident.errors import RankFailure, ResidentError
from vllm_resident.rank import faults, lockstep, prefetch, server_options
from vllm_resident.rank.beside import Beside
from vllm_resident.rank.engine import Engine, PhaseClock, abandon, configure
from vllm_resident.rank.frontends import Frontends
from vllm_resident.rank.hosted import Engines, Hosted
from vllm_resident.rank.parts import Parts
from vllm_resident.rank.reports import Reports
from vllm_resident.rank.requests import Requests
from vllm_resident.rank.serving import Serving
from vllm_resident.rank.stopping import Stopping
from vllm_resident.rank.world import World

log = logging.getLogger("vllm_resident.rank")


class Building:
    """`hear` and `step` are what the loop lets a build do beside itself (`Beside`)."""

    def __init__(
        self,
        parts: Parts,
        engines: Engines,
        reports: Reports,
        serving: Serving,
        stopping: Stopping,
        *,
        hear: Callable[[], None],
        step: Callable[[Hosted], bool],
    ) -> None:
        self._parts = parts
        self._engines = engines
        self._reports = reports
        self._stopping = stopping
        self._beside = partial(
            Beside, parts=parts, engines=engines, serving=serving, hear=hear, step=step
        )
        self._session = ""
        # Of what this rank was told to form last (`BuildEngine.turn`).
        self._turn = 0

    def join(self, session: str) -> None:
        """Belong to this life of the controller; what an earlier one had built here is
        not in its books and goes."""
        if self._session != session:
            for hosted in self._engines:
                self._stopping.release(hosted)
            self._turn = 0
        self._session = session

    def prepare(self, command: messages.PrepareEngine) -> None:
        since = time.monotonic()
        generation = command.generation
        if not self._parts.control.begin(generation):
            return
        try:
            self._reports.begin(generation, command.name, "prepare")
            prepared = configure(command.model, command.engine_args)
            server_options.check(
                command.model,
                prepared.config,
                command.engine_args,
                command.frontend_args,
            )
        except (ResidentError, faults.InjectedFault) as error:
            self._reports.fail(generation, error, "prepare")
            return
        # Read while what goes still serves.
        prefetch.hint(command.model)
        adapters = config.adapters(command.frontend_args)
        self._engines.add(
            Hosted(generation, command.name, command.ranks, prepared, adapters=adapters)
        )
        self._parts.control.send(
            messages.EnginePrepared(
                rank=self._parts.rank,
                generation=generation,
                seconds=time.monotonic() - since,
                memory=prepared.memory,
            )
        )

    def build(self, command: messages.BuildEngine) -> None:
        generation = command.generation
        hosted = self._engines.get(generation)
        if hosted is None or self._parts.control.is_dropped(generation):
            return
        before = self._parts.memory_used()
        clock = PhaseClock(partial(self._reports.enter_phase, hosted))
        beside = self._beside(hosted)
        hosted.is_building = True
        try:
            self._take_place(command.turn)
            self._form(hosted, command, clock, beside)
            self._construct(hosted, clock, beside)
            self._connect(hosted, command, clock)
        # Building runs all of vLLM and the model's code: whatever it raises ends this
        # build, not this process.
        except Exception as error:
            log.exception("event=build_failed generation=%d", generation)
            self._give_up(hosted, error, clock.current)
            return
        finally:
            hosted.is_building = False
            beside.end_hold()
        clock.stop()
        assert hosted.engine is not None
        self._parts.control.send(
            messages.EngineBuilt(
                rank=self._parts.rank,
                generation=generation,
                phases=clock.phases,
                memory_before_bytes=before,
                memory_after_bytes=self._parts.memory_used(),
                memory=hosted.engine.memory(),
            )
        )

    def _give_up(self, hosted: Hosted, error: Exception, phase: str) -> None:
        # First the word, then the close: the others' collectives fail at it, and the
        # cause should be heard before its consequences.
        self._reports.fail(hosted.generation, error, phase)
        if hosted.world is not None and hosted.engine is None:
            abandon(error, hosted.world, self._parts.device)
        self._stopping.release(hosted)

    def _take_place(self, turn: int) -> None:
        """Worlds are formed in the controller's order alone: out of it, this rank and
        another could wait for each other in two of them."""
        if 0 < turn <= self._turn:
            raise RankFailure(
                f"told to form world {turn} after {self._turn}", phase="form_world"
            )
        self._turn = max(self._turn, turn)

    def _form(
        self,
        hosted: Hosted,
        command: messages.BuildEngine,
        clock: PhaseClock,
        beside: Beside,
    ) -> None:
        parts, generation = self._parts, hosted.generation
        clock.start("form_world")
        hosted.world = World.form(
            identity=f"{self._session}-{generation}",
            rank=hosted.ranks.index(parts.rank),
            size=len(hosted.ranks),
            local_rank=parts.device.index,
            owner=parts.owner,
            store=parts.store,
            backend=parts.device.backend,
            timeout_s=command.timeout_s,
            on_start=lambda world: parts.control.watch_world(generation, world),
            device=parts.device.bound(),
            members=hosted.ranks,
            communicators=parts.communicators,
            memory_used=parts.memory_used,
            meanwhile=beside,
        )

    def _construct(self, hosted: Hosted, clock: PhaseClock, beside: Beside) -> None:
        prepared, hosted.prepared = hosted.prepared, None
        assert prepared is not None
        assert hosted.world is not None
        hosted.engine = Engine.build(
            prepared, hosted.world, self._parts.device, clock.start, beside.take_turn
        )

    def _connect(
        self, hosted: Hosted, command: messages.BuildEngine, clock: PhaseClock
    ) -> None:
        clock.start("lockstep")
        assert hosted.world is not None
        if hosted.world.rank == 0:
            self._lead(hosted, hosted.world, spans_machines=command.spans_machines)
        else:
            self._follow(hosted, hosted.world)

    def _lead(self, hosted: Hosted, world: World, *, spans_machines: bool) -> None:
        generation, lines, engine = hosted.generation, self._parts.lines, hosted.engine
        assert engine is not None
        hosted.lines = lines.lead(
            generation, world.store, world.size - 1, spans_machines=spans_machines
        )
        hosted.leader = lockstep.Leader(engine.core, hosted.lines)
        engine.llm.engine_core = hosted.leader
        hosted.requests = Requests(engine.llm, hosted.leader)
        self._engines.hear_followers(hosted)
        hosted.frontends = Frontends(
            engine.core,
            hosted.leader,
            lines.context,
            self._engines.poller,
            partial(self._reports.count_requests, generation),
            hosted.adapters,
            lines.key,
        )

    def _follow(self, hosted: Hosted, world: World) -> None:
        assert hosted.engine is not None
        line = self._parts.lines.follow(world.rank, world.store)
        hosted.lines = [line]
        hosted.follower = lockstep.Follower(hosted.engine.core, line)
        self._engines.hear_leader(hosted)
