"""One of N processes that form worlds over SIMULATED device groups and keep them, and
vLLM's own communicators over a SIMULATED NCCL.

Run as `python -m tests.process.communicator_member JSON SCENARIO...`, otherwise like
`world_member`: vLLM's own parallel state, no engine. The JSON has what a scenario is
to do (`num_layouts`, `creation_s`, ...). Each prints `RESULT {...}` lines.
"""

from __future__ import annotations

import gc
import json
import logging
import operator
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from vllm_resident.rank.prepare import prepare_process

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = prepare_process(RANK, SIZE)
PLAN = json.loads(sys.argv[1])

# ruff: noqa: E402
import torch
import torch.distributed as dist
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.platforms import current_platform

from tests.simulation import ascend as stand_in
from tests.simulation import backend as simulation
from tests.simulation import nccl as simulated_nccl
from vllm_resident import shm
from vllm_resident.rank import groups, holders, ledger, nccl
from vllm_resident.rank.communicators import Budget, CommunicatorPool
from vllm_resident.rank.groups import destroy
from vllm_resident.rank.process_groups import set_timeout
from vllm_resident.rank.world import World, connect_store

OWNER = shm.owner_token(os.getppid())
STORE = connect_store(60.0)
BACKEND = "hccl"
ALL = list(range(SIZE))
# How long a broken one is waited for where there is one; elsewhere as long as a machine
# may pause.
BREAKING = ("broken_while_kept", "of_another_layout", "vllms_own")
BROKEN_S, SOUND_S = 6.0, 40.0
REST_S = 15.0
POOL = CommunicatorPool(Budget(PLAN.get("num", 1000)), destroy)
CONFIG = VllmConfig()
# When each world was formed, vLLM's own groups not yet in it.
FORMED: list[float] = []
log = logging.getLogger(__name__)

type(current_platform).get_device_communicator_cls = classmethod(
    lambda _: simulated_nccl.DEVICE_COMMUNICATOR
)
simulated_nccl.install(STORE)
simulation.install("simulated_nccl")
simulation.install("hccl", creation_s=PLAN.get("creation_s", 0.0))


def form(
    identity: str,
    members: list[int],
    timeout_s: float = 60.0,
    *,
    settle: bool = True,
    num_stages: int = 1,
    **how: Any,
) -> World:
    """The world over `members`, this rank among them, with vLLM's groups in it; more
    are to come unless it is settled."""
    world = World.form(
        identity=identity,
        rank=members.index(RANK),
        size=len(members),
        local_rank=RANK,
        owner=OWNER,
        store=STORE,
        backend=BACKEND,
        timeout_s=timeout_s,
        members=members,
        **{"communicators": POOL, "memory_used": lambda: DEVICE.memory()[0], **how},
    )
    FORMED.append(time.perf_counter())
    with set_current_vllm_config(CONFIG):
        parallel_state.init_distributed_environment(
            len(members), members.index(RANK), "env://", RANK, BACKEND
        )
        parallel_state.initialize_model_parallel(
            len(members) // num_stages, num_stages, backend=BACKEND
        )
    if settle:
        world.settle()
    return world


def meet(point: str, ranks: list[int] = ALL) -> None:
    """Wait for these processes, outside every world. Before a world is closed in order
    all must have formed it, which no collective has shown where none was run."""
    if STORE.add(f"meet/{point}", 1) == len(ranks):
        STORE.set(f"meet/{point}/all", b"1")
    STORE.wait([f"meet/{point}/all"])


def form_and_close(identity: str) -> None:
    """A world over all, which leaves its groups behind."""
    world = form(identity, ALL)
    meet(f"{identity}/formed")
    world.close(orderly=True)


def sums(world: World) -> list[float]:
    """2**member, summed over the world's groups of both kinds, and by vLLM."""
    world.enter()
    group = parallel_state.get_tp_group()
    found = []
    for each in (group.cpu_group, group.device_group, None):
        mine = torch.full((8,), float(2**RANK))
        dist.all_reduce(mine, group=each)
        found.append(mine[0].item())
    return [*found, sum_by_vllm()]


