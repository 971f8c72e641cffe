"""vLLM's own allocator class as several engines of one process see it.

Real: the class, the worlds, the arena. Simulated: the device, and the C half that calls
back into the class.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


def test_each_world_has_its_own_part_of_vllms_allocator() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.process.resident_cumem"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "ascend": [],
        "graph params": [None, "the first's", None, "the second's"],
        "second's pools": [],
        "second's graphs": None,
        "mapped while the first sleeps": [True],
        "records": [True, True],
        "first's pools": ["weights"],
        "first's graphs": "graphs of the first",
        "weights": True,
        "kv cache": False,
        "moved": 600,
        "engine's memory": [
            [300, 500, 3],
            [300, 300, 1],
            [300, 1, 2],
            [0, 0, 3],
            [0, 2, 384],
            [1, 0, 3],
        ],
        "refusals": ["it needs", ""],
        "after burial": [True],
        "usage": [800, 0, 800, 0],
        "outside": [0],
    }
