"""One of N processes that form worlds with each other: real gloo, no engine.

Run as `python -m tests.process.world_member SCENARIO...` with RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT set; rank 0 hosts the store. All processes run the same
scenarios in order, and each prints `RESULT {"scenario": ..., ...}` for each.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from vllm_resident.rank.prepare import prepare_process

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = prepare_process(RANK, SIZE)

# ruff: noqa: E402
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.platforms import current_platform

from vllm_resident import shm
from vllm_resident.errors import RankTimeout
from vllm_resident.rank import ledger, mapping
from vllm_resident.rank.store import StoreCancelled
from vllm_resident.rank.world import World, connect_store, num_process_groups

OWNER = shm.owner_token(os.getppid())
STORE = connect_store(60.0)
# The shared-memory collectives among them, which a worker loads with its model.
current_platform.import_kernels()
ABORT_AFTER_S = 0.3
SETTLE_S = 20.0
log = logging.getLogger(__name__)


def form(identity: str, members: list[int], timeout_s: float = 20.0, **how: Any) -> Any:
    """The world over `members` with vLLM's groups in it; None where not a member."""
    if RANK not in members:
        return None
    size, rank = len(members), members.index(RANK)
    world = World.form(
        identity=identity,
        rank=rank,
        size=size,
        local_rank=RANK,
        owner=OWNER,
        store=STORE,
        backend=DEVICE.backend,
        timeout_s=timeout_s,
        **how,
    )
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            size, rank, "env://", RANK, DEVICE.backend
        )
        parallel_state.initialize_model_parallel(size, 1, backend=DEVICE.backend)
    return world


def meet(point: str) -> None:
    """Wait for all processes, outside every world; where nothing was asked of a world
    since it was formed, before it is closed: another may be forming it still."""
    if STORE.add(f"meet/{point}", 1) == SIZE:
        STORE.set(f"meet/{point}/all", b"1")
    STORE.wait([f"meet/{point}/all"])


def sums(world: World) -> list[float]:
    """2**member, summed over the world in every way an engine may ask for it."""
    world.enter()
    group = parallel_state.get_tp_group()
    mine = torch.full((8,), float(2**RANK))
    over_gloo = mine.clone()
    dist.all_reduce(over_gloo, group=group.cpu_group)
    over_default = mine.clone()
    dist.all_reduce(over_default)
    by_c10d_name = functional.all_reduce(mine, "sum", group.cpu_group)
    by_vllm_name = parallel_state.all_reduce(mine.clone(), group.unique_name)
    over_shm = group.all_reduce(mine.clone())
    results = (over_gloo, over_default, by_c10d_name, by_vllm_name, over_shm)
    return [each[0].item() for each in results]


def names(world: World) -> list[str]:
    world.enter()
    groups = [parallel_state.get_tp_group(), parallel_state.get_pp_group()]
    registered = sorted(dist.distributed_c10d._world.pg_names.values())
    return [each.unique_name for each in groups] + registered


def keys_of(identity: str) -> int:
    return sum(key.startswith(identity) for key in STORE.list_keys())


# ------------------------------------------------------------------- scenarios


def overlapping() -> dict[str, Any]:
    """Worlds over overlapping ranks, alive together; some ranks made others before."""
    for number in range(RANK):
        form(f"alone-{RANK}-{number}", [RANK]).close()
    layouts = {"left": [0, 1], "middle": [1, 2], "right": [2, 3], "all": [0, 1, 2, 3]}
    worlds = {name: form(name, members) for name, members in layouts.items()}
    mine = {name: world for name, world in worlds.items() if world is not None}
    result: dict[str, Any] = {
        "names": {name: names(world) for name, world in mine.items()},
        "num_store_keys": keys_of("all"),
        "first": {name: sums(world) for name, world in mine.items()},
        "again": {name: sums(world) for name, world in reversed(mine.items())},
    }
    for closing in ("left", "all"):
        if closing in mine:
            mine.pop(closing).close()
        meet(f"overlapping/{closing}")
        result[f"without {closing}"] = {n: sums(world) for n, world in mine.items()}
    for world in mine.values():
        world.close()
    return result


def outside() -> dict[str, Any]:
    """What the process has of its own is there again outside of every world."""
    hook, place = sys.excepthook, {n: os.environ.get(n) for n in ("RANK", "WORLD_SIZE")}
    random.seed(7)
    torch.manual_seed(7)
    expected = random.random(), torch.rand(1).item()
    random.seed(7)
    torch.manual_seed(7)
    with form("outside", [0, 1, 2, 3][::-1]) as world:
        inside = {n: os.environ.get(n) for n in place}
        torch.manual_seed(RANK)
    drawn = random.random(), torch.rand(1).item()
    meet("outside/formed")
    world.close()
    return {
        "hook": sys.excepthook is hook,
        "inside": inside,
        "after": {n: os.environ.get(n) for n in place} == place,
        "default_group": dist.is_initialized(),
        "rng": drawn == expected,
    }


