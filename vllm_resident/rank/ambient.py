"""What vLLM keeps once per process though it is one engine's, made one world's.

Environment variables that one engine's configuration sets, module globals, the random
number generators: what differs between two engines of a process is captured when a
world is left and restored when it is entered. This module knows which they are (found
in vLLM 0.32.0) and nothing of worlds. Parallel state and torch.distributed are not
here: `world` keeps those.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.ir.op import IrOp
from vllm.platforms import current_platform

from vllm_resident.rank.holdings import Holdings

# The place in the world first; the others vLLM sets for one engine and would take for
# the user's own in the next (platforms/cpu.py, distributed/eplb/eplb_utils.py;
# vllm-ascend 0.23.0.post1, platform.py).
_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "VLLM_DIST_IDENT",
    "LOCAL_WORLD_SIZE",
    "NCCL_MAX_CTAS",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "PYTORCH_NPU_ALLOC_CONF",
)
# The cached environment; a thread setter that the CPU worker replaces; the root of the
# prefix cache's hashes, which ranks of one engine must agree on; what is otherwise made
# by the engine built last and used by all; the rotary embeddings, whose tables are in
# the memory of the engine that made them; what an engine has of the device's memory.
_GLOBALS = tuple(
    (importlib.import_module(module), name)
    for module, name in (
        ("vllm.envs", "__getattr__"),
        ("torch", "set_num_threads"),
        ("vllm.ir.op", "_ENABLE_TORCH_WRAP"),
        ("vllm.v1.core.kv_cache_utils", "NONE_HASH"),
        ("vllm.v1.core.kv_cache_utils", "_NONE_HASH_SEED"),
        ("vllm.v1.worker.workspace", "_manager"),
        ("vllm.model_executor.offloader.base", "_instance"),
        ("vllm.model_executor.layers.mamba.ops.mamba_ssm", "_ssm_config_override"),
        ("vllm.model_executor.layers.mamba.ops.ssu_dispatch", "_mamba_ssu_backend"),
        ("vllm.distributed.kv_transfer.kv_transfer_state", "_KV_CONNECTOR_AGENT"),
        ("vllm.distributed.ec_transfer.ec_transfer_state", "_EC_CONNECTOR_AGENT"),
        ("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT"),
        ("vllm_resident.rank.holdings", "current"),
    )
)
# Where all CUDA graphs are captured (platforms/interface.py).
_GLOBALS += ((type(current_platform), "_global_graph_pool"),)
# The same in modules that an engine may import, and that are not imported for this:
# what is not there has nothing to keep. By module, what each is before any engine.
_IN_PARTS: dict[str, dict[str, Callable[[], Any]]] = {
    # Shared memory of the ranks of one engine (0.32.0; 0.23.0 has the first two).
    "vllm.distributed.device_communicators.flashinfer_all_reduce": {
        "_fi_ar_workspace": lambda: None,
        "_fi_ar_quant_workspace": lambda: None,
        "_fi_ar_workspace_failed": lambda: False,
        "_fi_ar_quant_workspace_failed": lambda: False,
        "_fi_ar_workspace_groups": dict,
    },
    # Layers by name, and kernels of one engine's shapes and group (0.32.0).
    "vllm.model_executor.layers.hpc.rope_norm": {"_hpc_rope_norm_instances": dict},
    "vllm.model_executor.kernels.linear.cute_dsl.gemm_rs_ar": {
        "_gemm_rs_ar": lambda: None
    },
    "vllm.models.deepseek_v41.nvidia.ops.mhc": {"_all_reduce_mhc": lambda: None},
    # vllm-ascend (0.23.0.post1); what belongs to its groups is `holders`'s.
    "vllm_ascend.utils": dict.fromkeys(
        ("_WEIGHT_PREFETCH_METHOD", "_potential_max_tokens"), lambda: None
    ),
    "vllm_ascend.compilation.acl_graph": dict.fromkeys(
        ("_graph_params", "_draft_graph_params", "_draft_graph_prefill_params"),
        lambda: None,
    ),
    "vllm_ascend.ops.fused_moe.moe_comm_method": {"_MoECommMethods": dict},
    # Made for the first model of a process, and taken for every other's.
    "vllm_ascend.ops.rotary_embedding": dict.fromkeys(
        (
            *("_cos_mla", "_sin_mla", "_cos_cache", "_sin_cache", "_cos_sin_cache"),
            *("_cos", "_sin", "_cos_slice", "_sin_slice"),
        ),
        lambda: None,
    ),
}
# Of these types each world has its own from the start.
_OWNED = (Holdings, dict)
_ABSENT = object()

Variables = dict[str, str | None]


@dataclass
class Ambient:
    """One state of all of it: the process's own, or one world's while it is left."""

    variables: Variables
    values: list[Any]
    # By the name of vLLM's operation, which implementations it tries in which order.
    priorities: dict[str, list[Any]]
    random_states: tuple[Any, ...]
    # By module and name; of what is not in it, as before any engine.
    parts: dict[tuple[str, str], Any] = field(default_factory=dict)


def capture() -> Ambient:
    """What is in force now; some tens of microseconds."""
    return Ambient(
        variables(),
        [vars(module).get(name, _ABSENT) for module, name in _GLOBALS],
        {name: op._priority_impls for name, op in IrOp.registry.items()},
        _random_states(),
        {(name, key): getattr(module, key) for name, module, key, _ in _of_parts()},
    )


def restore(ambient: Ambient) -> None:
    """Put what `capture` returned in force."""
    set_variables(ambient.variables)
    for (module, name), value in zip(_GLOBALS, ambient.values, strict=True):
        if value is not _ABSENT:
            setattr(module, name, value)
        elif name in vars(module):
            delattr(module, name)
    for name, op in IrOp.registry.items():
        # Operations may be registered by what an engine imports.
        op._priority_impls = ambient.priorities.get(name, [])
    for name, module, key, initial in _of_parts():
        kept = ambient.parts.get((name, key), _ABSENT)
        setattr(module, key, initial() if kept is _ABSENT else kept)
    torch.set_rng_state(ambient.random_states[0])
    np.random.set_state(ambient.random_states[1])
    random.setstate(ambient.random_states[2])


def fresh(place: Variables) -> Ambient:
    """For a new world: as it was before any engine, with the environment's `place`."""
    return Ambient(
        {**_pristine.variables, **place},
        [type(each)() if type(each) in _OWNED else each for each in _pristine.values],
        dict(_pristine.priorities),
        _random_states(),
    )


def _of_parts() -> Iterator[tuple[str, Any, str, Callable[[], Any]]]:
    """(name, module, variable, what makes it as before any engine) of what there is."""
    for name, keys in _IN_PARTS.items():
        if (module := sys.modules.get(name)) is not None:
            for key in keys.keys() & vars(module).keys():
                yield name, module, key, keys[key]


def variables() -> Variables:
    return {name: os.environ.get(name) for name in _VARIABLES}


def set_variables(values: Variables) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


_pristine = capture()
