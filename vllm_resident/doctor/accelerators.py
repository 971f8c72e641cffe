"""What the machine has beside cores: GPUs and NPUs, their drivers, torch's builds.

`look` collects what is there without torch or a vendor's tool; everything else judges
what was found and can be tried without a device.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_resident.allocator_settings import expandable_segments
from vllm_resident.doctor.check import Check

# The oldest driver that a CUDA major version runs on (NVIDIA's compatibility guide).
_OLDEST_DRIVERS = {12: 525, 13: 580}
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_NAMES = {"cuda": "GPU", "npu": "NPU"}
_CANN = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")


@dataclass(frozen=True)
class Machine:
    """What `look` found. `driver` is NVIDIA's version, `cuda` the major version of CUDA
    that torch is built for (0: none, or it does not say); `versions` those of what is
    installed, by distribution."""

    gpus: int = 0
    npus: int = 0
    driver: str = ""
    cuda: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def torch(self) -> str:
        return self.versions.get("torch", "")

    @property
    def device_type(self) -> str:
        """What ranks started here would use (`rank/device.py`, detect)."""
        if self.npus:
            return "npu"
        return "cuda" if self.gpus and not self.torch.endswith("+cpu") else "cpu"


def check_accelerators(num_ranks: int) -> list[Check]:
    """Every check of the accelerators that `num_ranks` ranks would use."""
    return examine(look(), num_ranks)


def examine(machine: Machine, num_ranks: int) -> list[Check]:
    """What is wrong with `machine` for that many ranks."""
    checks = [_device(machine)]
    if machine.device_type == "cuda":
        checks += _driver(machine)
    if machine.device_type == "npu":
        checks += [*_npu_software(machine), _cann(machine)]
    if machine.device_type != "cpu":
        checks += [_one_rank_each(machine, num_ranks), _allocator(machine)]
    return checks


def look(root: Path = Path("/")) -> Machine:
    """Read devices, drivers and versions; changes nothing."""
    versions = {
        name: version
        for name in ("torch", "torch-npu", "vllm", "vllm-ascend")
        if (version := _version(name))
    }
    manager = (root / "dev" / "davinci_manager").exists()
    control = (root / "dev" / "nvidiactl").exists()
    return Machine(
        gpus=_num_nodes(root, "nvidia") if control else 0,
        npus=_num_nodes(root, "davinci") if manager else 0,
        driver=_nvidia_driver(root),
        cuda=_cuda_of_torch(versions.get("torch", "")),
        versions=versions,
        environ=dict(os.environ),
    )


def _num_nodes(root: Path, name: str) -> int:
    """How many of a driver's devices are in /dev."""
    nodes = (root / "dev").glob(f"{name}[0-9]*")
    return sum(re.fullmatch(rf"{name}\d+", node.name) is not None for node in nodes)


def _nvidia_driver(root: Path) -> str:
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else ""


def _cuda_of_torch(version: str) -> int:
    """From the version's local part (+cu130), or from what it requires."""
    if match := re.search(r"\+cu(\d+)\d$", version):
        return int(match[1])
    if not version or "+" in version:
        return 0
    for line in importlib.metadata.requires("torch") or []:
        if match := re.match(r"nvidia-cuda-runtime(?:-cu(\d+))?\s*==\s*(\d+)", line):
            return int(match[1] or match[2])
        if match := re.match(r"cuda-toolkit\[.*\]\s*==\s*(\d+)", line):
            return int(match[1])
    return 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(machine: Machine) -> Check:
    if machine.device_type != "cpu":
        number = machine.gpus or machine.npus
        name = _NAMES[machine.device_type]
        return Check("device", "ok", f"{number} {name}s, torch {machine.torch}")
    if machine.gpus:
        return Check(
            "device",
            "warn",
            f"{machine.gpus} GPUs, but torch {machine.torch} is built for the CPU: "
            "ranks would not use them",
            "pip install 'vllm-resident[cuda]' in an environment of its own",
        )
    if machine.torch and "+cpu" not in machine.torch:
        return Check(
            "device",
            "warn",
            f"torch {machine.torch} is built for an accelerator, and no driver of one "
            "is seen (/dev/nvidiactl, /dev/davinci_manager): ranks would use the CPU",
            "load the driver, hand the devices to the container (docker: --gpus all), "
            "or install CPU builds",
        )
    return Check("device", "ok", "none but the CPU")