def twenty() -> dict[str, Any]:
    """Twenty worlds formed, used and closed, in pairs of ranks side by side."""
    members = [0, 1] if RANK < 2 else [2, 3]

    def gauges() -> list[int]:
        read = ledger.read(DEVICE, OWNER)
        return [
            read.num_file_descriptors,
            read.num_threads,
            read.num_shm_segments,
            keys_of("twenty"),
        ]

    def settled(at_most: list[int] | None = None) -> list[int]:
        """Gauges at rest: a thread that was joined may be there for a moment."""
        meet(f"twenty/{len(taken)}")
        deadline = time.monotonic() + SETTLE_S
        read = gauges()
        while at_most is not None and time.monotonic() < deadline:
            if all(now <= then for now, then in zip(read, at_most, strict=True)):
                break
            time.sleep(0.05)
            read = gauges()
        taken.append(read)
        meet(f"twenty/{len(taken)}/read")
        return taken[-1]

    taken: list[list[int]] = []
    for number in range(2):
        world = form(f"warm-up-{number}-{members[0]}", members)
        meet(f"twenty/warm-up/{number}")
        world.close()
    before = settled()
    right = True
    for number in range(20):
        world = form(f"twenty-{number}-{members[0]}", members)
        right &= set(sums(world)) == {float(sum(2**member for member in members))}
        world.close()
    after = settled(before)
    files = [str(path) for path in shm.segments(OWNER)]
    return {"before": before, "after": after, "right": right, "files": files}


def similar_identities() -> dict[str, Any]:
    """Closing world 1 leaves the shared memory of world 12 alone."""
    first = form("session-1", [0, 1, 2, 3])
    other = form("session-12", [0, 1, 2, 3])
    before = mapping.num_shared_segments(other.segment_token)
    first.close()
    after = mapping.num_shared_segments(other.segment_token)
    meet("similar_identities")
    right = sums(other)
    other.close()
    return {
        "shares_memory": hasattr(torch.ops._C, "init_shm_manager"),
        "before": before,
        "after": after,
        "sums": right,
    }


def _aborting(world: World, moments: list[float]) -> None:
    def abort() -> None:
        time.sleep(ABORT_AFTER_S)
        moments.append(time.monotonic())
        world.abort()

    threading.Thread(target=abort).start()


def abort_a_meeting() -> dict[str, Any]:
    """Rank 0 waits for a member that does not come until another thread aborts."""
    if RANK != 0:
        return {}
    moments: list[float] = []
    try:
        form("given-up", [0, 1], on_start=lambda world: _aborting(world, moments))
    except StoreCancelled:
        return {
            "seconds": time.monotonic() - moments[0],
            "entered": World._entered is not None,
            "num_store_keys": keys_of("given-up"),
        }
    raise AssertionError("the world was formed")


def abort_and_close_at_once() -> dict[str, Any]:
    """A world given up by the controller in the moment in which its build fails."""
    errors: list[str] = []
    for number in range(30):
        world = form(f"both-{RANK}-{number}", [RANK])
        together = threading.Barrier(3)

        def act(what: Callable[[], None], together: threading.Barrier) -> None:
            together.wait()
            try:
                what()
            except Exception as error:  # noqa: BLE001 (what there must be none of)
                errors.append(repr(error))

        threads = [
            threading.Thread(target=act, args=(world.abort, together)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        act(world.close, together)
        for thread in threads:
            thread.join()
    return {"errors": errors, "num_groups": num_process_groups()}


def absent_member() -> dict[str, Any]:
    """Rank 3 never comes."""
    if RANK == 3:
        return {}
    since = time.monotonic()
    try:
        form("incomplete", [0, 1, 2, 3], timeout_s=15.0)
    except RankTimeout as error:
        return {"message": str(error), "seconds": time.monotonic() - since}
    raise AssertionError("the world was formed")


class Crossed:
    """Engines over ranks 0 and 1 and over 2 and 3 serve; the worlds that form have one
    rank of each. A leader stops its engine for another's sake only when it has done so
    for its own world, and hears of it where it serves: before that is formed and after
    it, not in between."""

    def __init__(self) -> None:
        self.is_held = False

    def waits_for_leaders(self) -> bool:
        return RANK in (1, 3)

    def serve(self) -> None:
        if RANK in (0, 2) and self.is_held:
            STORE.set(f"crossed/{RANK + 1}", b"held")

    def hold(self) -> bool:
        self.is_held = RANK in (0, 2) or STORE.check([f"crossed/{RANK}"])
        return self.is_held


def crossed() -> dict[str, Any]:
    """Each of two worlds needs the leader of an engine that is in the other."""
    members = [0, 3] if RANK in (0, 3) else [1, 2]
    beside = Crossed()
    world = form(f"crossed-{members[0]}", members, meanwhile=beside)
    beside.serve()
    result = {"sums": sums(world)}
    meet("crossed/formed")
    world.close()
    return result


def closed_on_one_side() -> dict[str, Any]:
    """Rank 1 closes alone; rank 0's next collective must not wait for it for ever."""
    world = form("one-sided", [0, 1])
    if world is None:
        return {}
    sums(world)
    if RANK == 1:
        world.close()
        return {}
    since = time.monotonic()
    try:
        while time.monotonic() < since + 20:
            dist.all_reduce(
                torch.ones(8), group=parallel_state.get_tp_group().cpu_group
            )
        raise AssertionError("the collectives went on")
    except RuntimeError:
        return {"seconds": time.monotonic() - since}
    finally:
        world.close()
        world.close()


def run(scenario: Callable[[], dict[str, Any]]) -> None:
    name = scenario.__name__
    meet(f"{name}/begin")
    since = time.monotonic()
    result = scenario()
    meet(f"{name}/end")
    line = {"scenario": name, "rank": RANK, "took": time.monotonic() - since, **result}
    sys.stdout.write(f"RESULT {json.dumps(line)}\n")
    sys.stdout.flush()


def main() -> None:
    try:
        for name in sys.argv[1:]:
            run(globals()[name])
        STORE.add("num_done", 1)
        while RANK == 0 and STORE.add("num_done", 0) < SIZE:
            time.sleep(0.01)  # the store is in this process
        status = 0
    except Exception:
        log.exception("rank %d failed", RANK)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
