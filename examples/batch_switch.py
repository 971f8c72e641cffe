r"""An offline batch: every prompt to every model, one pool from start to end.

    python -m examples.checkpoints smollm2 qwen3
    printf '%s\n' 'The capital of France is' 'Once upon a time' > prompts.txt
    python examples/batch_switch.py prompts.txt answers.jsonl \
        build/models/smollm2 build/models/qwen3

Where a script with `vllm.LLM` starts a process for each model, this one starts its
ranks once and switches. Writes a JSON line for each prompt and model; ends its pool,
also when it fails or is interrupted. With `--tensor-parallel-size 2` it starts two
ranks and spreads each model over both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from vllm_resident import Client, ResidentError
from vllm_resident.launch import launch


def main() -> None:
    parser = argparse.ArgumentParser(description="Every prompt to every model.")
    parser.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("answers", type=Path, help="JSON lines")
    parser.add_argument("models", nargs="+", help="checkpoint folders, in order")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()
    prompts = options.prompts.read_text().splitlines()
    num_ranks = options.tensor_parallel_size

    # A name of its own: other pools on this machine are none of its business.
    with (
        launch(f"batch-{os.getpid()}", num_ranks) as pool,
        Client(pool.endpoint) as client,
        options.answers.open("w") as answers,
    ):
        pool.wait_ready(client, timeout_s=300.0)
        for model in options.models:
            engine = {
                "name": "batch",
                "model": model,
                "tensor_parallel_size": num_ranks,
                "enforce_eager": True,
                "max_model_len": 256,
                "kv_cache_memory_bytes": 64 << 20,
            }
            report = client.apply([engine])
            print(f"{model}: switched in {report.seconds:.1f} s", file=sys.stderr)
            for completion in client.generate(
                "batch", prompts, temperature=0.0, max_tokens=options.max_tokens
            ):
                prompt = prompts[completion.prompt_index]
                line = {"model": model, "prompt": prompt, "text": completion.text}
                answers.write(json.dumps(line) + "\n")
        client.shutdown()


if __name__ == "__main__":
    try:
        main()
    except (ResidentError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
