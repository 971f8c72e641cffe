"""Throughput in lockstep against plain external_launcher, side by side in one run.

    python -m benchmarks.lockstep [--model NAME ...] [--json FILE]

Both are up at the same time on the same cores and take turns, so that the machine's
mood falls on both; while one works the other only waits. The pool is timed at its
public client (controller and sockets included), plain vLLM around `LLM.generate`.
Prints tokens per second of both, medians over the rounds, and the median ratio of the
pairs. The tokens of both must be equal.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.plain import PlainLauncher
from examples.checkpoints import cache_folder, make
from vllm_resident import Client
from vllm_resident.launch import launch

READY_TIMEOUT_S = 300.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lockstep",
        description="Tokens per second of a pool's engine in lockstep against plain "
        "external_launcher, taking turns on the same cores.",
    )
    parser.add_argument("--model", nargs="*", default=["llama-42m", "llama"])
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def pool_turn(
    client: Client, prompts: list[str], sampling: dict[str, Any]
) -> tuple[float, list[list[int]]]:
    since = time.perf_counter()
    completions = client.generate("bench", prompts, sampling)
    return time.perf_counter() - since, [c.token_ids for c in completions]


def compare(arguments: argparse.Namespace, model: str, folder: Path) -> dict[str, Any]:
    """One row: the two in turn, after two rounds of warming up."""
    make(model)
    engine_args = {
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "enforce_eager": True,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 256 << 20,
        "dtype": "float32",
        "enable_prefix_caching": False,
    }
    sampling = {
        "temperature": 0.0,
        "max_tokens": arguments.tokens,
        "ignore_eos": True,
    }
    prompts = [f"prompt number {number}" for number in range(arguments.batch)]
    request = {
        "model": str(cache_folder() / model),
        "engine_args": engine_args,
        "sampling": sampling,
        "prompts": prompts,
        "rounds": arguments.rounds + 2,
    }
    num_ranks = arguments.tensor_parallel_size
    pool = launch(f"lockstep-{os.getpid()}", num_ranks, max_restarts=0)
    plain = PlainLauncher(request, num_ranks, folder)
    try:
        with Client(pool.endpoint) as client:
            pool.wait_ready(client, READY_TIMEOUT_S, lambda _: None)
            client.load("bench", request["model"], **engine_args)
            pairs = []
            for number in range(arguments.rounds + 2):
                plain_s, plain_tokens = plain.turn()
                pool_s, pool_tokens = pool_turn(client, prompts, sampling)
                if pool_tokens != plain_tokens:
                    raise SystemExit("the two generated different tokens")
                if number >= 2:
                    pairs.append((plain_s, pool_s))
            client.shutdown()
    finally:
        plain.close()
        pool.terminate()
    return row(model, arguments, pairs)


def row(
    model: str, arguments: argparse.Namespace, pairs: list[tuple[float, float]]
) -> dict[str, Any]:
    num_tokens = arguments.batch * arguments.tokens
    return {
        "model": model,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "rounds": len(pairs),
        "plain_tokens_per_s": num_tokens / statistics.median(p for p, _ in pairs),
        "pool_tokens_per_s": num_tokens / statistics.median(r for _, r in pairs),
        "ratio": statistics.median(plain / pool for plain, pool in pairs),
        "ratios": [plain / pool for plain, pool in pairs],
    }


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for model in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(arguments, model, Path(folder)))
        each = rows[-1]
        print(
            f"{model}: TP={each['tensor_parallel_size']}, batch {each['batch']}, "
            f"{each['tokens']} tokens, {each['rounds']} rounds: "
            f"plain {each['plain_tokens_per_s']:.0f} tokens/s, "
            f"pool {each['pool_tokens_per_s']:.0f} tokens/s, "
            f"ratio {each['ratio']:.3f} "
            f"({min(each['ratios']):.3f} to {max(each['ratios']):.3f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
