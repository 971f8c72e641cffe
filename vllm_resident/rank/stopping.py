"""Engines that stop, at the same step on every rank: to sleep and wake again, or to go.

Owns the deadlines for a leader's stop plan (kept in `Hosted`), and is the one place
where what a rank holds of an engine is let go of. How memory is given back is
`engine`'s and `sleep`'s.
"""

from __future__ import annotations

import logging
import time
from functools import partial

from vllm_resident import messages
from vllm_resident.errors import (
    CommandRejected,
    RankFailure,
    RankTimeout,
    ReleaseIncomplete,
)
from vllm_resident.rank.engine import PhaseClock
from vllm_resident.rank.hosted import Engines, Hosted, Suspension
from vllm_resident.rank.parts import Parts
from vllm_resident.rank.reports import Reports
from vllm_resident.rank.serving import Serving

log = logging.getLogger("vllm_resident.rank")


class Stopping:
    """One method per command; each answers by itself, at once or at the stop plan."""

    def __init__(
        self, parts: Parts, engines: Engines, reports: Reports, serving: Serving
    ) -> None:
        self._parts = parts
        self._engines = engines
        self._reports = reports
        self._serving = serving

    # ------------------------------------------------------------ sleep and wake

    def suspend(self, command: messages.SuspendEngine) -> None:
        """Put an engine to sleep: here and now where nothing steps, else at the same
        step on every rank."""
        hosted = self._engines.get(command.generation)
        if hosted is None or hosted.engine is None or hosted.failed:
            return
        try:
            hosted.engine.check_sleep(command.level)
        except CommandRejected as error:
            # On every rank alike: they were built of the same arguments.
            self._reports.fail(hosted.generation, error, "suspend")
            return
        hosted.suspension = self._suspension(hosted, command)
        try:
            self._begin_suspension(hosted, hosted.suspension)
        # What is in flight still steps, and giving memory back is vLLM's and torch's.
        except Exception as error:  # noqa: BLE001 (logged there)
            self.fail_suspension(hosted, error)

    def _suspension(
        self, hosted: Hosted, command: messages.SuspendEngine
    ) -> Suspension:
        now = time.monotonic()
        return Suspension(
            command.level,
            now + command.timeout_s,
            # With time left to abort it.
            now + min(command.finish_s, command.timeout_s / 2),
            PhaseClock(partial(self._reports.enter_phase, hosted)),
            self._parts.memory_used(),
        )

    def _begin_suspension(self, hosted: Hosted, suspension: Suspension) -> None:
        if hosted.asleep:
            self._fall_asleep(hosted, suspension)
            return
        suspension.clock.start("stop")
        self.check(hosted)

    def _fall_asleep(self, hosted: Hosted, suspension: Suspension) -> None:
        engine = hosted.engine
        assert engine is not None
        moved = engine.sleep(suspension.level, suspension.clock.start)
        suspension.clock.stop()
        hosted.suspension = None
        # Its leader may be awake again, and plan, before this rank is.
        self._engines.ignore_leader(hosted)
        self._parts.control.send(
            messages.EngineSuspended(
                rank=self._parts.rank,
                generation=hosted.generation,
                level=engine.sleep_level,
                phases=suspension.clock.phases,
                memory_before_bytes=suspension.memory_before_bytes,
                memory_after_bytes=self._parts.memory_used(),
                memory=engine.memory(),
                moved_bytes=moved.num_bytes,
                moved_s=moved.seconds,
                link_bytes_per_s=moved.link_bytes_per_s,
            )
        )

    def fail_suspension(self, hosted: Hosted, error: Exception) -> None:
        """Of one that is being suspended: it stays as it is, until it is dropped."""
        assert hosted.suspension is not None
        log.error(
            "event=suspend_failed generation=%d", hosted.generation, exc_info=error
        )
        phase = hosted.suspension.clock.current
        if isinstance(error, CommandRejected):
            # Too late to refuse: that would say that nothing has changed.
            error = RankFailure(str(error), phase=phase)
        hosted.suspension = None
        hosted.failed = True
        self._reports.fail(hosted.generation, error, phase)

    def resume(self, command: messages.ResumeEngine) -> None:
        hosted = self._engines.get(command.generation)
        if hosted is None or hosted.engine is None or hosted.failed:
            return
        before = self._parts.memory_used()
        clock = PhaseClock(partial(self._reports.enter_phase, hosted))
        try:
            moved = hosted.engine.wake_up(clock.start)
        # Waking reads weights with the model's own code.
        except Exception as error:
            log.exception("event=resume_failed generation=%d", hosted.generation)
            hosted.failed = True
            self._reports.fail(hosted.generation, error, clock.current)
            return
        self._engines.hear_leader(hosted)
        if hosted.frontends is not None:
            hosted.frontends.admit_held()
        clock.stop()
        self._parts.control.send(
            messages.EngineResumed(
                rank=self._parts.rank,
                generation=hosted.generation,
                phases=clock.phases,
                memory_before_bytes=before,
                memory_after_bytes=self._parts.memory_used(),
                memory=hosted.engine.memory(),
                moved_bytes=moved.num_bytes,
                moved_s=moved.seconds,
                link_bytes_per_s=moved.link_bytes_per_s,
            )
        )

    # ------------------------------------------------------------------- the end

    def close(self, command: messages.CloseEngine) -> None:
        hosted = self._engines.get(command.generation)
        if hosted is None or hosted.engine is None:
            # Nothing that steps: there is no step to stop at, and the answer is due.
            self.drop(command.generation)
        elif hosted.asleep and not hosted.failed:
            self._finish_close(hosted, orderly=True)
        elif hosted.leader is not None and not hosted.failed:
            self._serving.end_requests(hosted)
            hosted.leader.stop()
            self._finish_close(hosted, orderly=True)
        else:
            hosted.close_deadline = time.monotonic() + command.timeout_s
            self.check(hosted)

    def drop(self, generation: int) -> None:
        """Give it up without the other ranks' help, in whatever state."""
        hosted = self._engines.get(generation)
        if hosted is not None:
            self._finish_close(hosted)
        elif not self._parts.control.has_told_end(generation):
            used = self._parts.memory_used()
            self._reports.close(generation, {}, used, used)
        self._parts.control.forget(generation)

    def check(self, hosted: Hosted) -> None:
        """A follower closes, or sleeps, at its leader's stop plan, or gives up at the
        deadline; a leader that was held when it was to sleep makes that plan."""
        stopped = hosted.follower is not None and hosted.follower.stopped
        now = time.monotonic()
        if hosted.close_deadline is not None:
            if stopped:
                self._finish_close(hosted, orderly=not hosted.failed)
            elif now > hosted.close_deadline:
                self.release(hosted)
                self._reports.fail(hosted.generation, _late(), "close")
        elif (suspension := hosted.suspension) is not None:
            if hosted.leader is not None:
                stopped = self._serving.stop(
                    hosted, suspension.finish_by, suspension.deadline
                )
            if stopped:
                self._fall_asleep(hosted, suspension)
            elif now > suspension.deadline:
                raise _late()

    def _finish_close(self, hosted: Hosted, *, orderly: bool = False) -> None:
        before = self._parts.memory_used()
        since = time.monotonic()
        error = self.release(hosted, orderly=orderly)
        if error is not None:
            if not isinstance(error, ReleaseIncomplete):
                # Whatever it was, it cannot be said that everything was given back.
                error = ReleaseIncomplete(f"{type(error).__name__}: {error}")
            self._reports.fail(hosted.generation, error, "release")
        else:
            phases = {"release": time.monotonic() - since}
            after = self._parts.memory_used()
            self._reports.close(hosted.generation, phases, before, after)

    def release(self, hosted: Hosted, *, orderly: bool = False) -> Exception | None:
        """Give back what the rank holds of the engine; returns what went wrong.
        `orderly`: its other ranks do so too, at the same step."""
        self._engines.remove(hosted)
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
            self._parts.control.forget(hosted.generation)
            if all(each.world is None for each in self._engines):
                self._parts.sockets.sweep()
        return None


def _late() -> RankTimeout:
    return RankTimeout("the leader's stop plan did not come within the deadline")
