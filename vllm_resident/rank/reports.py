"""What a rank tells the controller of its engines: phases, failures, ends.

Owns no engine and decides nothing, but for one thing: where a phase begins, a fault
that was declared for it happens, and what the controller has called off ends.
"""

from __future__ import annotations

from vllm_resident import messages
from vllm_resident.errors import ErrorInfo, RankFailure, ResidentError
from vllm_resident.rank import faults
from vllm_resident.rank.control import Control
from vllm_resident.rank.hosted import Hosted


class Reports:
    """Said through the control thread; none of it waits for an answer."""

    def __init__(self, rank: int, control: Control) -> None:
        self._rank = rank
        self._control = control
        self._faults = faults.declared()

    def enter_phase(self, hosted: Hosted, phase: str) -> None:
        """Say that a phase begins; raises where that was declared, or where it was
        called off."""
        self.begin(hosted.generation, hosted.name, phase)
        if self._control.is_dropped(hosted.generation):
            raise RankFailure("called off by the controller", phase=phase)

    def begin(self, generation: int, name: str, phase: str) -> None:
        """Say that a phase of the engine called `name` begins; raises a declared
        fault."""
        self._control.send(
            messages.PhaseStarted(rank=self._rank, generation=generation, phase=phase)
        )
        faults.trip(self._faults, self._rank, phase, name)

    def fail(self, generation: int, error: Exception, phase: str) -> None:
        """Before whatever else is still to be said."""
        if isinstance(error, ResidentError):
            kind, text = type(error).__name__, str(error)
        else:
            kind, text = "RankFailure", f"{type(error).__name__}: {error}"
        self._control.send_first(
            messages.EngineFailed(
                rank=self._rank,
                generation=generation,
                error=ErrorInfo(kind, text, self._rank, generation, phase),
            )
        )

    def close(
        self,
        generation: int,
        phases: dict[str, float],
        memory_before_bytes: int,
        memory_after_bytes: int,
    ) -> None:
        self._control.send(
            messages.EngineClosed(
                rank=self._rank,
                generation=generation,
                phases=phases,
                memory_before_bytes=memory_before_bytes,
                memory_after_bytes=memory_after_bytes,
            )
        )

    def count_requests(self, generation: int, count: int) -> None:
        self._control.send(
            messages.FrontendRequests(
                rank=self._rank, generation=generation, num_requests=count
            )
        )
