"""Where torch and vLLM are led to a world's `Groups`: five functions of theirs.

c10d makes every group in one function and destroys it in another, vLLM its own NCCL
communicators in two more; in the fifth it asks which ranks share a machine. While the
world that is entered has `Groups`, all pass through them, else they do as ever. In
force once this module is imported.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

from vllm_resident.rank import nccl

_make = c10d._new_process_group_helper
_destroy = c10d.destroy_process_group
_ask = parallel_state.in_the_same_node_as
_MAKE_SIGNATURE = inspect.signature(_make)


def _make_or_take(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    if not hasattr(c10d._world, "groups"):
        return _make(*args, **kwargs)
    call = _MAKE_SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    arguments = dict(call.arguments)
    if c10d._world.groups is None:
        return _make_as_asked(**arguments)
    return c10d._world.groups.make(_make_as_asked, arguments)


def _make_as_asked(**arguments: Any) -> tuple[Any, Any]:
    """With a bound device torch splits a group off the default one's communicator, for
    which it calls on all ranks; of a gloo group only on those that are not in it (torch
    2.13), which then wait for the others. There is nothing to split."""
    places = arguments["global_ranks_in_group"]
    if str(arguments["backend"]) == "gloo":
        if places and c10d._world.default_pg.rank() not in places:
            return dist.GroupMember.NON_GROUP_MEMBER, None
        arguments["device_id"] = None
    return _make(**arguments)


def _destroy_or_keep(group: dist.ProcessGroup | None = None) -> None:
    groups = getattr(c10d._world, "groups", None)
    if groups is None or group is None or not groups.retire(group):
        _destroy(group)


def _ask_once(pg: Any, source_rank: int = 0) -> list[bool]:
    groups = getattr(c10d._world, "groups", None)
    if groups is None:
        return _ask(pg, source_rank)
    return groups.on_same_machine(_ask, pg, source_rank)


def _make_or_take_nccl(
    self: PyNcclCommunicator, group: Any, device: Any, library_path: str | None = None
) -> None:
    groups = getattr(c10d._world, "groups", None)
    if groups is None or library_path is not None:
        nccl.make(self, group, device, library_path)
    else:
        groups.make_nccl(self, group, device)


def _destroy_or_keep_nccl(self: PyNcclCommunicator) -> None:
    groups = getattr(c10d._world, "groups", None)
    if groups is None or not groups.retire_nccl(self):
        nccl.destroy(self)


# Callers look them up where they are defined, or in torch.distributed.
c10d._new_process_group_helper = _make_or_take
c10d.destroy_process_group = dist.destroy_process_group = _destroy_or_keep
parallel_state.in_the_same_node_as = _ask_once
PyNcclCommunicator.__init__ = _make_or_take_nccl
PyNcclCommunicator.destroy = _destroy_or_keep_nccl