def sum_by_vllm() -> float:
    """2**member, summed over its NCCL communicator of the tensor-parallel group."""
    mine = torch.full((8,), float(2**RANK))
    return parallel_state.get_tp_group().all_reduce(mine)[0].item()


def are_right(found: list[float], members: list[int]) -> bool:
    return set(found) == {float(sum(2**member for member in members))}


def say(scenario: str, **result: Any) -> None:
    line = json.dumps({"scenario": scenario, "rank": RANK, **result})
    sys.stdout.write(f"RESULT {line}\n")
    sys.stdout.flush()


def gauges() -> list[int]:
    """Descriptors, threads and groups, without vLLM's garbage."""
    gc.collect()
    read = ledger.read(DEVICE, OWNER)
    return [read.num_file_descriptors, read.num_threads, read.num_process_groups]


def gauges_at_rest(at_most: list[int]) -> list[int]:
    """What they come to: a thread that was joined may be about to end."""
    deadline = time.monotonic() + REST_S
    while True:
        read = gauges()
        if time.monotonic() > deadline or all(map(operator.le, read, at_most)):
            return read
        time.sleep(0.1)


def partition(draw: random.Random) -> list[list[int]]:
    """A layout: the ranks dealt out to worlds."""
    worlds: list[list[int]] = []
    for rank in ALL:
        place = draw.randrange(len(worlds) + 1)
        if place == len(worlds):
            worlds.append([])
        worlds[place].append(rank)
    return worlds


# ------------------------------------------------------------------- scenarios


def layouts() -> None:
    """Random layouts one after the other: what the first and the next time cost."""
    draw = random.Random(PLAN["seed"])
    known = [partition(draw) for _ in range(PLAN["num_distinct"])]
    seen: set[tuple[int, ...]] = set()
    rows = []
    for number in range(PLAN["num_layouts"]):
        layout = draw.choice(known)
        mine = next(world for world in layout if RANK in world)
        is_known = tuple(mine) in seen
        seen.add(tuple(mine))
        before = replace(POOL.counts)
        meet(f"layouts/{number}")
        since = time.perf_counter()
        world = form(f"layouts-{number}-{mine[0]}", mine)
        took_s = time.perf_counter() - since
        right = are_right(sums(world), mine)
        world.close(orderly=True)
        rows.append(
            {
                "ranks": len(mine),
                "is_known": is_known,
                "took_s": took_s,
                "formed_s": FORMED[-1] - since,
                "right": right,
                "made": POOL.counts.made - before.made,
                "checked": POOL.counts.checked - before.checked,
                "reused": POOL.counts.reused - before.reused,
                "kept": POOL.num,
            }
        )
    say("layouts", rows=rows)


def floor() -> None:
    """What four ranks that only wait for each other cost on this machine."""
    world = form("floor", ALL)
    group = parallel_state.get_tp_group().cpu_group
    seconds = []
    for _ in range(PLAN["num_barriers"]):
        since = time.perf_counter()
        dist.barrier(group=group)
        seconds.append(time.perf_counter() - since)
    world.close(orderly=True)
    say("floor", seconds=seconds)


def without_pool() -> None:
    """The same world twice with nothing kept."""
    meet("without_pool")
    rows, made = [], []
    for number in range(2):
        meet(f"without_pool/{number}")
        before = simulation.num_made()
        since = time.perf_counter()
        world = form(f"without-{number}", ALL, communicators=None)
        rows.append(time.perf_counter() - since)
        made.append(simulation.num_made() - before)
        meet(f"without_pool/{number}/formed")
        world.close(orderly=True)
    say("without_pool", rows=rows, made=made)


