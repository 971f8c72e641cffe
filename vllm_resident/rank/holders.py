"""The modules that hold a world's parallel state in globals, one holder for each.

vLLM's own is its `ParallelState` (patches/, parallel-state). An out-of-tree platform
has globals beside it; a holder keeps, for one world, the values of those and swaps them
in and out with it. A platform that is not in use is not imported. With `hooks`
and `world` the only module that touches vLLM's parallel state.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from vllm.distributed import parallel_state
from vllm.platforms import current_platform


class Holder(Protocol):
    """One module's part of a world. Main thread only, but for `groups`."""

    def enter(self) -> None:
        """Put this world's values in the module's globals; it is not entered yet."""

    def leave(self) -> None:
        """Keep the globals' values and put the process's own back."""

    def close(self) -> None:
        """Destroy the groups; entered, and left by `leave`. May be called twice."""

    def groups(self) -> list[Any]:
        """Its group coordinators, each once; any thread, as of now."""


class VllmHolder:
    """vLLM's own parallel state."""

    def __init__(self) -> None:
        self._state = parallel_state.ParallelState()

    def enter(self) -> None:
        self._state.enter()

    def leave(self) -> None:
        self._state.leave()

    def close(self) -> None:
        self._state.close()

    def groups(self) -> list[Any]:
        # Entered, its values are the module's variables.
        values = self._state._values or vars(parallel_state)
        return _coordinators(values.values())


class AscendHolder:
    """The groups that vllm-ascend has beside vLLM's (0.23.0.post1, distributed/
    parallel_state.py): every global in capitals, such as `_MC2`, `_MLP_TP`, `_OTP`,
    `_LMTP`, `_EMBED_TP`, `_P_TP` and `_DYNAMIC_EPLB`.

    With them goes what decides over them and is kept once per process: its own
    configuration, what it found out about the model, and its registry of HCCL groups
    that coordinators share (patch/worker/patch_distributed.py). That one knows groups
    by their ranks inside a world: what one world made would be handed to another, over
    other ranks.
    """

    MODULE = "vllm_ascend.distributed.parallel_state"
    BESIDE = (
        ("vllm_ascend.ascend_config", ("_ASCEND_CONFIG",)),
        (
            "vllm_ascend.utils",
            (
                "_IS_MOE_MODEL", "_IS_DRAFTER_MOE_MODEL", "_IS_VL_MODEL",
                "_ENABLE_SP", "_HAS_LAYER_IDX", "_HAS_ROPE",
            ),
        ),
    )  # fmt: skip
    REGISTRY = ("vllm_ascend.patch.worker.patch_distributed", "_HCCL_PG_REGISTRY")

    def __init__(self) -> None:
        self._module = importlib.import_module(self.MODULE)
        self._is_entered = False
        # Of this world while it is not entered, else the process's own.
        self._aside: dict[tuple[str, str], Any] = dict.fromkeys(self._places())
        # Made when the engine was configured, just now; its worker looks whose it is.
        if (place := ("vllm_ascend.ascend_config", "_ASCEND_CONFIG")) in self._aside:
            self._aside[place] = getattr(sys.modules[place[0]], place[1])
        self._shared_aside: dict[Any, Any] = {}

    def enter(self) -> None:
        if not self._is_entered:
            self._swap()
            self._is_entered = True

    def leave(self) -> None:
        if self._is_entered:
            self._swap()
            self._is_entered = False

    def close(self) -> None:
        self.enter()
        try:
            self._module.destroy_ascend_model_parallel()
        finally:
            # It leaves some as they were (`_FLASHCOMM2_OTP` of size 1).
            for name in self._names():
                setattr(self._module, name, None)

    def groups(self) -> list[Any]:
        if self._is_entered:
            return _coordinators(vars(self._module).values())
        return _coordinators(self._aside.values())

    def _names(self) -> list[str]:
        return [n for n in vars(self._module) if n[0] == "_" and n.isupper()]

    def _places(self) -> list[tuple[str, str]]:
        places = [(self.MODULE, name) for name in self._names()]
        for module, names in self.BESIDE:
            found = vars(sys.modules[module]) if module in sys.modules else {}
            places += [(module, name) for name in names if name in found]
        return places

    def _swap(self) -> None:
        for (module, name), value in self._aside.items():
            self._aside[module, name] = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, value)
        # Imported with vllm-ascend's worker, if this version has it at all.
        module, name = self.REGISTRY
        registry = getattr(sys.modules.get(module), name, None)
        if registry is not None:
            shared, registry._entries = registry._entries, self._shared_aside
            self._shared_aside = shared


# By torch's name of the device: what its platform has beside vLLM's own.
_OF_DEVICE: dict[str, tuple[type[Holder], ...]] = {"npu": (AscendHolder,)}


def register(device_type: str, holder: type[Holder]) -> None:
    """Give every world formed from here on, on a device of this type, such a holder
    too; for a platform that this package does not know."""
    _OF_DEVICE[device_type] = (*_OF_DEVICE.get(device_type, ()), holder)


class Holders:
    """All of one world's: entered together, left and closed in reverse. A platform's
    groups are closed before vLLM's, which they may share."""

    def __init__(self, device_type: str | None = None) -> None:
        kinds = _OF_DEVICE.get(device_type or current_platform.device_type, ())
        self._holders: Sequence[Holder] = (VllmHolder(), *(kind() for kind in kinds))

    def enter(self) -> None:
        for holder in self._holders:
            holder.enter()

    def leave(self) -> None:
        for holder in reversed(self._holders):
            holder.leave()

    def close(self) -> None:
        """Leaves them, too. What fails to close does not keep the others from it."""
        errors = [error for h in reversed(self._holders) if (error := _closed(h))]
        self.leave()
        if errors:
            raise errors[0]

    def groups(self) -> Iterator[Any]:
        """The group coordinators of all of them, each once."""
        seen: set[int] = set()
        for holder in self._holders:
            for group in holder.groups():
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group


def _closed(holder: Holder) -> Exception | None:
    try:
        holder.close()
    # Closing runs whatever communicators do at their end.
    except Exception as error:  # noqa: BLE001 (raised again by the caller)
        return error
    return None


def _coordinators(values: Iterable[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    for value in list(values):
        if isinstance(value, parallel_state.GroupCoordinator):
            found[id(value)] = value
    return list(found.values())
