"""What a rank decides before torch is imported: its device, its cores."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from vllm_resident.rank import device


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process may use these, and may change them without consequences."""
    allowed = [2, 3, 5, 7, 8, 9]
    monkeypatch.setattr(device, "_ALLOWED_CORES", allowed)
    return allowed


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 6])
def test_core_sets_share_the_cores_out(cores: list[int], num_ranks: int) -> None:
    sets = [device.core_set(rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(core for share in sets for core in share) == cores
    sizes = {len(share) for share in sets}
    assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_cores_share_in_turn(cores: list[int]) -> None:
    sets = [device.core_set(rank, 8) for rank in range(8)]
    assert sets == [[2], [3], [5], [7], [8], [9], [2], [3]]


def test_detect_a_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(Path, "exists", lambda path: "nvidia" in path.name)
    found = device.detect(3)
    assert (found.type, found.index, found.name, found.backend) == (
        "cpu",
        3,
        "cpu",
        "gloo",
    )


@pytest.mark.parametrize(
    ("node", "name", "backend"),
    [("nvidiactl", "cuda:1", "nccl"), ("davinci_manager", "npu:1", "hccl")],
)
def test_detect_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, node: str, name: str, backend: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: "2.13.0")
    monkeypatch.setattr(Path, "exists", lambda path: path.name == node)
    found = device.detect(1)
    assert (found.name, found.backend) == (name, backend)


def test_prepare_process_binds_a_cpu_rank(
    cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[list[int]] = []
    monkeypatch.setattr(device, "detect", lambda rank: device.Device("cpu", rank))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: bound.append(own))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    device.prepare_process(1, 2)
    assert bound == [[7, 8, 9]]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_prepare_process_leaves_an_accelerators_cores_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "detect", lambda rank: device.Device("cuda", rank))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: pytest.fail("bound"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # As torchrun sets it: an error in one collective would end every engine here.
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    device.prepare_process(0, 2)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"


def test_only_devices_keep_communicators_unasked() -> None:
    assert device.Device("cpu", 0).communicator_budget.num == 0
    assert device.Device("cuda", 0).communicator_budget.num > 0
    assert device.Device("npu", 0).communicator_budget.num_bytes is not None
    assert device.Device("cpu", 0).bound() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_cpu_rank_is_its_resident_set() -> None:
    cpu = device.Device("cpu", 0)
    before, total = cpu.memory()
    block = bytearray(os.urandom(1 << 20) * 64)
    after, _ = cpu.memory()
    assert len(block) * 0.9 < after - before < total
    cpu.empty_cache()