def interleaved() -> None:
    """Worlds over overlapping ranks, formed in an order all know, several alive at a
    time, closed by each rank when and in which order it likes."""
    order, mine = random.Random(5), random.Random(RANK)
    alive: list[World] = []
    right, num_formed, most = True, 0, 0
    for number in range(PLAN["num_worlds"]):
        members = order.sample(ALL, order.randint(1, SIZE))
        if RANK not in members:
            continue
        time.sleep(mine.choice([0, 0, 0.002]))
        world = World.form(
            identity=f"interleaved-{number}",
            rank=members.index(RANK),
            size=len(members),
            local_rank=RANK,
            owner=OWNER,
            store=STORE,
            backend=BACKEND,
            timeout_s=30.0,
            members=members,
            communicators=POOL,
        )
        # One more group, which those who are not in it make too.
        part = dist.new_group(list(range(max(1, len(members) - 1))))
        world.settle()
        total = torch.full((2,), float(2**RANK))
        dist.all_reduce(total)
        right &= are_right(total.tolist(), members)
        if world.rank < max(1, len(members) - 1):
            dist.barrier(group=part)
        world.leave()
        num_formed += 1
        alive.append(world)
        most = max(most, len(alive))
        while len(alive) > mine.randint(0, 3):
            alive.pop(mine.randrange(len(alive))).close(orderly=True)
    for world in alive:
        world.close(orderly=True)
    say("interleaved", right=right, formed=num_formed, most=most)


def budget() -> None:
    """However many worlds come and go, no more is kept than is allowed, and when that
    is given up nothing is left."""
    # Twice the same: what the first of its kind leaves in a process for good is there.
    for turn in ("first", "again"):
        POOL.close()
        meet(f"budget/{turn}")
        before = gauges()
        meet(f"budget/{turn}/begun")
        destroyed = POOL.counts.destroyed
        most = _many_worlds(turn)
        destroyed = POOL.counts.destroyed - destroyed
        told, is_within = _communicators_of_some_bytes(turn)
        POOL.close()
        meet(f"budget/{turn}/closed")
        after = gauges_at_rest(before)
    POOL.set_budget(Budget(1000))
    say(
        "budget",
        most=most,
        before=before,
        after=after,
        open=simulation.num_open(),
        destroyed=destroyed,
        told=told,
        within=is_within,
    )


def _many_worlds(turn: str) -> int:
    """The most that was kept, or open while no world was."""
    POOL.set_budget(Budget(PLAN["small_budget"]))
    draw = random.Random(11)
    most = 0
    for number in range(PLAN["num_small"]):
        mine = next(world for world in partition(draw) if RANK in world)
        meet(f"budget/{turn}/{number}")
        world = form(f"budget-{turn}-{number}-{mine[0]}", mine)
        assert are_right(sums(world), mine)
        world.close(orderly=True)
        most = max(most, POOL.num, simulation.num_open())
    POOL.close()
    return most


def _communicators_of_some_bytes(turn: str) -> tuple[float, bool]:
    """What the rank says they have by what they have, and whether a limit holds."""
    size, limit = 8 * 2**20, 20 * 2**20
    simulation.settings.num_bytes = size
    POOL.set_budget(Budget(1000))
    form_and_close(f"budget-{turn}-bytes")
    simulated = [each for each in POOL.within(ALL) if each.key.backend == BACKEND]
    told = sum(each.num_bytes for each in simulated) / (size * len(simulated))
    POOL.set_budget(Budget(1000, limit))
    simulation.settings.num_bytes = 0
    return told, 0 < POOL.num_bytes <= limit


def _abort_after(world: World, point: str) -> None:
    while not STORE.check([point]):
        time.sleep(0.02)
    world.abort()


