"""Segments are named after a launcher, and swept when it is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_resident import shm


@pytest.fixture(autouse=True)
def shm_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shm, "SHM_DIRECTORY", tmp_path)
    return tmp_path


def touch(directory: Path, name: str) -> Path:
    path = directory / name
    path.touch()
    return path


def test_owner_token_names_pid_and_start_time() -> None:
    token = shm.owner_token(os.getpid())
    assert token == f"vr{os.getpid()}x{shm.start_ticks(os.getpid())}-"


def test_owner_token_of_a_process_that_is_not_there() -> None:
    with pytest.raises(ProcessLookupError):
        shm.owner_token(2**22 + 1)


def test_start_ticks_survive_a_command_with_spaces_and_parentheses(
    tmp_path: Path,
) -> None:
    odd = tmp_path / "a) (b c"
    odd.symlink_to(sys.executable)
    with subprocess.Popen([odd, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = shm.start_ticks(process.pid)
        process.communicate(b"\n")
    mine = shm.start_ticks(os.getpid())
    assert ticks is not None
    assert mine is not None
    assert ticks >= mine


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert shm.start_ticks(process.pid) is None


def test_segments_are_only_this_projects(shm_directory: Path) -> None:
    mine = touch(shm_directory, f"{shm.owner_token(os.getpid())}g7-tp")
    wrapped = touch(shm_directory, "torch_vr12x34-g1")
    touch(shm_directory, "psm_12345")
    assert shm.segments() == sorted([mine, wrapped])
    assert shm.segments(shm.owner_token(os.getpid())) == [mine]


def test_stale_is_what_no_living_launcher_owns(shm_directory: Path) -> None:
    pid = os.getpid()
    ticks = shm.start_ticks(pid)
    assert ticks is not None
    touch(shm_directory, f"vr{pid}x{ticks}-g7")
    reused_pid = touch(shm_directory, f"vr{pid}x{ticks + 1}-g7")
    dead = touch(shm_directory, f"vr{2**22 + 1}x5-g1")
    assert shm.stale_segments() == sorted([reused_pid, dead])


def test_remove_is_idempotent(shm_directory: Path) -> None:
    path = touch(shm_directory, "vr1x1-g1")
    assert shm.remove([path]) == [path]
    assert shm.remove([path]) == []


def test_no_shared_memory_folder_is_no_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "SHM_DIRECTORY", tmp_path / "absent")
    assert shm.segments() == []
