"""What one rank is made of, put together once by `boot` and there for its whole life.

The command loop and its halves take from it what they need; it does nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_resident.rank.communicators import CommunicatorPool
from vllm_resident.rank.control import Control
from vllm_resident.rank.device import Device
from vllm_resident.rank.lines import Lines
from vllm_resident.rank.rpc import SocketFolder
from vllm_resident.rank.world import Store


@dataclass(frozen=True)
class Parts:
    """`rank` is its number in the pool, `owner` the token of the pool that its shared
    memory is called after; `store` is the launcher's."""

    rank: int
    device: Device
    store: Store
    control: Control
    lines: Lines
    owner: str
    communicators: CommunicatorPool
    sockets: SocketFolder

    def memory_used(self) -> int:
        """Bytes, as the device counts them."""
        return self.device.memory()[0]