def _failing(name: str, members: list[int], *, is_aborted: bool) -> None:
    """Every member goes on with collectives until one of them fails for it."""
    kept = POOL.num
    world = form(name, members)
    names = [each.name for each in world._c10d.groups._mine.values()]
    sums(world)
    meet(f"{name}/ready", members)
    set_timeout(dist.group.WORLD, timedelta(seconds=PLAN["timeout_s"]))
    point = f"{name}/fault"
    if PLAN["victim"] == RANK:
        simulation.settings.fault = PLAN["fault"]
        simulation.settings.at = simulation._num_collectives + 3
        simulation.settings.on_fault = lambda: STORE.set(point, b"1")
    if is_aborted:
        threading.Thread(target=_abort_after, args=(world, point), daemon=True).start()
    since = time.perf_counter()
    error = ""
    try:
        while time.perf_counter() < since + 60:
            dist.all_reduce(torch.ones(8))
    except RuntimeError as failure:
        error = str(failure)
    out_s = time.perf_counter() - since
    world.close()
    world.close()
    simulation.settings.at = 0
    say(
        name,
        out_s=out_s,
        error=error,
        closed_s=time.perf_counter() - since - out_s,
        closed=world.closed,
        entered=World._entered is not None,
        kept_of_it=[each for each in names if POOL.find(each)],
        kept_before=kept,
        kept_after=POOL.num,
        open=simulation.num_open(),
    )


def hangs_until_abort() -> None:
    """One member hangs in a collective; every rank's world is aborted from outside."""
    PLAN.update(victim=SIZE - 1, fault="hang", timeout_s=60.0)
    _failing("hangs_until_abort", ALL, is_aborted=True)
    _next_world("hangs_until_abort", ALL)


def hangs_until_time_out() -> None:
    """One member hangs; nobody aborts: the group's own time-out ends it."""
    PLAN.update(victim=SIZE - 1, fault="hang", timeout_s=2.0)
    _failing("hangs_until_time_out", ALL, is_aborted=False)
    _next_world("hangs_until_time_out", ALL)


def dies() -> None:
    """One member dies in a collective; the survivors go on without it. Over the other
    simulated library, which is aborted in another way."""
    global BACKEND
    BACKEND = "simulated_nccl"
    PLAN.update(victim=SIZE - 1, fault="die", timeout_s=60.0)
    _failing("dies", ALL, is_aborted=True)
    _next_world("dies", ALL[:-1])


def _next_world(after: str, members: list[int]) -> None:
    counts = POOL.counts
    made, reused = counts.made, counts.reused
    world = form(f"after-{after}", members)
    right = are_right(sums(world), members)
    world.close(orderly=True)
    say(
        f"next_{after}",
        right=right,
        made=counts.made - made,
        reused=counts.reused - reused,
    )


def lost_on_one_side() -> None:
    """What one rank has given up by itself is given up by the others at the meeting."""
    form_and_close("one-sided-0")
    if RANK == 1:
        POOL.close()
    kept = POOL.num
    made, reused = POOL.counts.made, POOL.counts.reused
    world = form("one-sided-1", ALL)
    right = are_right(sums(world), ALL)
    result = [POOL.counts.made - made, POOL.counts.reused - reused]
    world.close(orderly=True)
    say("lost_on_one_side", right=right, kept=kept, counts=result, after=POOL.num)


def broken_while_kept() -> None:
    """One that no longer works is found out by the check, and made anew."""
    form_and_close("broken-0")
    if RANK == 2:
        victims = [e for e in POOL.within(ALL) if len(e.key.ranks) == SIZE]
        victims = [e for e in victims if e.key.backend == BACKEND]
        victims[0].handle._aborted.set()
    made = POOL.counts.made
    world = form("broken-1", ALL)
    right = are_right(sums(world), ALL)
    made = POOL.counts.made - made
    world.close(orderly=True)
    say("broken_while_kept", right=right, made=made)


