"""Which of a device's allocations are whose, among the engines of one process.

vLLM's allocators for sleep mode (0.32.0, device_allocator/cumem.py; vllm-ascend
0.23.0.post1, device_allocator/camem.py) are one per process and take all that is in
them for one engine's. Here each engine has `Holdings` of its own: `current` are those
of the world that is entered (`ambient` exchanges them), and `Allocations` is the table
an allocator is given in place of its own. Knows nothing of torch, vLLM or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from vllm_resident.rank.arena import Lease


class Pools(dict[str, Any]):
    """The memory pools of one engine by tag, as vLLM keeps them, which also keeps those
    it overwrites (0.23.0): a pool must outlive what is allocated in it."""

    def __init__(self) -> None:
        super().__init__()
        self._replaced: list[Any] = []

    def __setitem__(self, tag: str, pools: Any) -> None:
        if tag in self:
            self._replaced.append(self[tag])
        super().__setitem__(tag, pools)

    def take_all(self) -> list[tuple[Any, Any]]:
        """(pool, allocator) of every one, which are forgotten here."""
        entries = [*self._replaced, *self.values()]
        self._replaced.clear()
        self.clear()
        # One for a tag in 0.23.0 and vllm-ascend, a list of them in 0.32.0.
        return [
            pool
            for entry in entries
            for pool in (entry if isinstance(entry, list) else [entry])
        ]


class Holdings:
    """What one engine has: its allocations by address (vLLM's own records of them),
    the pools they are in, and by tag what is in host memory while it sleeps."""

    def __init__(self) -> None:
        self.allocations: dict[int, Any] = {}
        self.pools = Pools()
        self.stored: dict[str, tuple[Lease, dict[int, int]]] = {}

    def num_bytes(self, *tags: str) -> int:
        """Of the allocations with these tags, mapped or not."""
        every = self.allocations.values()
        return sum(each.handle[1] for each in every if each.tag in tags)


# Those of the world that is entered, or the process's own.
current = Holdings()


class Allocations(MutableMapping[int, Any]):
    """An allocator's table of all engines' allocations, of which it can list and count
    the current engine's alone. Any can be looked up or taken out: memory is freed when
    its last tensor dies, whoever is at work then.

    `taken_out` has the handles of those that were, while their addresses are not in use
    again.
    """

    def __init__(self) -> None:
        self._holders: dict[int, Holdings] = {}
        self.taken_out: dict[int, Any] = {}

    def __setitem__(self, address: int, data: Any) -> None:
        self.taken_out.pop(address, None)
        current.allocations[address] = data
        self._holders[address] = current

    def __getitem__(self, address: int) -> Any:
        return self._holders[address].allocations[address]

    def __delitem__(self, address: int) -> None:
        data = self._holders.pop(address).allocations.pop(address)
        self.taken_out[address] = data.handle

    def __iter__(self) -> Iterator[int]:
        return iter(current.allocations)

    def __len__(self) -> int:
        return len(current.allocations)
