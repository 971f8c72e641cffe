"""A Python client of a pool that torchrun started.

    python -m examples.checkpoints smollm2
    torchrun --standalone --nproc-per-node 2 -m vllm_resident.rank &
    python examples/client.py build/models/smollm2

Loads the model on one rank, generates a batch and a stream, shows that a command which
cannot be is refused without harm, and unloads. The pool goes on, and other clients may
come at any time. `vllm-resident shutdown` ends it.
"""

from __future__ import annotations

import sys

from vllm_resident import Client, CommandRejected

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]


def main(model: str) -> None:
    with Client() as client:  # the pool called "default" on this machine
        client.wait_ready()
        report = client.load(
            "chat",
            model,
            ranks=1,  # how many; the pool picks which
            # From here on vLLM's engine arguments, by vLLM's names.
            enforce_eager=True,
            max_model_len=256,
            kv_cache_memory_bytes=64 << 20,
        )
        [engine] = report.engines
        print(f"chat is on rank {engine.ranks[0]} after {report.seconds:.1f} s")

        for completion in client.generate(
            "chat", PROMPTS, temperature=0.0, max_tokens=16
        ):
            print(f"{PROMPTS[completion.prompt_index]}{completion.text!r}")

        print("as a stream:", end=" ")
        for piece in client.stream("chat", PROMPTS[0], temperature=0.0, max_tokens=16):
            print(piece.text, end="", flush=True)
        print()

        try:
            client.load("chat", model)
        except CommandRejected as error:
            print(f"refused, as it should be: {error}")

        pids = [rank.pid for rank in client.status().ranks]
        client.unload("chat")
        assert [rank.pid for rank in client.status().ranks] == pids
        print(f"unloaded; the ranks live on as pids {pids}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/client.py MODEL")
    main(sys.argv[1])