def _driver(machine: Machine) -> Iterator[Check]:
    if not machine.driver:
        yield Check(
            "driver",
            "warn",
            "/dev/nvidiactl is there, and /proc/driver/nvidia/version is not",
            "load NVIDIA's kernel module on the host (nvidia-smi)",
        )
        return
    oldest = _OLDEST_DRIVERS.get(machine.cuda, 0)
    if int(machine.driver.partition(".")[0]) < oldest:
        yield Check(
            "driver",
            "fail",
            f"{machine.driver}, where torch is built for CUDA {machine.cuda}, which "
            f"needs {oldest} or newer",
            "install a newer driver on the host, or a torch built for an older CUDA",
        )
        return
    cuda = f", torch for CUDA {machine.cuda}" if machine.cuda else ""
    yield Check("driver", "ok", f"{machine.driver}{cuda}")


def _npu_software(machine: Machine) -> Iterator[Check]:
    for name in ("torch-npu", "vllm-ascend"):
        if name not in machine.versions:
            yield Check(
                name,
                "fail",
                "not installed, and the machine has NPUs",
                "pip install 'vllm-resident[npu]'",
            )
    torch_npu = machine.versions.get("torch-npu")
    if torch_npu is None or not machine.torch:
        return
    wanted, have = (
        ".".join(version.split(".")[:2]) for version in (torch_npu, machine.torch)
    )
    if wanted == have:
        yield Check("torch for torch-npu", "ok", f"{torch_npu} on {machine.torch}")
    else:
        yield Check(
            "torch for torch-npu",
            "fail",
            f"torch-npu {torch_npu} is for torch {wanted}, installed is "
            f"{machine.torch}",
            f"pip install 'torch-npu=={have}.*', or the torch that vllm-ascend wants",
        )


def _cann(machine: Machine) -> Check:
    for name in _CANN:
        if path := machine.environ.get(name):
            return Check("CANN", "ok", f"{name}={path}")
    return Check(
        "CANN",
        "warn",
        f"none of {', '.join(_CANN)} is set: torch-npu will not find its libraries",
        "source set_env.sh of the CANN toolkit before starting ranks",
    )


def _one_rank_each(machine: Machine, num_ranks: int) -> Check:
    number, name = machine.gpus or machine.npus, _NAMES[machine.device_type]
    variable = _VISIBLE[machine.device_type]
    visible = machine.environ.get(variable)
    if visible is not None:
        listed = [each for each in visible.split(",") if each.strip()]
        number = min(number, len(listed))
    found = f"{num_ranks} ranks on {number} {name}s"
    if visible is not None:
        found += f" ({variable}={visible})"
    if num_ranks <= number:
        return Check("ranks and devices", "ok", found)
    library = "NCCL" if machine.device_type == "cuda" else "HCCL"
    return Check(
        "ranks and devices",
        "fail",
        f"{found}: {library} refuses two ranks on one device",
        f"start at most {number} ranks here (--nproc-per-node {number})",
    )


def _allocator(machine: Machine) -> Check:
    variable = expandable_segments(machine.device_type, machine.environ)
    if not variable:
        return Check("allocator", "ok", "expandable segments are off")
    if machine.device_type == "cuda":
        return Check(
            "allocator",
            "ok",
            f"expandable segments are on ({variable}); vLLM turns them off for what "
            "sleeps",
        )
    return Check(
        "allocator",
        "fail",
        f"{variable} turns on expandable segments: no engine can sleep then, and ranks "
        "refuse to start",
        f"take expandable_segments out of {variable}",
    )
