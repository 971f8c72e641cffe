"""`make gpu` where there is no device, and what it says where it cannot go on."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(root: Path, report: Path) -> tuple[subprocess.CompletedProcess[str], Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--root", str(root), "--report", str(report)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, json.loads(report.read_text())


def test_without_a_device_nothing_is_run_and_that_is_said(tmp_path: Path) -> None:
    done, report = run(tmp_path, tmp_path / "build" / "gpu.json")
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert first == "nothing was run"
    assert sum("no GPU or NPU on this machine" in line for line in rest) == 2
    assert report["hardware"]["device"] == "none"
    assert report["tests"] == []
    assert report["figures"] == {}
    assert set(report["not_run"]) == {"torch", "vllm"}
    assert report["versions"]["python"]


@pytest.mark.skipif(
    Path("/dev/nvidiactl").exists() or Path("/dev/davinci_manager").exists(),
    reason="this machine has a device",
)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_on_this_machine() -> None:
    done = subprocess.run(
        ["make", "--silent", "gpu", f"PYTHON={sys.executable}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nothing was run\n")


def test_a_device_and_an_environment_not_made_for_it(tmp_path: Path) -> None:
    """Then nothing is proven, though it could be: that is a failure."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    done, report = run(tmp_path, tmp_path / "gpu.json")
    assert done.returncode == 1
    assert report["hardware"]["device"] == "cuda"
    assert "is built for the CPU" in report["not_run"]["torch"]
    (tmp_path / "dev" / "davinci_manager").touch()
    (tmp_path / "dev" / "davinci0").touch()
    done, report = run(tmp_path, tmp_path / "gpu.json")
    assert (done.returncode, report["hardware"]["num_devices"]) == (1, 1)
    assert "no torch-npu" in report["not_run"]["torch"]


@pytest.mark.parametrize(
    ("tier", "device", "installed", "reason"),
    [
        ("torch", "cuda", {"torch": "2.11.0+cu130"}, ""),
        ("torch", "cuda", {}, "has no torch"),
        ("torch", "npu", {"torch": "2.11.0", "torch-npu": "2.11.0"}, ""),
        ("vllm", "none", {"torch": "2.11.0+cu130"}, "no GPU or NPU"),
    ],
)
def test_what_stands_in_the_way(
    gpu: ModuleType, tier: str, device: str, installed: dict[str, str], reason: str
) -> None:
    found = gpu.obstacle(tier, device, installed)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_torch_without_vllm_runs_the_first_tier_alone(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(gpu, "run_tier", lambda tier, report: ran.append(tier) or 0)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name)
    )
    report = {
        "hardware": {"device": "cuda"},
        "versions": {"torch": "2.11.0+cu130"},
        "not_run": {},
    }
    assert gpu.run(report) == 0
    assert ran == ["torch"]
    assert report["not_run"] == {"vllm": "vLLM is not installed"}


def test_what_tests_note_becomes_the_report(gpu: ModuleType) -> None:
    notes = [
        {"test": "test_torch.py::a", "figures": {"gb_per_s": 20.5}},
        {"test": "test_torch.py::a", "figures": {"of_link": 0.9}},
        {"test": "test_torch.py::a", "outcome": "passed", "seconds": 1.5, "why": ""},
        {
            "test": "test_torch.py::b",
            "outcome": "skipped",
            "seconds": 0.0,
            "why": "needs two devices",
        },
    ]
    report: dict[str, Any] = {"not_run": {}, "tests": [], "figures": {}}
    gpu.take_over("\n".join(map(json.dumps, notes)), report)
    assert report["figures"] == {"test_torch.py::a": {"gb_per_s": 20.5, "of_link": 0.9}}
    assert [test["outcome"] for test in report["tests"]] == ["passed", "skipped"]
    assert report["not_run"] == {"test_torch.py::b": "needs two devices"}
