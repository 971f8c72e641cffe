"""What `test_allocator` runs in a process of its own, where vLLM can be imported.

vLLM's real allocator class, made resident, in two real worlds of one rank; the device
behind it is simulated. Prints what the test compares, as JSON.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from types import ModuleType

from tests.unit.simulated_device import SimulatedDevice, buffer, make_mover
from vllm_resident import patching

patching.activate()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from vllm.device_allocator.cumem import CuMemAllocator  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

from vllm_resident.rank import allocator, holdings, sleep  # noqa: E402
from vllm_resident.rank.arena import Arena  # noqa: E402
from vllm_resident.rank.device import Device  # noqa: E402
from vllm_resident.rank.world import World  # noqa: E402


class Malloc:
    """As C's my_malloc: vLLM's callback first, then the memory."""

    def __init__(self, resident: CuMemAllocator, tag: str) -> None:
        self._resident, self._tag = resident, tag

    def __setitem__(self, address: int, record: object) -> None:
        self._resident.current_tag = self._tag
        self._resident.python_malloc_callback(record.handle)  # type: ignore[attr-defined]


def form(name: str) -> World:
    return World.form(
        identity=name,
        rank=0,
        size=1,
        local_rank=0,
        owner="vr1x1-",
        store=STORE,
        backend="gloo",
        timeout_s=20,
    )


device = SimulatedDevice()
mover = make_mover(device)
resident = allocator.resident("cuda", CuMemAllocator, mover)
CuMemAllocator.instance = resident
# `get_instance` wants the extension, which CPU builds lack.
STORE = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
said: dict[str, object] = {"ascend": [m for m in sys.modules if "ascend" in m]}

first = form("g1-first")
weights = device.allocate(Malloc(resident, "weights"), "weights", b"a" * 300)
cache = device.allocate(Malloc(resident, "kv_cache"), "kv_cache", b"k" * 500)
resident.allocator_and_pools.setdefault("weights", []).append(("pool a", "allocator"))
type(current_platform)._global_graph_pool = "graphs of the first"
usage = [resident.get_current_usage()]

second = form("g2-second")
# vLLM's worker refuses to load where this is not 0.
usage.append(resident.get_current_usage())
said["second's pools"] = list(resident.allocator_and_pools)
said["second's graphs"] = type(current_platform)._global_graph_pool
other = device.allocate(Malloc(resident, "weights"), "weights", b"b" * 100)

first.enter()
resident.sleep(("weights", "runtime", "cudagraph"))
said["mapped while the first sleeps"] = [at == other for at in device.mapped]
said["records"] = [data.is_asleep for data in resident.pointer_to_data.values()]
resident.release_pools()
said["first's pools"] = list(resident.allocator_and_pools)
said["first's graphs"] = type(current_platform)._global_graph_pool
resident.wake_up(["weights"])
said["weights"] = device.read(weights) == b"a" * 300
said["kv cache"] = cache in device.mapped
resident.wake_up(["kv_cache"])
usage.append(resident.get_current_usage())
said["moved"] = resident.take_moved().num_bytes


class WorkerOfTests:
    """The part of vLLM 0.32.0's worker that has to do with sleep (gpu_worker.py), which
    hands on to the allocator by way of `CuMemBackend`'s policy."""

    def __init__(self) -> None:
        self.num_reloads = 0

    def get_model(self) -> torch.nn.Module:
        model = torch.nn.Module()
        model.register_buffer("positions", torch.arange(3))
        return model

    def sleep(self, level: int) -> None:
        kept = ("runtime", "cudagraph")
        resident.sleep(("weights", *kept) if level == 1 else kept)

    def discard(self, tags: tuple[str, ...]) -> None:
        resident.discard(tags)

    def wake_up(self, tags: list[str]) -> None:
        resident.wake_up(tags)

    def reload_weights(self) -> None:
        self.num_reloads += 1


class Addresses:
    """Stands for torch's pool: frees what is in it when it goes."""

    def __init__(self, *addresses: int) -> None:
        self._addresses = addresses

    def __del__(self) -> None:
        for address in self._addresses:
            # Without vLLM's half, which waits for a CUDA device.
            device.free(mover, resident.pointer_to_data, address)


resident.allocator_and_pools["weights"] = [(Addresses(weights, cache), "allocator")]
worker = WorkerOfTests()
memory = sleep.engine_memory(worker, Device("cuda", 0))
seen = [[memory.num_weight_bytes, memory.num_kv_cache_bytes, len(device.mapped)]]
memory.discard(("kv_cache",))
memory.suspend(1)
seen.append([memory.moved.num_bytes, memory.num_freed_bytes(), len(device.mapped)])
memory.resume(["weights"])
seen.append([memory.moved.num_bytes, memory.level, len(device.mapped)])
memory.resume(["kv_cache"])
seen.append([memory.moved.num_bytes, memory.level, len(device.mapped)])
memory.suspend(1)
memory.suspend(2)
seen.append([memory.moved.num_bytes, memory.level, mover.arena.num_free_bytes])
memory.resume(["weights"])
memory.resume(["kv_cache"])
seen.append([worker.num_reloads, memory.level, len(device.mapped)])
said["engine's memory"] = seen
mover.arena = Arena(buffer, 256, block_bytes=128)
said["refusals"] = [memory.refusal(level)[:8] for level in (1, 2)]
memory.suspend(2)
sleep.release(Device("cuda", 0), holdings.current)
said["after burial"] = [at == other for at in device.mapped]

# A stand-in with the globals of the real module (vllm-ascend 0.23.0.post1), which an
# engine of the first world has imported.
graphs = sys.modules["vllm_ascend.compilation.acl_graph"] = ModuleType("acl_graph")
graphs._graph_params = "the first's"  # type: ignore[attr-defined]
graphs._draft_graph_params = graphs._draft_graph_prefill_params = None  # type: ignore[attr-defined]
second.enter()
# vllm-ascend refuses to capture where it is set already.
params = [graphs._graph_params]
graphs._graph_params = "the second's"  # type: ignore[attr-defined]
first.enter()
params.append(graphs._graph_params)
first.close()
params.append(graphs._graph_params)
second.enter()
params.append(graphs._graph_params)
said["graph params"] = params
second.close()
usage.append(resident.get_current_usage())
said["usage"] = usage
said["outside"] = [len(holdings.current.allocations)]
json.dump(said, sys.stdout)
