"""A mixed trace in miniature: eight models on two ranks, callers of every kind.

    python -m benchmarks.soak [--minutes 10] [--seed N] [--json FILE]

Calls come in bursts and one by one, through the gateway, for models that are not up;
some callers leave, some ask for what cannot be. Every answer is compared with plain
vLLM's, made in fresh processes. Between the rounds the pool is emptied and everything
it holds is read: what one round left behind the next one would add to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks import machine
from benchmarks.at_rest import ranks_at_rest
from benchmarks.contenders import environment
from benchmarks.mixed import MAX_TOKENS, PROMPTS, SAMPLING, Callers, Seen, trace
from benchmarks.plain_answers import plain_answers
from benchmarks.policy import percentile
from benchmarks.serve import make_checkpoints
from benchmarks.servers import GatewayServer, interruptible
from examples.checkpoints import cache_folder
from vllm_resident import Client, PoolStatus, journal
from vllm_resident.transport import pool_directory

# By model, of each of PROMPTS, its tokens.
Answers = dict[str, list[list[int]]]

NUM_RANKS = 2
# name -> checkpoint and ranks; no two have the same weights.
MODELS: dict[str, tuple[str, int]] = {
    "llama": ("llama", 1),
    "llama-b": ("llama-b", 1),
    "qwen2": ("qwen2", 1),
    "qwen2-wide": ("qwen2-b", 2),
    "qwen3": ("qwen3", 1),
    "qwen3-wide": ("qwen3-b", 2),
    "opt": ("opt", 1),
    "mixtral": ("mixtral", 1),
}
# In float32 a model has the same answers over one rank and two.
ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "dtype": "float32",
}
# For about five of the eight: some fall to level 2, some are unloaded and loaded again.
HOST_MEMORY = "8MiB"
# Of resident memory from the first rest to the last: allocators' noise.
MAX_GROWTH_BYTES = 48 * 2**20
MAX_GROWTH_SHARE = 0.03
MAX_MORE_THREADS = 4
# A thread that was joined, a socket that was closed are counted for a moment still.
PATIENCE_S = 30.0
# oneDNN keeps code for the shapes of 1,024 products by default, 250 MB and more of it:
# that fills for half an hour, in plain vLLM too, and would hide what else grows.
PRIMITIVES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


@dataclass(frozen=True)
class Rest:
    """What everything holds while the pool is empty. Lists are by rank."""

    memory_bytes: list[int]
    num_file_descriptors: list[int]
    num_threads: list[int]
    num_sockets: list[int]
    num_shm_segments: list[int]
    num_process_groups: list[int]
    gateway_bytes: int
    gateway_files: int
    gateway_threads: int
    controller_bytes: int


@dataclass
class Outcome(Seen):
    """What came of it all."""

    seconds: float = 0.0
    rests: list[Rest] = field(default_factory=list)
    num_switches: Counter[str] = field(default_factory=Counter)
    lost_share: float = 0.0

    def as_json(self) -> dict[str, Any]:
        document = {**vars(self), "rests": [asdict(rest) for rest in self.rests]}
        waits = sorted(document.pop("answer_s"))
        shares = {"median": 0.5, "p95": 0.95, "max": 1.0}
        for name, share in shares.items():
            document[f"answer_{name}_s"] = percentile(waits, share)
        return document


# ------------------------------------------------------------------ the pool


def pool_file(folder: Path) -> Path:
    """A pool.toml that declares the models and loads none."""
    lines = ["[pool]", f'host_memory = "{HOST_MEMORY}"']
    for name, (checkpoint, num_ranks) in MODELS.items():
        source = str(cache_folder() / checkpoint)
        args = {"model": source, "ranks": num_ranks, **ENGINE_ARGS}
        if num_ranks > 1:
            args["tensor_parallel_size"] = num_ranks
        lines.append(f"[models.{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in args.items()]
    path = folder / "pool.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def rest(client: Client, gateway: psutil.Process) -> Rest:
    """Empty the pool and read what all that is left holds."""
    client.apply([], drain_s=30.0)
    ranks = sorted(ranks_at_rest(client), key=lambda rank: rank.rank)
    controller = psutil.Process(client.status().controller_pid)
    return Rest(
        [rank.memory_used_bytes for rank in ranks],
        [rank.num_file_descriptors for rank in ranks],
        [rank.num_threads for rank in ranks],
        [rank.num_sockets for rank in ranks],
        [rank.num_shm_segments for rank in ranks],
        [rank.num_process_groups for rank in ranks],
        gateway.memory_info().rss,
        gateway.num_fds(),
        gateway.num_threads(),
        controller.memory_info().rss,
    )


def settle(client: Client, outcome: Outcome, timeout_s: float = 10.0) -> None:
    """Who left is forgotten soon: nothing runs and nobody waits any more."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = client.status()
        busy = [e.name for e in status.engines if e.num_requests]
        if not busy and not any(status.waiting.values()):
            return
        time.sleep(0.2)
    outcome.fail(f"still busy when all callers have gone: {busy}, {status.waiting}")