def of_another_layout() -> None:
    """What worlds of two had serves as parts of a world of four, checked when it is
    taken: first sound, then with one that no longer works."""
    halves = [ALL[: SIZE // 2], ALL[SIZE // 2 :]]
    mine = next(half for half in halves if RANK in half)
    POOL.close()
    right, made, checked = True, [], []
    for turn in ("sound", "broken"):
        world = form(f"half-{turn}-{mine[0]}", mine)
        right &= are_right(sums(world), mine)
        # One that has run nothing yet is not worth a check.
        for group in [g for g in world._c10d.pg_map if g.size() == len(mine)]:
            dist.all_reduce(torch.ones(2), group=group)
        world.close(orderly=True)
        if turn == "broken" and RANK == 1:
            _break_one(mine)
        meet(f"of_another_layout/{turn}")
        world = form(f"whole-{turn}", ALL, settle=False)
        before = replace(POOL.counts)
        parts = [dist.new_group(half, backend=BACKEND) for half in halves]
        made.append(POOL.counts.made - before.made)
        checked.append(POOL.counts.checked - before.checked)
        world.settle()
        total = torch.full((2,), float(2**RANK))
        dist.all_reduce(total, group=parts[halves.index(mine)])
        right &= are_right(total.tolist(), mine)
        meet(f"of_another_layout/{turn}/done")
        world.close(orderly=True)
    say("of_another_layout", right=right, made=made, checked=checked)


def _break_one(members: list[int]) -> None:
    """Of those kept over just these ranks, the one that would be taken first."""
    kept = [e for e in POOL.within(members) if len(e.key.ranks) == len(members)]
    next(e for e in kept if e.key.backend == BACKEND).handle._aborted.set()


def vllms_own() -> None:
    """vLLM's own NCCL communicators of worlds of two serve the stages of a world of
    four, checked when they are taken: first sound, then with some that no longer work,
    then none, since their memory was suspended."""
    halves = [ALL[: SIZE // 2], ALL[SIZE // 2 :]]
    mine = next(half for half in halves if RANK in half)
    POOL.close()
    right, made, checked = True, [], []
    for turn in ("sound", "broken", "suspended"):
        world = form(f"own-{turn}-{mine[0]}", mine)
        right &= are_right(sums(world), mine)
        owners = [nccl.of_coordinator(each) for each in world._holders.groups()]
        owners = [owner for owner in owners if owner is not None]
        if turn == "suspended":
            for owner in owners:
                owner.suspend()
        world.close(orderly=True)
        right &= len(owners) > 0 and not any(owner.available for owner in owners)
        if turn == "broken" and RANK == 1:
            for each in POOL.within(mine):
                if each.key.backend == nccl.BACKEND:
                    simulated_nccl.break_one(each.handle)
        meet(f"vllms_own/{turn}")
        before = replace(simulated_nccl.counts)
        world = form(f"own-whole-{turn}", ALL, num_stages=2)
        right &= are_right([sum_by_vllm()], mine)
        made.append(simulated_nccl.counts.made - before.made)
        checked.append(simulated_nccl.counts.beside - before.beside)
        meet(f"vllms_own/{turn}/formed")
        world.close(orderly=True)
    gone = _dropped_with_its_group()
    POOL.close()
    say(
        "vllms_own",
        right=right,
        made=made,
        checked=checked,
        gone=gone,
        open=simulated_nccl.num_open(),
    )


def _dropped_with_its_group() -> bool:
    """Of a world that is not closed in order: nothing holds vLLM's object any more, nor
    the gloo group it has, whose end frees those that wait in it."""
    world = form("own-dropped", ALL)
    meet("vllms_own/dropped")
    owner, *_ = filter(None, map(nccl.of_coordinator, world._holders.groups()))
    held = [weakref.ref(owner), weakref.ref(owner.group)]
    del owner
    world.close()
    deadline = time.monotonic() + REST_S
    while any(each() for each in held) and time.monotonic() < deadline:
        time.sleep(0.05)  # a thread that aborts may hold them for a moment
    return not any(each() for each in held)


def ascend() -> None:
    """Two worlds with an Ascend platform's globals, by a STAND-IN of it."""
    found: dict[str, Any] = {
        "absent": not [name for name in sys.modules if name.startswith("vllm_ascend")]
    }
    state = stand_in.install()
    config, utils = sys.modules[stand_in.CONFIG], sys.modules[stand_in.UTILS]
    registry = sys.modules[stand_in.PATCH]._HCCL_PG_REGISTRY
    holders.register("cpu", holders.AscendHolder)
    worlds, groups = {}, {}
    for name in ("first", "second"):
        world = form(f"ascend-{name}", ALL)
        found[f"{name} begins empty"] = (
            not any(getattr(state, each) for each in stand_in.GLOBALS)
            and not registry._entries
            and utils._IS_MOE_MODEL is None
        )
        config._ASCEND_CONFIG, utils._IS_MOE_MODEL = f"config of {name}", name
        state.init_ascend_model_parallel(ALL, buffer_mb=3)
        groups[name] = {each: getattr(state, each) for each in stand_in.GLOBALS}
        worlds[name] = world
    for name, world in worlds.items():
        world.enter()
        found[f"{name} is swapped in"] = (
            all(getattr(state, each) is groups[name][each] for each in stand_in.GLOBALS)
            and f"config of {name}" == config._ASCEND_CONFIG
            and name == utils._IS_MOE_MODEL
            and len(registry._entries) == 3
        )
        mine = torch.full((4,), float(2**RANK))
        dist.all_reduce(mine, group=state._OTP.device_group)
        found[f"{name} adds up"] = mine[0].item()
    worlds["second"].leave()
    found["outside is empty"] = (
        not any(getattr(state, each) for each in stand_in.GLOBALS)
        and not registry._entries
        and config._ASCEND_CONFIG is None
    )
    found["they share none"] = not {
        id(each.device_group)
        for each in groups["first"].values()
        if each != "left behind" and each
    } & {
        id(each.device_group)
        for each in groups["second"].values()
        if each != "left behind" and each
    }
    del groups
    before = POOL.num
    worlds["first"].close(orderly=True)
    found["kept"] = POOL.num > before
    options = [
        each for each in POOL.within(ALL) if "hccl_buffer_size" in each.key.options
    ]
    found["bytes by options"] = sorted({each.num_bytes // 2**20 for each in options})
    with worlds["second"]:
        mine = torch.full((4,), float(2**RANK))
        dist.all_reduce(mine, group=state._MC2.device_group)
        found["second goes on"] = mine[0].item()
    worlds["second"].close(orderly=True)
    found["destroyed"] = state.num_destroyed
    found["empty at the end"] = not any(
        getattr(state, each) for each in stand_in.GLOBALS
    )
    # Other buffers, other communicators; the others are used again.
    for buffer_mb in (3, 4):
        made = POOL.counts.made
        world = form(f"ascend-{buffer_mb}", ALL, settle=False)
        config._ASCEND_CONFIG = "config"
        state.init_ascend_model_parallel(ALL, buffer_mb=buffer_mb)
        world.settle()
        meet(f"ascend/{buffer_mb}")
        world.close(orderly=True)
        found[f"made with {buffer_mb} MB"] = POOL.counts.made - made
    holders._OF_DEVICE.pop("cpu")
    say("ascend", **found)


def run(scenario: Callable[[], None]) -> None:
    log.info("scenario %s", scenario.__name__)
    is_timed = scenario.__name__ in ("layouts", "without_pool")
    simulation.settings.creation_s = PLAN["creation_s"] if is_timed else 0.01
    groups.CHECK_TIMEOUT_S = BROKEN_S if scenario.__name__ in BREAKING else SOUND_S
    meet(f"{scenario.__name__}/begin")
    scenario()


def main() -> None:
    try:
        for name in sys.argv[2:]:
            run(globals()[name])
        POOL.close()
        STORE.add("num_done", 1)
        num_left = SIZE - ("dies" in sys.argv)
        while RANK == 0 and STORE.add("num_done", 0) < num_left:
            time.sleep(0.01)  # the store is in this process
        status = 0
    except Exception:
        log.exception("rank %d failed", RANK)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Static destructors of communicators may wait for peers that are gone.
    os._exit(status)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
