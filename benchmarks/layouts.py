"""A layout entered again: random ones over four ranks, on a SIMULATED device backend.

    python -m benchmarks.layouts [--runs N] [--layouts N] [--json FILE]

Making one of the simulation's communicators takes 330 ms, as is told in its name and
output; the data goes over sockets of this machine. Each run starts four ranks anew
(vLLM's parallel state, no engine) and prints, of the layouts that were there before,
median, 95th percentile and most for the world alone and with vLLM's group objects in
it, the same of plain creation, and of an empty gloo barrier of four ranks: the price of
one meeting on this machine, of which entering takes several.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import busy, describe, hardware, versions
from tests import members

NUM_RANKS = 4
SCENARIOS = ("layouts", "without_pool", "floor")
TIMEOUT_S = 900.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layouts",
        description="What it takes to enter a layout again, over simulated groups.",
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layouts", type=int, default=100, help="of each run")
    parser.add_argument("--distinct", type=int, default=100, help="drawn from")
    parser.add_argument("--creation", type=float, default=0.33, help="s per group")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run(plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """One start of the ranks: what each scenario gave, by its name."""
    statuses, texts = members.run(
        "tests.process.communicator_member", json.dumps(plan), *SCENARIOS,
        num_ranks=NUM_RANKS, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    if any(statuses):
        raise SystemExit(f"ranks ended with {statuses}:\n{texts[0][-2000:]}")
    return members.by_scenario(texts)


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile (the next sample below it) and most, in ms."""
    ordered = sorted(seconds)
    return {
        "times": len(ordered),
        "median_ms": 1000 * statistics.median(ordered),
        "p95_ms": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
        "max_ms": 1000 * ordered[-1],
    }


def row(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of worlds of more than one rank, over all ranks."""
    rows = [each for result in found["layouts"] for each in result["rows"]]
    rows = [each for each in rows if each["ranks"] > 1]
    if not all(each["right"] for each in rows):
        raise SystemExit("a collective gave a wrong sum")
    again = [each for each in rows if each["is_known"]]
    return {
        "again, world alone": summary([each["formed_s"] for each in again]),
        "again, with vLLM's groups": summary([each["took_s"] for each in again]),
        "made anew, with vLLM's groups": summary(
            [s for result in found["without_pool"] for s in result["rows"]]
        ),
        "empty barrier": summary(
            [s for result in found["floor"] for s in result["seconds"]]
        ),
        "made_again": sum(each["made"] for each in again),
        "most_kept": max(each["kept"] for each in rows),
    }


def main() -> None:
    arguments = parse_arguments()
    kind = hardware()
    print(describe(kind, versions()), busy(), sep="\n", flush=True)
    rows = []
    for number in range(arguments.runs):
        plan = {
            "creation_s": arguments.creation,
            "num_layouts": arguments.layouts,
            "num_distinct": arguments.distinct,
            "num_barriers": 300,
            "seed": 23 + number,
        }
        rows.append({"plan": plan, **row(run(plan))})
        print(f"run {number + 1}: SIMULATED, {arguments.creation:g} s a group")
        for name, each in rows[-1].items():
            if isinstance(each, dict) and "p95_ms" in each:
                print(
                    f"  {name}: median {each['median_ms']:.1f} ms, p95 "
                    f"{each['p95_ms']:.1f} ms, max {each['max_ms']:.1f} ms, "
                    f"{each['times']} times"
                )
        print(f"  communicators made by those entered again: {rows[-1]['made_again']}")
        sys.stdout.flush()
    if arguments.json:
        result = {"hardware": kind, "versions": versions(), "runs": rows}
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
