"""What torch has no function for, done to one process group of the entered world.

Checked by one collective, ended without its peers' help, taken out of c10d's maps and
put back. Knows neither worlds nor which groups are kept.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_CHECK_POLL_S = 0.0002

log = logging.getLogger("vllm_resident.rank")


def abort(group: dist.ProcessGroup) -> None:
    """End a group's collectives in flight, here, and the group with them; any thread.
    Nothing where the backend cannot (gloo)."""
    with suppress(RuntimeError):
        group.abort()
    # HCCL's has another name (torch_npu, distributed/distributed_c10d.py,
    # reinit_process_group).
    with suppress(RuntimeError):
        for device in group._device_types:
            backend = group._get_backend(device)
            getattr(backend, "abort_hccl_comm", lambda _: None)("its world is closed")


def let_go(groups: list[Any]) -> None:
    """Drop the last references side by side and empty the list: the end of a gloo group
    joins a thread that looks up every 10 ms (torch 2.13, gloo/transport/tcp/loop.cc),
    with the GIL released."""
    # Not `map`: its arguments would hold them.
    with ThreadPoolExecutor(max(len(groups), 1)) as threads:
        while groups:
            threads.submit([groups.pop()].clear)


def unregister(group: dist.ProcessGroup) -> None:
    """Take a group out of the entered world's maps and out of the registry of names, as
    `destroy_process_group` does (torch 2.13), without shutting it down."""
    world = c10d._world
    name = world.pg_names.pop(group, None)
    if name is None:
        return
    for entries in (world.pg_map, world.pg_group_ranks, world.pg_backend_config):
        entries.pop(group, None)
    world.pg_coalesce_state.pop(group, None)
    tag = world.pg_to_tag.pop(group, None)
    for each in {tag, ""}:
        if group in (groups := world.tags_to_pg.get(each, [])):
            groups.remove(group)
    with suppress(RuntimeError):
        c10d._unregister_process_group(name)


def register(
    group: dist.ProcessGroup, name: str, backend: str, store: dist.Store
) -> None:
    """The reverse, as at the end of `_new_process_group_helper` (torch 2.13)."""
    world = c10d._world
    world.pg_map[group] = (backend, store)
    world.pg_names[group] = name
    world.pg_backend_config[group] = str(c10d.BackendConfig(c10d.Backend(backend)))
    c10d._register_process_group(name, group)
    tag = f"ptd:{name}"
    world.pg_to_tag[group] = tag
    for each in ("", tag):
        world.tags_to_pg.setdefault(each, []).append(group)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    if hasattr(group, "set_timeout"):
        group.set_timeout(timeout)
        return
    for device in group._device_types:  # torch 2.11
        group._get_backend(device)._set_default_timeout(timeout)


def has_run(group: dist.ProcessGroup) -> bool:
    try:
        return bool(group._get_sequence_number_for_group())
    except RuntimeError:  # a backend that does not count
        return True


def device_of(group: dist.ProcessGroup) -> torch.device:
    types = {device.type for device in group._device_types}
    # Gloo says it can do others too; the process's current one is this rank's.
    return torch.device("cpu" if "cpu" in types else min(types))


@dataclass
class Check:
    """One small collective, begun; every member begins it, and each adds its place."""

    value: torch.Tensor
    work: Any
    total: float

    @classmethod
    def start(cls, group: dist.ProcessGroup, place: int, size: int) -> Check | None:
        """None where it cannot even begin."""
        try:
            value = torch.full((1,), place + 1.0, device=device_of(group))
            work = group.allreduce([value])
        # Whatever a backend raises: the group is not used again.
        except Exception as error:  # noqa: BLE001 (the caller's to tell)
            log.warning("event=check_failed error=%s", error)
            return None
        return cls(value, work, size * (size + 1) / 2)

    def has_passed(self, deadline: float, pause: Callable[[float], None]) -> bool:
        """Wait for it, up to the deadline (monotonic); what `pause` raises ends it."""
        while not self._has_ended():
            if time.monotonic() > deadline:
                return False
            pause(_CHECK_POLL_S)
        try:
            self.work.wait()
            return self.value.item() == self.total
        except RuntimeError as error:
            log.warning("event=check_failed error=%s", error)
            return False

    def _has_ended(self) -> bool:
        try:
            return self.work.is_completed()
        except RuntimeError:  # a device that cannot say; then `wait` raises too
            return True
