"""What needs a device, in two tiers: torch alone (`test_torch`), vLLM (`test_vllm`).

Without a device everything here is skipped, and says so. What a run saw goes, a line of
JSON each, to the file that GPU_FIGURES names: `scripts/gpu.py` makes a report of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_resident.rank.device import Device, detect


def _device() -> Device | None:
    try:
        found = detect(0)
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if found.type == "cpu" else found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    why = "no GPU or NPU that torch is built for"
    nothing = pytest.mark.skip(reason=why) if _device() is None else None
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if nothing:
                item.add_marker(nothing)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = (crash.message if crash else str(report.longrepr))[:500]
    _note(
        test=report.nodeid.rpartition("/")[2],
        outcome=report.outcome,
        seconds=round(report.duration, 3),
        why=why.removeprefix("Skipped: "),
    )


@pytest.fixture(scope="session")
def device() -> Device:
    """The first device, made the current one."""
    found = _device()
    assert found is not None
    found.activate()
    return found


@pytest.fixture(scope="session")
def num_devices(device: Device) -> int:
    import torch

    number: int = getattr(torch, device.type).device_count()
    return number


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with what was measured, by name with its unit."""

    def note(**figures: Any) -> None:
        _note(test=request.node.nodeid.rpartition("/")[2], figures=figures)

    return note


def _note(**what: Any) -> None:
    if path := os.environ.get("GPU_FIGURES"):
        with Path(path).open("a") as file:
            file.write(json.dumps(what) + "\n")
