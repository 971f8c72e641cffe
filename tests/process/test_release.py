"""What else than an engine may keep its layers, and how a release comes at it."""

from __future__ import annotations

import gc
import weakref
from functools import lru_cache

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]


def test_a_cached_method_does_not_keep_its_layer() -> None:
    import torch

    from vllm_resident.rank import engine

    class Base(torch.nn.Module):
        @lru_cache(8)  # noqa: B019 - as vLLM 0.23.0's Qwen2.5-VL has it
        def table(self, size: int) -> int:
            return size

    class Tower(Base):
        pass

    model = torch.nn.Sequential(Tower())
    model[0].table(1)
    tower = weakref.ref(model[0])
    engine.forget_calls(model)
    del model
    gc.collect()
    assert tower() is None
