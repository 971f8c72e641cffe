"""Plain vLLM's answers, by which those of a pool are checked; each model in a fresh
process.

The processes are forked from one that has imported vLLM and done nothing else, which
saves the import for each. The request is JSON on standard input (`Request`'s fields),
the answer JSON on standard output: model name -> the tokens of each prompt. Started by
the benchmarks, not by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plain_process import take_standard_output
from examples.checkpoints import REPO_ROOT

TIMEOUT_S = 300.0


def plain_answers(
    models: Mapping[str, str],
    engine_args: Mapping[str, Any],
    prompts: Sequence[str],
    sampling: Mapping[str, Any],
) -> dict[str, list[list[int]]]:
    """By name of `models`, whose values are folders; blocks for seconds a model."""
    request = {
        "models": dict(models),
        "engine_args": dict(engine_args),
        "prompts": list(prompts),
        "sampling": dict(sampling),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plain_answers"],
        cwd=REPO_ROOT,
        # Threads of a library that was used before a fork are missing after it.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"plain vLLM failed:\n{done.stderr[-3000:]}")
    answers: dict[str, list[list[int]]] = json.loads(done.stdout)
    return answers


def main() -> None:
    answers = take_standard_output()
    request = json.load(sys.stdin)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm  # noqa: F401 (for the processes that are forked)

    found = {
        name: in_a_process(request, folder)
        for name, folder in request["models"].items()
    }
    answers.write(json.dumps(found))
    answers.flush()
    os._exit(0)


def in_a_process(request: dict[str, Any], folder: str) -> list[list[int]]:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            json.dump(tokens(request, folder), out)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    if os.waitpid(child, 0)[1] != 0 or not text:
        raise SystemExit(f"plain vLLM failed on {folder}")
    result: list[list[int]] = json.loads(text)
    return result


def tokens(request: dict[str, Any], folder: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, **request["engine_args"])
    sampling = SamplingParams(**request["sampling"])
    outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
