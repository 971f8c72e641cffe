"""A rank's supervisor over a stand-in for the rank: a script that dies as told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_resident.rank.supervisor import MAX_RESTARTS

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).parents[2]
# Supervises this in a process of its own, as `python -m vllm_resident.rank` does.
SUPERVISE = """
import os, pathlib, sys
from vllm_resident.rank import supervisor
say = lambda text: print(text, file=sys.stderr, flush=True)
folder = pathlib.Path(os.environ["FOLDER"])
pool = supervisor.LaunchedPool(folder / "pool.json")
def has_stopped():
    found = pool.has_stopped()
    with open(folder / "looks", "a") as looks:
        looks.write(".")
    return found
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(supervisor.supervise(command, say, has_stopped))
"""
# Writes who it is, then lives until it is told.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
number = len(list(folder.glob("life-*")))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
about = {name: os.environ.get(name) for name in os.environ if "VLLM_RESIDENT" in name}
about["pid"] = os.getpid()
(folder / "new").write_text(json.dumps(about))
(folder / "new").rename(folder / f"life-{number}")
statuses = json.loads(os.environ["STATUSES"])
if number < len(statuses):
    sys.exit(statuses[number])
time.sleep(60)
"""


class Supervised:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, *statuses: int, **environment: str) -> subprocess.Popen[str]:
        """The stand-in's first lives end with these statuses; the next one stays."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISE, STAND_IN],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "FOLDER": str(self.folder),
                "STATUSES": json.dumps(statuses),
                "RANK": "1",
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def life(self, number: int) -> dict[str, Any]:
        """What that life of the stand-in wrote, once it has."""
        path = self.folder / f"life-{number}"
        wait_until(path.exists)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def looks_again(self) -> None:
        """Wait until the supervisor has asked anew whether its pool has stopped."""
        looks = self.folder / "looks"

        def num_looks() -> int:
            return looks.stat().st_size if looks.exists() else 0

        # It may be at one already.
        enough = num_looks() + 2
        wait_until(lambda: num_looks() >= enough)

    def num_lives(self) -> int:
        return len(list(self.folder.glob("life-*")))


def wait_until(holds: Callable[[], bool], timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path)
    yield supervised
    if supervised.process is not None:
        supervised.process.kill()
        supervised.process.communicate()


def test_a_rank_that_dies_is_started_anew_and_said(supervised: Supervised) -> None:
    process = supervised.start(70)
    first, second = supervised.life(0), supervised.life(1)
    assert first["VLLM_RESIDENT_LAUNCHER_PID"] == str(os.getpid())
    assert second["VLLM_RESIDENT_LAUNCHER_PID"] == str(os.getpid())
    assert first["VLLM_RESIDENT_INCARNATION"] == "0"
    assert second["VLLM_RESIDENT_INCARNATION"] == "1"
    os.kill(second["pid"], signal.SIGKILL)
    assert supervised.life(2)["VLLM_RESIDENT_INCARNATION"] == "2"
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "rank 1 ended with status 70" in said
    assert "rank 1 was killed by SIGKILL" in said
    assert "(2 of 3 times within 10 minutes)" in said


@pytest.mark.parametrize("status", [0, 2])
def test_an_end_in_order_and_wrong_usage_are_final(
    status: int, supervised: Supervised
) -> None:
    process = supervised.start(status)
    assert process.wait(20) == status
    assert supervised.num_lives() == 1


def test_it_gives_up_on_a_rank_that_dies_again_and_again(
    supervised: Supervised,
) -> None:
    process = supervised.start(*[1] * 10)
    assert process.wait(30) == 1
    assert supervised.num_lives() == MAX_RESTARTS + 1


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Stands for the controller that was started for this test's pool."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_pool_file(tmp_path, process.pid, os.getpid())
    yield process
    process.kill()
    process.wait()


def write_pool_file(folder: Path, pid: int, owner_pid: int) -> None:
    (folder / "new").write_text(json.dumps({"pid": pid, "owner_pid": owner_pid}))
    (folder / "new").rename(folder / "pool.json")


def test_a_rank_that_is_starting_when_the_pool_stops_ends_with_it(
    supervised: Supervised, controller: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Nobody told it so, and it is not started anew: the launcher would start all."""
    process = supervised.start(70)
    supervised.life(1)
    supervised.looks_again()
    (tmp_path / "pool.json").unlink()
    supervised.looks_again()
    assert process.poll() is None  # who took the file away is still there
    controller.kill()
    assert process.wait(20) == 0
    assert supervised.num_lives() == 2


