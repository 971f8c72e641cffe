"""How the ranks of one world meet before they form it, and what they say to each other.

Over the world's part of the launcher's store: each says something at a named point and
reads what the others said there; whoever does not come is named. Knows neither process
groups nor engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
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
        that do not. `mine` and what comes back are of `kind`; a point serves once."""
        keys = [f"{point}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], msgspec.msgpack.encode(mine))
        timeout_s = max(deadline - time.monotonic(), 0.0)
        try:
            self.store.wait(keys, timedelta(seconds=timeout_s), serve)
        except dist.DistStoreError as error:
            absent = [r for r, key in enumerate(keys) if not self.store.check([key])]
            raise RankTimeout(
                f"ranks {absent} of world {self.identity} did not come to form it "
                f"within {timeout_s:.3g} s"
            ) from error
        said = self.store.get_all(keys)
        return [msgspec.msgpack.decode(each, type=kind) for each in said]

    def hold(self, meanwhile: Meanwhile, deadline: float) -> None:
        """Serve until what is beside this rank stands still; `RankTimeout` if it does
        not."""
        while not meanwhile.hold():
            meanwhile.serve()
            self.store.pause(_HOLD_POLL_S)
            if time.monotonic() > deadline:
                raise RankTimeout(
                    f"an engine beside world {self.identity} was not held by its "
                    f"leader before the time to form it was over"
                )
