"""Whether a model's layers are gone once its engine is, and who keeps those there are.

Whoever holds one layer holds its weights, and the engine's memory is not back. Knows of
torch's modules only, nothing of engines.
"""

from __future__ import annotations

import gc
import weakref
from functools import lru_cache

import torch

_CachedCall = type(lru_cache(lambda: None))


class Watch:
    """The layers of one model that have anything: those without may be all models' (an
    activation function). It keeps none of them alive. Main thread only."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._layers = weakref.WeakSet(
            layer
            for layer in model.modules()
            if [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        )
        self._classes = {type(layer) for layer in model.modules()}

    def forget_calls(self) -> None:
        """Empty the caches of methods: one of a layer's (`lru_cache`) keeps the layer,
        as in vLLM 0.23.0 that of Qwen2.5-VL's vision tower. Others' fill again."""
        for each in {base for layer in self._classes for base in layer.__mro__}:
            for member in list(vars(each).values()):
                if isinstance(member, _CachedCall):
                    member.cache_clear()

    def complaint(self) -> str:
        """Which of them there still are and what refers to the outermost ones; empty if
        there are none. Collect the heap before, and do not freeze it."""
        alive = list(self._layers)
        if not alive:
            return ""
        inner = {id(each) for layer in alive for each in layer.children()}
        outermost = [layer for layer in alive if id(layer) not in inner]
        names = sorted({type(layer).__name__ for layer in outermost})
        holders = {
            type(holder).__name__
            for layer in outermost
            for holder in gc.get_referrers(layer)
            if holder is not alive and holder is not outermost
        }
        return (
            f"{len(alive)} layers are still there: {names[:8]}, held by "
            f"{sorted(holders)[:8]}"
        )
