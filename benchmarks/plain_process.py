"""Plain vLLM in one process that changes its model when told to, as users do it today.

Binds to the cores a pool's only rank would have. Each line on standard input names a
model: the `LLM` there is, is released as vLLM's documentation says, the new one is
built and generates, and one line of JSON on standard output says how long each took.
Ends with its standard input. Started by the benchmarks, not by hand.
"""

import json
import os
import sys
import time
from typing import Any, TextIO

from vllm_resident.rank import device


def main() -> None:
    answers = take_standard_output()
    request = json.loads(sys.argv[1])
    # Sets VLLM_ENABLE_V1_MULTIPROCESSING=0 too: the engine core is in this process.
    device.prepare_process(0, 1)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    sampling = SamplingParams(**request["sampling"])
    llm: Any = None
    for line in sys.stdin:
        began = time.perf_counter()
        if llm is not None:
            del llm
            cleanup_dist_env_and_memory()
        released = time.perf_counter()
        llm = LLM(line.strip(), **request["engine_args"])
        loaded = time.perf_counter()
        outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
        phases = {
            "release": released - began,
            "load": loaded - released,
            "first_token": time.perf_counter() - loaded,
        }
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        answers.write(json.dumps({"phases": phases, "tokens": tokens}) + "\n")
        answers.flush()
    os._exit(0)


def take_standard_output() -> TextIO:
    """Keep standard output for the answers; what vLLM prints goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
