"""What vLLM keeps once per process is each world's own, on vLLM's own modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

ASCEND = "vllm_ascend.ops.rotary_embedding"


@pytest.fixture
def ambient() -> Iterator[Any]:
    from vllm_resident.rank import ambient

    own = ambient.capture()
    yield ambient
    ambient.restore(own)


def stand_in_for_ascend() -> ModuleType:
    """Not vllm-ascend: a module of that name with one of its variables."""
    module = ModuleType(ASCEND)
    vars(module)["_cos_sin_cache"] = None
    return module


def test_a_world_finds_what_it_left_and_nothing_of_anothers(
    ambient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.device_communicators import (
        flashinfer_all_reduce as flashinfer,
    )
    from vllm.model_executor.layers import rotary_embedding as rotary

    ascend = stand_in_for_ascend()
    monkeypatch.setitem(sys.modules, ASCEND, ascend)

    def seen() -> tuple[Any, ...]:
        return (
            dict(rotary._ROPE_DICT),
            flashinfer._fi_ar_workspace,
            dict(flashinfer._fi_ar_workspace_groups),
            vars(ascend)["_cos_sin_cache"],
        )

    first, second = ambient.fresh({}), ambient.fresh({})
    nothing = ({}, None, {}, None)
    ambient.restore(first)
    assert seen() == nothing
    rotary._ROPE_DICT["shape"] = "layer"
    flashinfer._fi_ar_workspace = "workspace"
    flashinfer._fi_ar_workspace_groups[1] = "group"
    vars(ascend)["_cos_sin_cache"] = "table"
    left = seen()
    first = ambient.capture()
    ambient.restore(second)
    assert seen() == nothing
    ambient.restore(first)
    assert seen() == left
