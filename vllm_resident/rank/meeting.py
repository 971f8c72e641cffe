"""How the ranks of one world meet before they form it, and what they say to each other.

Over the world's part of the launcher's store: each says something at a named point and
reads what the others said there; whoever does not come is named. Knows neither process
groups nor engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import torch.distributed as dist

from vllm_resident.errors import RankTimeout
from vllm_resident.rank.store import CancellableStore

_HOLD_POLL_S = 0.001


class Meanwhile(Protocol):
    """What a rank goes on doing while it waits for the others to come to a meeting."""

    def serve(self) -> None:
        """Do a little of it; called again and again."""

    def waits_for_leaders(self) -> bool:
        """Whether what is to be held depends on ranks that may not be of this world."""

    def hold(self) -> bool:
        """Stop it: all have come, and this rank is about to wait where nothing else
        can be done. Called until it gives True, `serve` in between."""


class Meeting:
    """One rank's side of it. Main thread only; waits end when the store is cancelled,
    with `StoreCancelled`."""

    def __init__(
        self, identity: str, rank: int, size: int, store: CancellableStore
    ) -> None:
        self.identity = identity
        self.rank = rank
        self.size = size
        self.store = store

    def exchange(
        self,
        point: str,
        mine: Any,
        kind: Any,
        deadline: float,
        serve: Callable[[], None] | None = None,
    ) -> list[Any]:
        """What each rank says at this point, in their order; `RankTimeout` names those
        that do not. `mine` and what comes back are of `kind`; a point serves once.

        Who finds that something was said and deleted waits as for one who is absent: a
        rank has left again, and will tell why itself.
        """
        said, count = f"{point}/said", f"{point}/count"
        lines = msgspec.json.Decoder(tuple[int, kind])  # type: ignore[valid-type]

        def so_far() -> dict[int, Any]:
            return dict(lines.decode_lines(self.store.peek(said) or b""))

        def all_of_it() -> dict[int, Any] | None:
            if int(self.store.peek(count) or 0) < self.size:
                return None
            found = so_far()
            return found if len(found) == self.size else None

        # Counted after it is said: both go the same way, one after the other.
        self.store.append(said, msgspec.json.encode((self.rank, mine)) + b"\n")
        self.store.add(count, 1)
        timeout_s = max(deadline - time.monotonic(), 0.0)
        try:
            found = self.store.wait_for(all_of_it, said, timeout_s, serve)
        except dist.DistStoreError as error:
            absent = sorted({*range(self.size)} - so_far().keys())
            raise RankTimeout(
                f"ranks {absent} of world {self.identity} did not come to form it "
                f"within {timeout_s:.3g} s"
            ) from error
        return [found[rank] for rank in range(self.size)]

    def hold(self, meanwhile: Meanwhile, deadline: float) -> None:
        """Serve until what is beside this rank stands still; `RankTimeout` if it does
        not."""
        while not meanwhile.hold():
            if time.monotonic() > deadline:
                raise RankTimeout(
                    f"an engine beside world {self.identity} was not held by its "
                    f"leader before the time to form it was over"
                )
            meanwhile.serve()
            self.store.pause(_HOLD_POLL_S)
