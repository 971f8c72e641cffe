#!/usr/bin/env python3
"""Run what proves the package on this machine's GPUs or NPUs, and write one report.

    make gpu                                  with the interpreter called python3
    make gpu PYTHON=/path/to/cuda/env/bin/python

The environment needs this package and pytest (`pip install -e . pytest`) and a torch
built for the device; with vLLM in it, engines are tried too. Where there is no device
nothing is run, which is no failure. What could not be run, and why, is printed and in
the report. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIERS = {
    "torch": "tests/gpu/test_torch.py",
    "vllm": "tests/gpu/test_vllm.py",
}
DISTRIBUTIONS = ("torch", "torch-npu", "vllm", "vllm-ascend", "vllm-resident", "pytest")
# What importing this package takes, beside pytest.
NEEDED = ("msgspec", "psutil", "pytest", "unidiff", "zmq")
_SMI_FIELDS = ("name", "memory.total", "driver_version", "pcie.link.gen.max")
TIER_TIMEOUT_S = 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "gpu.json")
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(options.root),
        "versions": versions(),
        "not_run": {},
        "tests": [],
        "figures": {},
    }
    status = run(report)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n")
    print_summary(report)
    say(f"report: {options.report}")
    return status


def run(report: dict[str, Any]) -> int:
    """Run every tier that can be; returns the exit status. What cannot is noted."""
    device = report["hardware"]["device"]
    for tier in TIERS:
        if reason := obstacle(tier, device, report["versions"]):
            report["not_run"][tier] = reason
    if device == "none":
        return 0
    status = 0
    if "torch" in report["not_run"]:
        # There is a device, and nothing that could prove anything on it.
        return 1
    for tier in TIERS:
        if tier not in report["not_run"]:
            status |= run_tier(tier, report)
    return status


def obstacle(tier: str, device: str, installed: dict[str, str]) -> str:
    """Why a tier cannot be run here; empty where it can."""
    if device == "none":
        return "no GPU or NPU on this machine (no /dev/nvidiactl, no /dev/davinci*)"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}: pip install -e . pytest"
    torch = installed.get("torch", "")
    if not torch:
        return f"{sys.executable} has no torch: give one that has, PYTHON=..."
    if device == "cuda" and torch.endswith("+cpu"):
        return (
            f"torch {torch} is built for the CPU: give a CUDA environment, PYTHON=..."
        )
    if device == "npu" and "torch-npu" not in installed:
        return "the machine has NPUs and the environment has no torch-npu"
    if tier == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return ""


def run_tier(tier: str, report: dict[str, Any]) -> int:
    """Run a tier's tests and take over what they note; returns pytest's status."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.touch()
        command = [sys.executable, "-m", "pytest", "-c", "tests/gpu/alone.ini"]
        environment = {
            **os.environ,
            "GPU_FIGURES": str(notes),
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        try:
            status = subprocess.run(
                [*command, "--rootdir", str(ROOT), TIERS[tier]],
                cwd=ROOT,
                env=environment,
                check=False,
                timeout=TIER_TIMEOUT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            report["not_run"][tier] = f"not done within {TIER_TIMEOUT_S} s"
            status = 1
        take_over(notes.read_text(), report)
    return int(status != 0)


def take_over(notes: str, report: dict[str, Any]) -> None:
    """A line of JSON each: what became of a test, or figures of one."""
    for line in notes.splitlines():
        note = json.loads(line)
        if "figures" in note:
            report["figures"].setdefault(note["test"], {}).update(note["figures"])
            continue
        report["tests"].append(note)
        if note["outcome"] == "skipped":
            report["not_run"][note["test"]] = note["why"]


def hardware(root: Path) -> dict[str, Any]:
    """What the machine has, as its kernel and the vendors' tools tell."""
    found: dict[str, Any] = {
        "device": "none",
        "cpu": cpu_name(root),
        "cores": os.cpu_count(),
        "host_memory_gib": round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1
        ),
    }
    if (root / "dev" / "davinci_manager").exists():
        names = [node.name for node in (root / "dev").glob("davinci*")]
        number = sum(re.fullmatch(r"davinci\d+", name) is not None for name in names)
        return {**found, "device": "npu", "num_devices": number, "tool": npu_smi()}
    if (root / "dev" / "nvidiactl").exists():
        return {**found, "device": "cuda", "devices": nvidia_smi()}
    return found


def cpu_name(root: Path) -> str:
    try:
        text = (root / "proc" / "cpuinfo").read_text()
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def nvidia_smi() -> list[dict[str, str]]:
    said = output_of(
        "nvidia-smi",
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader",
    )
    return [
        dict(zip(_SMI_FIELDS, map(str.strip, line.split(",")), strict=False))
        for line in said.splitlines()
    ]


def npu_smi() -> list[str]:
    return output_of("npu-smi", "info", "-l").splitlines()


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_summary(report: dict[str, Any]) -> None:
    outcomes = [test["outcome"] for test in report["tests"]]
    if not outcomes:
        say("nothing was run")
    for outcome in sorted(set(outcomes)):
        say(f"{outcomes.count(outcome)} {outcome}")
    for what, why in report["not_run"].items():
        say(f"not run: {what}: {why}")
    for test, figures in report["figures"].items():
        say(f"{test}: {json.dumps(figures)}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
