"""The whole idea in a minute: two ranks, three layouts, one set of processes.

    make demo                (or, in an environment that has it all:
                              python -m examples.demo)

A pool of two ranks starts and holds two engines, one a rank: SmolLM2, which answers in
English, and a tiny Qwen3 with random weights. Both make way for a tiny Llama over both
ranks (TP=2; SmolLM2's nine heads do not divide by two), then come back. Every layout
generates, and at the end the process numbers are those of the start. The same goes to
build/demo.json for programs.

Ctrl-C ends the pool and the demo. After a `kill -9` the pool ends by itself, and the
next run waits for that where it has to.
"""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.checkpoints import REPO_ROOT, cache_folder
from vllm_resident import (
    Client,
    CommandRejected,
    Completion,
    EngineSpec,
    PoolStatus,
    ResidentError,
    SwitchReport,
)
from vllm_resident.cli.display import PhaseDisplay, describe_error
from vllm_resident.launch import Launch, launch
from vllm_resident.transport import ensure_private, pool_directory

POOL = "demo"
NUM_RANKS = 2
RESULT = REPO_ROOT / "build" / "demo.json"
MODELS = ("smollm2", "qwen3", "llama")
READY_TIMEOUT_S = 180.0
# What a killed demo's pool may need: torchrun gives its ranks 30 s.
LEFTOVER_TIMEOUT_S = 60.0

COMMON: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
}
PROMPTS = {
    "chat": ["The capital of France is", "Water boils at a temperature of"],
    "tiny": ["hello world"],
    "wide": ["hello world"],
}
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "stop": ["\n"]}


class DemoFailed(Exception):
    """What went wrong, in a line for the person who runs the demo."""


@dataclass
class Record:
    """What the demo saw; `build/demo.json` is this."""

    ranks: list[dict[str, int]] = field(default_factory=list)
    switches: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)

    def generated(self, layout: int) -> dict[str, list[list[int]]]:
        """Token ids by engine of one layout, to compare."""
        tokens: dict[str, list[list[int]]] = {}
        for output in self.outputs:
            if output["layout"] == layout:
                tokens.setdefault(output["engine"], []).append(output["token_ids"])
        return tokens

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n")
        scratch.rename(path)


def layouts() -> list[tuple[str, list[EngineSpec]]]:
    """Each layout with the words for it."""

    def engine(name: str, model: str, ranks: list[int], **args: Any) -> EngineSpec:
        folder = str(cache_folder() / model)
        return EngineSpec(name, folder, ranks, {**COMMON, **args})

    apart = [
        engine("chat", "smollm2", [0], dtype="bfloat16"),
        engine("tiny", "qwen3", [1], dtype="float32"),
    ]
    together = [
        engine("wide", "llama", [0, 1], dtype="float32", tensor_parallel_size=2)
    ]
    return [("chat | tiny", apart), ("wide", together), ("chat | tiny", apart)]


