"""One process of the tests of worlds over NCCL (or HCCL) with torch alone.

`vllm_resident/rank/world.py` needs vLLM's parallel state and cannot be imported without
it. What it stands on is torch's: a private `_World` per world, groups over a prefix of
one store, closing without the process-wide registry, abort from another thread. That
is what is tried here, the same way; `test_vllm.py` has the real thing. Results go to
standard output as JSON, by scenario.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from vllm_resident.rank.device import Device, detect

NUM_REFORMED = 20
GIVE_UP_S = 3.0
TIMEOUT = timedelta(seconds=60)
_MAPS = (
    "pg_map",
    "pg_names",
    "pg_group_ranks",
    "pg_backend_config",
    "tags_to_pg",
    "pg_to_tag",
)


class PrivateState(c10d._World):
    """torch's state object with maps of its own, as `rank/world.py` has it."""

    def __init__(self, first_name: int) -> None:
        super().__init__()
        self.maps: dict[str, Any] = {name: {} for name in _MAPS}
        self._count = first_name

    group_count = property(
        lambda self: self._count, lambda self, value: setattr(self, "_count", value)
    )


for _name in _MAPS:
    setattr(PrivateState, _name, property(lambda self, n=_name: self.maps[n]))


class TorchWorld:
    """A default group of its own over all processes."""

    _num_formed = 0
    _outside = c10d._world

    def __init__(self, store: dist.Store, device: Device, rank: int, size: int) -> None:
        TorchWorld._num_formed += 1
        number = TorchWorld._num_formed
        self._state = PrivateState(number << 12)
        self.device = torch.device(device.name)
        self.enter()
        hook = sys.excepthook
        dist.init_process_group(
            device.backend,
            store=dist.PrefixStore(f"world{number}", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            # Bound: communicators are made now, not at the first collective.
            device_id=self.device,
        )
        sys.excepthook = hook

    def enter(self) -> None:
        c10d._world = self._state

    def sum_of_ranks(self) -> int:
        self.enter()
        rank = torch.tensor([dist.get_rank()], device=self.device)
        dist.all_reduce(rank)
        return int(rank.item())

    def abort(self) -> None:
        for group in list(self._state.pg_map):
            with suppress(RuntimeError):
                group.abort()

    def close(self) -> None:
        names = self._state.pg_names
        for group in sorted(names, key=lambda each: names[each], reverse=True):
            with suppress(RuntimeError):
                group.shutdown()
            with suppress(RuntimeError):
                torch._C._distributed_c10d._unregister_process_group(group.group_name)
        for entries in self._state.maps.values():
            entries.clear()
        self._state.default_pg = None
        c10d._world = TorchWorld._outside


Form = Callable[[], TorchWorld]


def used_bytes(device: Device) -> int:
    device.synchronize()
    device.empty_cache()
    return device.memory()[0]


def reform(form: Form, device: Device, rank: int, size: int) -> dict[str, Any]:
    """A world formed and closed again and again: the memory is back each time."""
    bare = used_bytes(device)
    seconds, held, after, sums = [], [], [], []
    for _ in range(NUM_REFORMED):
        began = time.monotonic()
        world = form()
        sums.append(world.sum_of_ranks())
        seconds.append(time.monotonic() - began)
        held.append(used_bytes(device) - bare)
        world.close()
        del world
        after.append(used_bytes(device))
    return {
        "sums": sums,
        "first_s": seconds[0],
        "next_s": sorted(seconds[1:])[len(seconds) // 2],
        "held_bytes": held[-1],
        "grown_bytes": after[-1] - after[0],
    }


def side_by_side(form: Form, device: Device, rank: int, size: int) -> dict[str, Any]:
    """Two live worlds over the same processes, used in turn, closed in any order."""
    first, second = form(), form()
    sums = [world.sum_of_ranks() for _ in range(5) for world in (first, second)]
    first.close()
    sums.append(second.sum_of_ranks())
    second.close()
    return {"sums": sums}


def hung(form: Form, device: Device, rank: int, size: int) -> dict[str, Any]:
    """The last rank stays away from a collective: the others are let out by an abort
    from another thread, and all of them form the next world."""
    world = form()
    world.sum_of_ranks()
    began = time.monotonic()
    error = ""
    if rank == size - 1:
        time.sleep(2 * GIVE_UP_S)
        world.abort()
    else:
        timer = threading.Timer(GIVE_UP_S, world.abort)
        timer.start()
        try:
            world.sum_of_ranks()
            device.synchronize()
        except RuntimeError as failed:
            error = str(failed).partition("\n")[0]
        timer.join()
    out_s = time.monotonic() - began
    world.close()
    del world
    following = form()
    total = following.sum_of_ranks()
    following.close()
    return {"out_s": out_s, "error": error, "sum": total}


SCENARIOS = {"reform": reform, "side_by_side": side_by_side, "hung": hung}


def main(names: list[str]) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = detect(rank)
    if device.type == "npu":
        import torch_npu  # noqa: F401
    device.activate()
    torch.zeros(1, device=device.name)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        timeout=TIMEOUT,
        wait_for_workers=False,
    )

    def form() -> TorchWorld:
        return TorchWorld(store, device, rank, size)

    results = {name: SCENARIOS[name](form, device, rank, size) for name in names}
    sys.stdout.write(f"RESULTS {json.dumps(results)}\n")
    sys.stdout.flush()
    # Who hosts the store stays until all are done with it.
    store.add("done", 1)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while rank == 0 and store.add("done", 0) < size and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