def check_processes(before: PoolStatus, after: PoolStatus, outcome: Outcome) -> None:
    """No rank was lost or started again; no message was amiss."""
    for old, new in zip(before.ranks, after.ranks, strict=True):
        if (old.pid, old.incarnation, "ready") != (new.pid, new.incarnation, new.phase):
            outcome.fail(f"rank {old.rank} was lost: {old.pid}, then {new.pid}")
    if before.controller_pid != after.controller_pid:
        outcome.fail("the controller is another one")
    if after.num_protocol_errors:
        outcome.fail(f"{after.num_protocol_errors} messages that were none")


def check_memory(rests: Sequence[Rest], outcome: Outcome) -> None:
    for text in growth(rests):
        outcome.fail(text)


def growth(rests: Sequence[Rest]) -> list[str]:
    """What the last rest holds beyond the first, where everything was there once."""
    first, last = rests[0], rests[-1]
    grown = []
    for name, before in asdict(first).items():
        after = getattr(last, name)
        pairs = (
            zip(before, after, strict=True)
            if isinstance(before, list)
            else [(before, after)]
        )
        for old, new in pairs:
            # Its pool of threads for builds fills as they are needed.
            allowed = MAX_MORE_THREADS if name == "gateway_threads" else 0
            if name.endswith("_bytes"):
                allowed = max(MAX_GROWTH_BYTES, int(old * MAX_GROWTH_SHARE))
            if new - old > allowed:
                grown.append(f"{name} grew from {old} to {new}")
    return grown


def count_switches(pool: str, since: float, outcome: Outcome) -> None:
    """Of the pool's own log: how many of each kind, and the share of the ranks' time
    that went into them. What an engine still steps through (its drain and the steps to
    its stop) is not lost; a rank that prepares or builds steps nothing."""
    lost_s = 0.0
    for transition in journal.read(pool_directory(pool)):
        report = transition.report
        if transition.began_unix_s < since or report.action == "apply":
            continue
        if report.error:
            outcome.fail(f"a switch failed: {report.error}")
        for engine in report.engines:
            outcome.num_switches[engine.action] += 1
            for phases in engine.rank_phases.values():
                lost_s += sum(s for name, s in phases.items() if name != "stop")
    outcome.lost_share = lost_s / (outcome.seconds * NUM_RANKS)


# ------------------------------------------------------------------ the whole


def say(text: str) -> None:
    now = time.strftime("%H:%M:%S")
    print(f"[{now}] {text}", file=sys.stderr, flush=True)


