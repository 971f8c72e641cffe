"""Two ranks of a script that has several engines at once and puts them to sleep.

Run under torchrun with two checkpoints: `spmd_sleeper.py WIDE NARROW`. Prints
`RESULT {...}` on each rank.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest

from tests.e2e.pools import ENGINE_ARGS, PROMPTS, SAMPLING
from vllm_resident.errors import CommandRejected
from vllm_resident.rank import spmd
from vllm_resident.rank.device import Device

KV_CACHE_BYTES = 256 << 20


def tokens(engine: spmd.SpmdEngine) -> list[list[int]]:
    return [each.token_ids for each in engine.generate(PROMPTS, SAMPLING)]


def resident_bytes() -> int:
    return Device("cpu", 0).memory()[0]


def touch_kv_cache(engine: spmd.SpmdEngine) -> None:
    worker = engine.llm.model_executor.driver_worker.worker
    for cache in worker.model_runner.kv_caches:
        cache.fill_(1)


def main(wide_model: str, narrow_model: str) -> None:
    rank = int(os.environ["RANK"])
    result: dict[str, Any] = {"rank": rank, "tokens": [], "fell": []}
    args = {**ENGINE_ARGS, "kv_cache_memory_bytes": KV_CACHE_BYTES}
    with (
        spmd.engine(wide_model, ranks=[0, 1], **args) as wide,
        spmd.engine(narrow_model, ranks=[rank], **args) as narrow,
    ):
        for level in (1, 2):
            result["tokens"].append([tokens(wide), tokens(narrow)])
            for engine in (wide, narrow):
                touch_kv_cache(engine)
                before = resident_bytes()
                engine.sleep(level)
                result["fell"].append(before - resident_bytes())
            narrow.wake_up()
            wide.wake_up()
        result["tokens"].append([tokens(wide), tokens(narrow)])
        wide.sleep(2)
        result["tokens"].append([result["tokens"][0][0], tokens(narrow)])
    with pytest.raises(CommandRejected, match="was given back"):
        tokens(narrow)
    # What the last release froze and is garbage once the script has let go of it.
    del wide, narrow, engine
    gc.unfreeze()
    result["garbage"] = gc.collect()
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