def main() -> int:
    """Run the demo; returns its exit status."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    # Whoever asks this process to end gets the pool ended first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        with only_one():
            make_checkpoints(console)
            record = run(console)
        console.print(table(record))
        check(record)
        console.print(f"{time.monotonic() - began:.0f} s in all; as JSON in {RESULT}")
    except KeyboardInterrupt:
        console.print("interrupted; nothing is left running")
        return 130
    except (DemoFailed, ResidentError) as error:
        text = describe_error(error) if isinstance(error, ResidentError) else error
        console.print(f"the demo failed: {text}", style="red", markup=False)
        return 1
    return 0


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the demo's lock, which the kernel gives back however this process ends."""
    directory = ensure_private(pool_directory(POOL))
    with (directory / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoFailed("another demo is running: wait for it or end it") from None
        yield


def make_checkpoints(console: Console) -> None:
    """In a process of its own: this one stays without torch, and quick to start."""
    with PhaseDisplay(console) as phases:
        phases.phase_started("checkpoints", "looking for, or making once", 0.0)
        done = subprocess.run(
            [sys.executable, "-m", "examples.checkpoints", *MODELS],
            cwd=REPO_ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise DemoFailed(f"no checkpoints:\n{done.stderr[-2000:]}")


def run(console: Console) -> Record:
    """All three layouts on one pool; returns what was seen."""
    record = Record()
    with pool(console) as client:
        first = pids(client)
        console.print(
            f"\npool [bold]{POOL}[/]: {NUM_RANKS} ranks, pids {join(first)} "
            f"[dim](watch it: vllm-resident status --watch --pool {POOL})[/]"
        )
        before = "nothing"
        for number, (words, engines) in enumerate(layouts(), 1):
            report = switch(client, console, f"{before} -> {words}", engines)
            record.switches.append(
                {
                    "from": before,
                    "to": words,
                    "seconds": report.seconds,
                    "phases": phases_of(report),
                    "pids": pids(client),
                }
            )
            generate(client, console, number, engines, record)
            before = words
        record.ranks = [
            {"rank": rank, "pid_first": was, "pid_last": now}
            for rank, (was, now) in enumerate(zip(first, pids(client), strict=True))
        ]
    record.write(RESULT)
    return record


@contextmanager
def pool(console: Console) -> Iterator[Client]:
    """A pool of this demo's own, ended with the block: in order, or, where that was
    left by an error, at once. A second Ctrl-C kills it."""
    with launch_when_free(console) as started, Client(started.endpoint) as client:
        try:
            wait_ready(started, client, console)
            yield client
        except BaseException:
            console.print("ending the pool")
            raise
        with PhaseDisplay(console) as phases:
            phases.phase_started("pool", "shutting down", 0.0)
            client.shutdown()
            started.wait_end()


def launch_when_free(console: Console) -> Launch:
    """Start the pool; where a killed demo's is still ending, after that."""
    began = time.monotonic()
    with PhaseDisplay(console) as phases:
        while True:
            waited_s = time.monotonic() - began
            try:
                return launch(POOL, NUM_RANKS, max_restarts=0)
            except CommandRejected:
                if waited_s > LEFTOVER_TIMEOUT_S:
                    raise
            phases.phase_started("pool", "waiting for a killed demo's to end", waited_s)
            time.sleep(0.5)


def wait_ready(started: Launch, client: Client, console: Console) -> None:
    began = time.monotonic()
    with PhaseDisplay(console) as phases:
        phases.phase_started("pool", "starting ranks (importing torch and vLLM)", 0.0)

        def on_status(status: PoolStatus) -> None:
            ready = sum(rank.phase == "ready" for rank in status.ranks)
            if ready:
                text = f"{ready} of {NUM_RANKS} ranks ready"
                phases.phase_started("pool", text, time.monotonic() - began)

        started.wait_ready(client, READY_TIMEOUT_S, on_status)


def switch(
    client: Client, console: Console, title: str, engines: list[EngineSpec]
) -> SwitchReport:
    console.print(f"\n[bold]{escape(title)}[/]")
    with PhaseDisplay(console) as phases:
        report = client.apply(engines, on_progress=phases.on_progress)
    console.print(f"  switched in {report.seconds:.2f} s", highlight=False)
    return report


def generate(
    client: Client,
    console: Console,
    layout: int,
    engines: list[EngineSpec],
    record: Record,
) -> None:
    for engine in engines:
        prompts = PROMPTS[engine.name]
        completions = client.generate(engine.name, prompts, SAMPLING)
        for prompt, completion in zip(prompts, completions, strict=True):
            console.print(
                f"  [cyan]{engine.name}[/] {escape(prompt)}"
                f"[bold]{escape(readable(engine.name, completion))}[/]",
                highlight=False,
                soft_wrap=True,
            )
            record.outputs.append(
                {
                    "layout": layout,
                    "engine": engine.name,
                    "prompt": prompt,
                    "text": completion.text,
                    "token_ids": completion.token_ids,
                }
            )


def readable(engine: str, completion: Completion) -> str:
    """Its text; of a tiny model, whose weights are random, rather the token ids."""
    if engine == "chat":
        return completion.text
    ids = completion.token_ids
    return f" -> tokens {join(ids[:10])} ... ({len(ids)}, of random weights)"


def phases_of(report: SwitchReport) -> dict[str, float]:
    """Seconds by phase, each of the engine that took longest: they move side by side.

    Of what goes it is the whole, by what was done; the loads' "wait" for it is left
    out.
    """
    phases: dict[str, float] = {}
    for engine in report.engines:
        goes = engine.action in ("sleep", "unload")
        took = {engine.action: engine.seconds} if goes else engine.phases
        for phase, seconds in took.items():
            phases[phase] = max(seconds, phases.get(phase, 0.0))
    phases.pop("wait", None)
    return phases


def pids(client: Client) -> list[int]:
    return [rank.pid for rank in client.status().ranks]


def check(record: Record) -> None:
    """That the demo showed what it is there to show."""
    if any(rank["pid_first"] != rank["pid_last"] for rank in record.ranks):
        raise DemoFailed("a rank's process is not the one of the start")
    if record.generated(1) != record.generated(3):
        raise DemoFailed("the first layout's engines came back with other outputs")


def table(record: Record) -> Table:
    """A column for each switch, a row for each phase."""
    result = Table("seconds", box=SIMPLE_HEAD, title="three switches, the same pids")
    for each in record.switches:
        result.add_column(f"{each['from']}\n-> {each['to']}", justify="right")
    phases = dict.fromkeys(name for each in record.switches for name in each["phases"])
    for phase in phases:
        taken = [each["phases"].get(phase) for each in record.switches]
        result.add_row(phase, *("" if s is None else f"{s:.2f}" for s in taken))
    result.add_section()
    totals = [f"{each['seconds']:.2f}" for each in record.switches]
    result.add_row("the whole switch", *totals, style="bold")
    result.add_row("pids", *(join(each["pids"]) for each in record.switches))
    return result


def join(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
