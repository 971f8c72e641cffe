"""Who keeps a model's layers is told, and a cached method does not."""

from __future__ import annotations

import gc
import weakref
from functools import lru_cache
from typing import Any

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]


def make_model() -> Any:
    import torch

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        @lru_cache(8)  # noqa: B019 - as vLLM 0.23.0's Qwen2.5-VL has it
        def table(self, size: int) -> int:
            return size

    class Tower(Base):
        pass

    return torch.nn.Sequential(Tower(), torch.nn.ReLU())


def test_a_cached_method_does_not_keep_its_layer() -> None:
    from vllm_resident.rank import layers

    model = make_model()
    model[0].table(1)
    tower = weakref.ref(model[0])
    layers.Watch(model).forget_calls()
    del model
    gc.collect()
    assert tower() is None


def test_who_keeps_a_layer_is_told() -> None:
    from vllm_resident.rank import layers

    model = make_model()
    model[0].table(1)
    watch = layers.Watch(model)
    kept = {"weights": model[0].linear}
    activation = model[1]  # has nothing, and may stay
    model[0].table.cache_clear()
    del model
    gc.collect()
    assert watch.complaint() == (
        "1 layers are still there: ['Linear'], held by ['dict']"
    )
    del kept
    assert watch.complaint() == ""
    assert activation is not None
