"""A vLLM source tree: where it is, its version, and how its files stand to a series.

Also puts a series into such a tree and takes it out again, all files or none. The tree
may be an installation or a checkout; with git, `history` makes commits of it instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from vllm_resident.errors import PatchError
from vllm_resident.patching import diff, series
from vllm_resident.patching.series import PATCHES, Series, sha256

_VERSION = re.compile(r"^__version__ = (?:version = )?['\"](\d+(?:\.\d+)*)", re.M)


class FileState(StrEnum):
    """How a file stands to a series."""

    ORIGINAL = "original"
    PATCHED = "patched"
    EDITED = "edited"
    MISSING = "missing"


@dataclass(frozen=True)
class Tree:
    """`root` is the folder that holds `vllm/`; `version` has no local part ("+cpu")."""

    root: Path
    version: str

    def read(self, file: str) -> bytes:
        return (self.root / file).read_bytes()


def installed() -> Tree:
    """The vLLM this interpreter would import; it is not imported. Raises
    `PatchError`."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise PatchError(
            "vLLM is not installed for this interpreter: install the extra of "
            "vllm-resident that fits the device (cpu, cuda or npu)"
        )
    root = Path(spec.origin).parent.parent
    version = _written_version(root)
    if version is None:
        raise PatchError(f"{root}/vllm/_version.py, which says vLLM's version, is gone")
    return Tree(root, version)


def find(directory: Path, patches: Path = PATCHES) -> Tree:
    """The tree in `directory`: what holds `vllm/`, or that folder itself.

    A checkout that was never built does not say its version: it is the one all of
    whose files are those of a series. Raises `PatchError`.
    """
    directory = directory.expanduser().resolve()
    for root in (directory, directory.parent):
        if (root / "vllm" / "__init__.py").is_file() and directory in (
            root,
            root / "vllm",
        ):
            break
    else:
        raise PatchError(
            f"{directory} holds no vLLM: give the folder that `vllm/` is in, a "
            f"checkout or a site-packages"
        )
    if version := _written_version(root):
        return Tree(root, version)
    for version in series.versions(patches):
        states = file_states(Tree(root, version), series.read(version, patches))
        if set(states.values()) <= {FileState.ORIGINAL, FileState.PATCHED}:
            return Tree(root, version)
    raise PatchError(
        f"{root} does not say its version and is none of "
        f"{', '.join(series.versions(patches))}: check one of these out"
    )


def file_states(tree: Tree, its_series: Series) -> dict[str, FileState]:
    """How each file of the series stands in the tree."""
    return {file: _state(tree, its_series, file) for file in its_series.base}


def require(tree: Tree, its_series: Series, states: Mapping[str, FileState]) -> None:
    """Raise `PatchError` for the first file that is neither original nor patched,
    naming the hunk that does not fit, if one does not, and the remedy."""
    for file, state in states.items():
        if state in (FileState.ORIGINAL, FileState.PATCHED):
            continue
        remedy = (
            "install that version of vLLM again (pip install --force-reinstall "
            "--no-deps), or in a checkout put the file back"
        )
        if state is FileState.MISSING:
            raise PatchError(f"{tree.root / file} is missing: {remedy}")
        raise PatchError(
            f"{tree.root / file} is not the file of vLLM {tree.version}: it was "
            f"edited, or built from other sources. "
            f"{_first_misfit(tree, its_series, file)}. To mend it, {remedy}"
        )


def patched_text(its_series: Series, file: str, original: bytes) -> bytes:
    """The file as the whole series leaves it. `original` is known to be what the series
    was made for, so a patch that does not fit was changed: `PatchError` says so."""
    try:
        return _forward(its_series, file, original)
    except PatchError as error:
        raise PatchError(
            f"{error.message}. The file is as it should be, so the patch is not: "
            f"restore the folder patches/v{its_series.version}, or install "
            f"vllm-resident again"
        ) from error


def apply(tree: Tree, its_series: Series) -> list[str]:
    """Put the series into the tree's files; returns those changed, none if it is
    there already. All files or none. Raises `PatchError`."""
    states = file_states(tree, its_series)
    require(tree, its_series, states)
    return _replace(
        tree,
        {
            file: patched_text(its_series, file, tree.read(file))
            for file, state in states.items()
            if state is FileState.ORIGINAL
        },
    )


def revert(tree: Tree, its_series: Series) -> list[str]:
    """Take the series out again; returns the files changed. All files or none."""
    states = file_states(tree, its_series)
    require(tree, its_series, states)
    return _replace(
        tree,
        {
            file: _original_text(its_series, file, tree.read(file))
            for file, state in states.items()
            if state is FileState.PATCHED
        },
    )


def _replace(tree: Tree, contents: dict[str, bytes]) -> list[str]:
    """Write every file beside its place, then move all of them there; a failure puts
    back what was moved."""
    staged: dict[str, Path] = {}
    before: dict[str, bytes] = {}
    try:
        for file, content in contents.items():
            staged[file] = _stage(tree.root / file, content)
        for file, path in staged.items():
            before[file] = tree.read(file)
            path.replace(tree.root / file)
    except OSError as error:
        for file, content in before.items():
            with contextlib.suppress(OSError):
                _stage(tree.root / file, content).replace(tree.root / file)
        raise PatchError(
            f"{error.filename}: {error.strerror}: nothing in {tree.root} was changed. "
            f"Its files must be yours to write"
        ) from error
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    return list(contents)


def _stage(path: Path, content: bytes) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    shutil.copymode(path, name)
    return Path(name)


def _state(tree: Tree, its_series: Series, file: str) -> FileState:
    try:
        content = tree.read(file)
    except FileNotFoundError:
        return FileState.MISSING
    wanted = its_series.base[file]
    if sha256(content) == wanted:
        return FileState.ORIGINAL
    try:
        original = _original_text(its_series, file, content)
    except (PatchError, UnicodeDecodeError):
        return FileState.EDITED
    return FileState.PATCHED if sha256(original) == wanted else FileState.EDITED


def _forward(its_series: Series, file: str, content: bytes) -> bytes:
    return diff.forward(its_series.patches, file, content.decode()).encode()


def _original_text(its_series: Series, file: str, content: bytes) -> bytes:
    return diff.backward(its_series.patches, file, content.decode()).encode()


def _first_misfit(tree: Tree, its_series: Series, file: str) -> str:
    try:
        _forward(its_series, file, tree.read(file))
    except PatchError as error:
        return error.message[0].upper() + error.message[1:]
    except UnicodeDecodeError:
        return "It is not text"
    touching = [each.slug for each in its_series.patches if file in each.touched]
    return (
        f"Every hunk of {', '.join(touching)} would still fit, but what is around them "
        f"is not what they were made for"
    )


def _written_version(root: Path) -> str | None:
    try:
        match = _VERSION.search((root / "vllm" / "_version.py").read_text())
    except FileNotFoundError:
        return None
    return match[1] if match else None
