"""The folder of vLLM's sockets: one rank's, swept, gone with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_resident.rank.rpc import VARIABLE, SocketFolder


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is taken back whatever the test does to it.
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)


def leave_socket(folder: Path) -> Path:
    path = folder / "left"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    return path


def test_vllm_is_told_of_it_and_it_goes_with_the_rank(tmp_path: Path) -> None:
    folder = SocketFolder(tmp_path, 3)
    own = Path(os.environ[VARIABLE])
    assert own.parent == tmp_path
    left = leave_socket(own)
    folder.sweep()
    assert not left.exists()
    leave_socket(own)
    (own / "folder").mkdir()
    folder.sweep()
    assert [each.name for each in own.iterdir()] == ["folder"]
    folder.remove()
    folder.sweep()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_rank_left_goes_at_the_next_start(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys\n"
        "from vllm_resident.rank.rpc import VARIABLE, SocketFolder\n"
        "kept = SocketFolder(pathlib.Path(sys.argv[1]), 0)\n"
        "(pathlib.Path(os.environ[VARIABLE]) / 'left').touch()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert [path.name for path in (tmp_path / "rpc0").iterdir()] == ["left"]
    folder = SocketFolder(tmp_path, 0)
    assert list((tmp_path / "rpc0").iterdir()) == []
    folder.remove()


def test_a_living_ranks_folder_is_left_alone(tmp_path: Path) -> None:
    first = SocketFolder(tmp_path, 0)
    left = leave_socket(Path(os.environ.pop(VARIABLE)))
    second = SocketFolder(tmp_path, 0)
    assert VARIABLE not in os.environ
    second.sweep()
    second.remove()
    assert left.exists()
    first.remove()


def test_vllms_own_choice_stands_where_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    SocketFolder(long, 0)
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    SocketFolder(tmp_path, 0)
    assert os.environ[VARIABLE] == "/elsewhere"
    assert list(long.iterdir()) == []
