"""The doctor on machines that have GPUs or NPUs, of which none is needed here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vllm_resident.allocator_settings import expandable_segments
from vllm_resident.doctor import accelerators
from vllm_resident.doctor.accelerators import Machine
from vllm_resident.doctor.check import Check
from vllm_resident.errors import ResidentError
from vllm_resident.rank import prepare

CUDA = {"torch": "2.13.0+cu130", "vllm": "0.32.0"}
NPU = {"torch": "2.11.0", "torch-npu": "2.11.0", "vllm-ascend": "0.23.0.post1"}


def gpus(number: int = 2, **what: Any) -> Machine:
    given = {"driver": "580.95.05", "cuda": 13, "versions": CUDA, **what}
    return Machine(gpus=number, **given)


def npus(number: int = 2, **what: Any) -> Machine:
    given = {"versions": NPU, "environ": {"ASCEND_HOME_PATH": "/cann"}, **what}
    return Machine(npus=number, **given)


def check(machine: Machine, name: str, num_ranks: int = 2) -> Check:
    checks = {each.name: each for each in accelerators.examine(machine, num_ranks)}
    for each in checks.values():
        assert (each.verdict == "ok") == (each.remedy == ""), each
    return checks[name]


def verdicts(machine: Machine, num_ranks: int = 2) -> dict[str, str]:
    found = accelerators.examine(machine, num_ranks)
    return {each.name: each.verdict for each in found}


def test_machines_that_are_as_they_should_be() -> None:
    assert verdicts(Machine(versions={"torch": "2.13.0+cpu"})) == {"device": "ok"}
    assert set(verdicts(gpus()).values()) == {"ok"}
    assert set(verdicts(npus()).values()) == {"ok"}


def test_a_torch_that_is_not_for_the_device() -> None:
    found = check(gpus(versions={"torch": "2.13.0+cpu"}), "device")
    assert (found.verdict, "built for the CPU" in found.found) == ("warn", True)
    assert check(Machine(versions=CUDA), "device").verdict == "warn"


def test_a_driver_that_is_too_old_for_torchs_cuda() -> None:
    found = check(gpus(driver="575.57.08"), "driver")
    assert found.verdict == "fail"
    assert "CUDA 13, which needs 580 or newer" in found.found
    assert check(gpus(driver="575.57.08", cuda=12), "driver").verdict == "ok"
    assert check(gpus(driver=""), "driver").verdict == "warn"


def test_two_ranks_on_one_gpu() -> None:
    found = check(gpus(1), "ranks and devices")
    assert found.verdict == "fail"
    assert "--nproc-per-node 1" in found.remedy
    assert "NCCL refuses" in found.found
    assert "HCCL refuses" in check(npus(8), "ranks and devices", 9).found
    hidden = gpus(8, environ={"CUDA_VISIBLE_DEVICES": "3"})
    assert check(hidden, "ranks and devices").verdict == "fail"
    assert check(hidden, "ranks and devices", 1).verdict == "ok"
    none = gpus(8, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert check(none, "ranks and devices", 1).verdict == "fail"


def test_software_of_npus() -> None:
    missing = verdicts(npus(versions={"torch": "2.11.0"}))
    assert missing["torch-npu"] == missing["vllm-ascend"] == "fail"
    other = npus(versions={**NPU, "torch": "2.13.0+cpu"})
    assert "2.11.0 is for torch 2.11" in check(other, "torch for torch-npu").found
    assert check(npus(environ={}), "CANN").verdict == "warn"


def test_expandable_segments_with_sleep_mode() -> None:
    on = {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g, expandable_segments:True"}
    found = check(npus(environ=on), "allocator")
    assert (found.verdict, "PYTORCH_NPU_ALLOC_CONF" in found.found) == ("fail", True)
    on = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    found = check(gpus(environ=on), "allocator")
    assert (found.verdict, "vLLM turns them off" in found.found) == ("ok", True)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({}, ""),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ""),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments: 1"}, "PYTORCH_ALLOC_CONF"),
        # torch looks at the first that is set.
        (
            {
                "PYTORCH_ALLOC_CONF": "expandable_segments:False",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
            "",
        ),
        ({"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}, ""),
    ],
)
def test_which_variable_turns_them_on(environ: dict[str, str], variable: str) -> None:
    assert expandable_segments("cuda", environ) == variable
    assert expandable_segments("cpu", environ) == ""


def test_a_rank_on_an_npu_does_not_start_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        os.environ, "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True"
    )
    prepare._check_allocator("cuda")
    with pytest.raises(ResidentError, match="take that out of PYTORCH_NPU_ALLOC_CONF"):
        prepare._check_allocator("npu")


def test_devices_and_driver_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / "dev" / name).touch()
    assert accelerators.look(tmp_path).driver == ""
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release "
        "Build\nGCC version:  gcc version 11.4.0\n"
    )
    found = accelerators.look(tmp_path)
    assert (found.gpus, found.npus, found.driver) == (2, 0, "580.95.05")
    for name in ("davinci0", "davinci1", "davinci2", "davinci_manager"):
        (tmp_path / "dev" / name).touch()
    found = accelerators.look(tmp_path)
    assert (found.npus, found.device_type) == (3, "npu")
    assert accelerators.look(tmp_path / "nothing").gpus == 0


@pytest.mark.parametrize(
    ("version", "requires", "cuda"),
    [
        ("2.13.0+cpu", [], 0),
        ("2.11.0+cu130", [], 13),
        ("2.11.0+cu126", [], 12),
        ("2.13.0", ["nvidia-cuda-runtime==13.0.96; platform_system"], 13),
        ("2.9.0", ["nvidia-cuda-runtime-cu12==12.8.90"], 12),
        ("2.14.0", ["cuda-toolkit[nvrtc,cudart]==13.0.2"], 13),
        ("2.14.0", ["numpy"], 0),
        ("", [], 0),
    ],
)
def test_what_cuda_torch_is_built_for(
    monkeypatch: pytest.MonkeyPatch, version: str, requires: list[str], cuda: int
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requires)
    assert accelerators._cuda_of_torch(version) == cuda
