"""Plain vLLM under torchrun with `external_launcher`: what the pool is compared with.

Each rank binds to the cores a pool's rank would have, builds one `LLM`, then generates
each time the file `go-N` appears in the folder, and rank 0 writes `done-N` with the
seconds it took. Started by the benchmarks, not by hand.
"""

import json
import os
import sys
import time
from pathlib import Path

from vllm_resident.rank import device

# Rarely enough not to disturb the pool while it has its turn.
POLL_S = 0.05


def remove_leftovers() -> None:
    """Unlink what plain vLLM keeps in shared memory under one name for every run: the
    next run would die of finding it (vllm 0.32.0, with an env:// init method)."""
    for path in Path("/dev/shm").glob("-[tp]p:*-cpushm_*"):
        path.unlink(missing_ok=True)


def main() -> None:
    request = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    device.prepare_process(rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    from vllm import LLM, SamplingParams

    llm = LLM(
        request["model"],
        distributed_executor_backend="external_launcher",
        **request["engine_args"],
    )
    remove_leftovers()
    folder = Path(request["folder"])
    sampling = SamplingParams(**request["sampling"])
    for number in range(request["rounds"]):
        while not (folder / f"go-{number}").exists():
            time.sleep(POLL_S)
        since = time.perf_counter()
        outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
        seconds = time.perf_counter() - since
        if rank == 0:
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            partial = folder / f"partial-{number}"
            partial.write_text(json.dumps({"seconds": seconds, "tokens": tokens}))
            partial.rename(folder / f"done-{number}")
    # A rank that leaves early would break the other's last collective.
    sys.stdout.flush()
    time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    main()
