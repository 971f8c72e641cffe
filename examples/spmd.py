r"""Library mode: engines that come and go in a plain SPMD script, with no controller.

    python -m examples.checkpoints llama qwen3 smollm2
    torchrun --standalone --nproc-per-node 2 examples/spmd.py \
        build/models/llama build/models/smollm2 build/models/qwen3

Every rank runs this whole file. First one model over all ranks, then two models on half
the ranks each, side by side, in the processes that served the first. This is the form
for reinforcement learning and evaluation scripts, which own their ranks.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm_resident.rank import spmd

PROMPTS = ["The capital of France is", "Once upon a time"]
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
}


def generate(rank: int, model: str, ranks: list[int]) -> None:
    """Called by exactly `ranks`; each gets the same completions, the first tells."""
    with spmd.engine(model, ranks=ranks, **ENGINE_ARGS) as engine:
        completions = engine.generate(PROMPTS, temperature=0.0, max_tokens=12)
    if rank != ranks[0]:
        return
    for completion in completions:
        prompt = PROMPTS[completion.prompt_index]
        where = f"{model} on ranks {ranks}, pid {os.getpid()}"
        print(f"{where}: {prompt}{completion.text!r}", flush=True)


def main(together: str, left: str, right: str) -> None:
    # Read first: later they speak of the world of the engine built last.
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size % 2:
        sys.exit("an even number of ranks, please: each model gets half of them")
    everyone = list(range(world_size))
    generate(rank, together, everyone)
    first_half, second_half = everyone[: world_size // 2], everyone[world_size // 2 :]
    if rank in first_half:
        generate(rank, left, first_half)
    else:
        generate(rank, right, second_half)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage, under torchrun: spmd.py TOGETHER LEFT RIGHT")
    main(*sys.argv[1:])
