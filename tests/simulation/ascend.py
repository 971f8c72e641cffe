"""STAND-IN for vllm-ascend 0.23.0.post1, which imports on an NPU machine alone.

`install()` puts modules into `sys.modules` under the real names, with the real ones'
globals (distributed/parallel_state.py, ascend_config.py, utils.py and patch/worker/
patch_distributed.py, read there) and with functions that do what theirs do to these
globals: groups of vLLM's own kind, HCCL options for each group, HCCL groups shared
through a registry that knows them by their ranks inside the world.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch.distributed as dist
from vllm.distributed import parallel_state

# Those of distributed/parallel_state.py, in its order.
GLOBALS = (
    "_MC2", "_MLP_TP", "_OTP", "_LMTP", "_EMBED_TP", "_FLASHCOMM2_OTP",
    "_FLASHCOMM2_ODP", "_FC3_QUANT_X", "_SHARD_WEIGHT", "_P_TP", "_DYNAMIC_EPLB",
)  # fmt: skip
# Those that `destroy_ascend_model_parallel` leaves where their size is 1.
LEFT_BEHIND = "_FLASHCOMM2_OTP"


class StandInOptions:
    """As `ProcessGroupHCCL.Options`, as far as vllm-ascend sets it."""

    def __init__(self, hccl_config: dict[str, Any]) -> None:
        self.hccl_config = hccl_config
        self.is_high_priority_stream = False
        self.global_ranks_in_group: list[int] = []
        self.group_id = ""


class StandInRegistry:
    """As `HcclPgRegistry`: by ranks in the world and options, counted."""

    def __init__(self) -> None:
        self._entries: dict[Any, list[Any]] = {}

    def acquire(self, ranks: list[int], config: dict[str, Any]) -> tuple[Any, Any]:
        key = (tuple(ranks), tuple(sorted(config.items())))
        if key not in self._entries:
            group = dist.new_group(
                ranks, backend="hccl", pg_options=StandInOptions(dict(config))
            )
            self._entries[key] = [group, 0]
        self._entries[key][1] += 1
        return self._entries[key][0], key

    def release(self, key: Any) -> None:
        entry = self._entries.get(key)
        if entry is None:
            return
        entry[1] -= 1
        if entry[1] == 0:
            del self._entries[key]
            dist.destroy_process_group(entry[0])


class StandInCoordinator(parallel_state.GroupCoordinator):
    """As `GroupCoordinatorPatch`, but for its device: the HCCL group is the
    registry's."""

    def __init__(self, name: str, ranks: list[int], config: dict[str, Any]) -> None:
        self.unique_name = parallel_state._get_unique_name(name)
        parallel_state._register_group(self)
        self.device_communicator = self.mq_broadcaster = None
        registry = sys.modules[PATCH]._HCCL_PG_REGISTRY
        self.device_group, self._key = registry.acquire(ranks, config)
        self.cpu_group = dist.new_group(ranks, backend="gloo")

    def destroy(self) -> None:
        sys.modules[PATCH]._HCCL_PG_REGISTRY.release(self._key)
        dist.destroy_process_group(self.cpu_group)
        del self.device_group, self.cpu_group


PARALLEL_STATE = "vllm_ascend.distributed.parallel_state"
CONFIG = "vllm_ascend.ascend_config"
UTILS = "vllm_ascend.utils"
PATCH = "vllm_ascend.patch.worker.patch_distributed"


def install() -> ModuleType:
    """Put the stand-in where vllm-ascend would be; returns its parallel state."""
    modules = {}
    for name in (PARALLEL_STATE, CONFIG, UTILS, PATCH):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            modules[path] = sys.modules.setdefault(path, ModuleType(path, __doc__))
            modules[path].__path__ = []
    state = modules[PARALLEL_STATE]
    vars(state).update(dict.fromkeys(GLOBALS))
    state.num_destroyed = 0
    state.init_ascend_model_parallel = _init
    state.destroy_ascend_model_parallel = _destroy
    modules[CONFIG]._ASCEND_CONFIG = None
    vars(modules[UTILS]).update(
        dict.fromkeys(("_IS_MOE_MODEL", "_IS_VL_MODEL", "_ENABLE_SP", "_HAS_ROPE"))
    )
    modules[PATCH]._HCCL_PG_REGISTRY = StandInRegistry()
    return state


def _init(ranks: list[int], buffer_mb: int) -> None:
    """As `init_ascend_model_parallel` with expert, prefill, output, head, embedding and
    MLP groups asked for. Two of them share their HCCL group, as there."""
    state = sys.modules[PARALLEL_STATE]
    buffers = {"hccl_buffer_size": buffer_mb}
    state._MC2 = StandInCoordinator("mc2", ranks, {"group_name": "mc2"})
    state._DYNAMIC_EPLB = StandInCoordinator(
        "dynamic_eplb", ranks, {"hccl_buffer_size": 100, "group_name": "dynamic_eplb"}
    )
    state._OTP = StandInCoordinator("otp", ranks, buffers)
    # One group for all of a size.
    state._LMTP = state._EMBED_TP = state._MLP_TP = state._OTP
    state._P_TP = StandInCoordinator("p_tp_0", ranks, buffers)
    state._FLASHCOMM2_OTP = "left behind"


def _destroy() -> None:
    state = sys.modules[PARALLEL_STATE]
    state.num_destroyed += 1
    assert sys.modules[CONFIG]._ASCEND_CONFIG is not None  # it asks for sizes there
    destroyed = []
    for name in GLOBALS:
        group = getattr(state, name)
        if group is None or name == LEFT_BEHIND:
            continue
        if not any(group is each for each in destroyed):
            group.destroy()
            destroyed.append(group)
        setattr(state, name, None)