def ask_plain() -> Answers:
    """What plain vLLM answers for each model, made if need be; blocks for a minute."""
    make_checkpoints(checkpoint for checkpoint, _ in MODELS.values())
    say("asking plain vLLM")
    return plain_answers(
        {name: str(cache_folder() / source) for name, (source, _) in MODELS.items()},
        ENGINE_ARGS,
        PROMPTS,
        {**SAMPLING, "max_tokens": MAX_TOKENS},
    )


def soak(num_rounds: int, round_s: float, seed: int, answers: Answers) -> Outcome:
    """The trace, so many rounds of it, each answer compared with `ask_plain`'s. Blocks;
    leaves nothing running."""
    outcome = Outcome()
    with serving() as server:
        gateway = psutil.Process(server.pid)
        rng = random.Random(seed)
        callers = Callers(server.url, answers, rng, outcome)
        before = server.client.status()
        since = time.time()
        for number in range(num_rounds):
            calls = trace(rng, list(MODELS), round_s)
            say(f"round {number + 1} of {num_rounds}: {len(calls)} calls")
            began = time.monotonic()
            asyncio.run(callers.run(calls))
            outcome.seconds += time.monotonic() - began
            settle(server.client, outcome)
            outcome.rests.append(rest(server.client, gateway))
            if outcome.wrong:
                say(f"{len(outcome.wrong)} wrong, such as {outcome.wrong[0]}")
        after = server.client.status()
        check_processes(before, after, outcome)
        deadline = time.monotonic() + PATIENCE_S
        while growth(outcome.rests) and time.monotonic() < deadline:
            outcome.rests[-1] = rest(server.client, gateway)
        check_memory(outcome.rests, outcome)
        count_switches(after.pool, since, outcome)
    return outcome


@contextlib.contextmanager
def serving() -> Iterator[GatewayServer]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("starting a pool and its gateway")
        server = GatewayServer(NUM_RANKS, config=pool_file(folder), title="soak")
        with environment(*PRIMITIVES):
            stack.enter_context(server)
        yield server


def summary(outcome: Outcome) -> str:
    found = outcome.as_json()
    first, last = outcome.rests[0], outcome.rests[-1]
    return "\n".join(
        [
            f"{outcome.num_calls} calls in {outcome.seconds:.0f} s: "
            + counted({**outcome.by_manner, "refused": outcome.num_refused}),
            f"{outcome.num_tokens} tokens compared; wrong: {len(outcome.wrong)}",
            "to the answer's beginning: "
            + ", ".join(
                f"{name} {found[f'answer_{name}_s']:.3f} s"
                for name in ("median", "p95", "max")
            ),
            f"switches: {counted(outcome.num_switches)}",
            f"{outcome.lost_share:.1%} of the ranks' time went into them",
            f"resident MiB at the first rest: {mib(first)}",
            f"resident MiB at the last rest:  {mib(last)}",
            *(f"refused {n} times: {why}" for why, n in outcome.refusals.items()),
            *outcome.wrong[:20],
        ]
    )


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def mib(rest: Rest) -> str:
    sizes = [*rest.memory_bytes, rest.gateway_bytes, rest.controller_bytes]
    ranks = [f"rank {rank}" for rank in range(len(rest.memory_bytes))]
    names = [*ranks, "gateway", "controller"]
    return ", ".join(
        f"{name} {size / 2**20:.0f}" for name, size in zip(names, sizes, strict=True)
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Eight models on two ranks under a mixed trace of calls over HTTP, "
        "each answer checked.",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="default: 10"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error("--minutes: more than none")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where anything was wrong."""
    arguments = parse_arguments(argv)
    # Two at least: memory is compared from one rest to another.
    num_rounds = max(2, round(arguments.minutes))
    round_s = arguments.minutes * 60 / num_rounds
    outcome = soak(num_rounds, round_s, arguments.seed, ask_plain())
    print(summary(outcome))
    if arguments.json:
        document = {
            "hardware": machine.hardware(),
            "versions": machine.versions(),
            "seed": arguments.seed,
            **outcome.as_json(),
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