def test_a_rank_whose_pool_has_another_by_its_name_ends(
    supervised: Supervised, controller: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    process = supervised.start()
    supervised.life(0)
    supervised.looks_again()
    controller.kill()
    write_pool_file(tmp_path, os.getpid(), os.getpid() + 1)
    assert process.wait(20) == 0


def test_a_rank_is_started_anew_under_a_controller_that_was_killed(
    supervised: Supervised, controller: subprocess.Popen[bytes]
) -> None:
    supervised.start()
    first = supervised.life(0)
    supervised.looks_again()
    controller.kill()
    supervised.looks_again()
    os.kill(first["pid"], signal.SIGKILL)
    supervised.life(1)


def test_a_launchers_restart_counts_on(supervised: Supervised) -> None:
    """No number is used twice, whatever restarts come after which."""
    supervised.start(TORCHELASTIC_RESTART_COUNT="1")
    number = int(supervised.life(0)["VLLM_RESIDENT_INCARNATION"])
    assert number == MAX_RESTARTS + 1


@pytest.mark.parametrize(("rank", "num_lives"), [("0", 1), ("1", 2)])
def test_a_store_that_died_with_its_rank_takes_a_new_launch(
    rank: str, num_lives: int, supervised: Supervised
) -> None:
    process = supervised.start(1, RANK=rank, TORCHELASTIC_USE_AGENT_STORE="")
    if num_lives == 1:
        assert process.wait(20) == 1
    else:
        supervised.life(1)
    assert supervised.num_lives() == num_lives


def test_rank_0_comes_back_where_an_agent_has_the_store(
    supervised: Supervised,
) -> None:
    supervised.start(1, RANK="0", TORCHELASTIC_USE_AGENT_STORE="True")
    supervised.life(1)


def test_the_rank_is_the_program_that_was_started() -> None:
    """Also where another stands in for it, such as one with a simulated device."""
    said = subprocess.run(
        [sys.executable, "-m", "tests.process.command_of_rank", "--pool", "p"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout
    expected = ["-m", "tests.process.command_of_rank", "--no-supervisor", "--pool", "p"]
    assert json.loads(said)[1:] == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_rank_ends_with_its_supervisor(number: int, supervised: Supervised) -> None:
    process = supervised.start()
    pid = supervised.life(0)["pid"]
    process.send_signal(number)
    process.wait(20)
    wait_until(lambda: not psutil.pid_exists(pid))
    assert supervised.num_lives() == 1


def test_ctrl_c_is_the_launchers_business(supervised: Supervised) -> None:
    process = supervised.start()
    pid = supervised.life(0)["pid"]
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    assert psutil.pid_exists(pid)


def test_the_rank_ends_when_the_launcher_is_gone(tmp_path: Path) -> None:
    """The launcher here: a shell that ends at once and leaves its child behind."""
    environment = {"FOLDER": str(tmp_path), "STATUSES": "[]", "RANK": "1"}
    command = [sys.executable, "-c", SUPERVISE, STAND_IN]
    launcher = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL)\n"
        f"while not os.path.exists({str(tmp_path / 'life-0')!r}): time.sleep(0.02)\n"
    )
    subprocess.run(
        [sys.executable, "-c", launcher, *command],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        check=True,
        timeout=20,
    )
    pid = json.loads((tmp_path / "life-0").read_text())["pid"]
    wait_until(lambda: not psutil.pid_exists(pid))
