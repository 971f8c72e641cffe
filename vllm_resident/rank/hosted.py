"""The engines of one rank, from prepare to release, and whose sockets are heard.

`Hosted` is what a rank keeps of one engine; `Engines` are all of them by generation,
with the poller that the command loop waits at. Here is what they are and whether they
may step; what is done with them is the business of `building`, `serving` and
`stopping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from vllm_resident.rank import lockstep
from vllm_resident.rank.engine import Engine, PhaseClock, Prepared
from vllm_resident.rank.frontends import Frontends
from vllm_resident.rank.requests import Requests
from vllm_resident.rank.world import World


@dataclass
class Suspension:
    """A command to sleep that is being carried out."""

    level: int
    deadline: float
    # Until then what runs may go on; it is aborted after that.
    finish_by: float
    clock: PhaseClock
    memory_before_bytes: int


@dataclass
class Hosted:
    """One engine's part on this rank, from prepare to close."""

    generation: int
    name: str
    ranks: list[int]
    prepared: Prepared | None = None
    world: World | None = None
    engine: Engine | None = None
    leader: lockstep.Leader | None = None
    follower: lockstep.Follower | None = None
    requests: Requests | None = None
    frontends: Frontends | None = None
    failed: bool = False
    # From the command to build it to the answer.
    is_building: bool = False
    # Of a leader: by whom it is held, and for which world (`Serving.hold`).
    holds: set[tuple[int, int]] = field(default_factory=set)
    close_deadline: float | None = None
    suspension: Suspension | None = None
    lines: list[zmq.Socket[bytes]] = field(default_factory=list)
    # The LoRA adapters that frontends may have loaded: paths by name.
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def asleep(self) -> bool:
        return self.engine is not None and self.engine.sleep_level > 0

    @property
    def steps(self) -> bool:
        """Whether it takes part in steps, or in the plans that say so."""
        return self.engine is not None and not self.failed and not self.asleep

    @property
    def has_work(self) -> bool:
        """Of a leader: whether a step would do anything."""
        if self.engine is None or self.leader is None:
            return False
        return self.engine.has_work or self.leader.has_pending

    @property
    def awaits_stop(self) -> bool:
        """Whether a deadline for the stop plan is running."""
        return self.close_deadline is not None or self.suspension is not None


class Engines:
    """What this rank hosts, by generation. `generations` is for any thread, the rest
    for the main one; what it iterates over may change meanwhile."""

    def __init__(self) -> None:
        self.poller = zmq.Poller()
        self._hosted: dict[int, Hosted] = {}

    def __iter__(self) -> Iterator[Hosted]:
        return iter(list(self._hosted.values()))

    def get(self, generation: int) -> Hosted | None:
        return self._hosted.get(generation)

    def add(self, hosted: Hosted) -> None:
        self._hosted[hosted.generation] = hosted

    def remove(self, hosted: Hosted) -> None:
        """Forget it, and hear nobody for it any more. May be called twice."""
        self._hosted.pop(hosted.generation, None)
        self.ignore_leader(hosted)
        if hosted.leader is not None:
            for line in hosted.lines:
                self._unregister(line)

    def generations(self) -> list[int]:
        return sorted(self._hosted.copy())

    def hear_leader(self, hosted: Hosted) -> None:
        """Take plans, if this rank follows; may be called twice."""
        if hosted.follower is not None:
            hosted.follower.stopped = False
            self.poller.register(hosted.follower.socket, zmq.POLLIN)

    def ignore_leader(self, hosted: Hosted) -> None:
        """The other way. May be called twice."""
        if hosted.follower is not None:
            self._unregister(hosted.follower.socket)

    def hear_followers(self, hosted: Hosted) -> None:
        """Of a leader: until it is removed."""
        for line in hosted.lines:
            self.poller.register(line, zmq.POLLIN)

    def _unregister(self, socket: zmq.Socket[bytes]) -> None:
        if socket in self.poller:
            self.poller.unregister(socket)
