"""What `vllm-resident patch` does: status, apply, export.

Picks the way that fits a tree (commits in a git checkout, files elsewhere) and says
what came of it.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vllm_resident.errors import PatchError
from vllm_resident.patching import history, overlay, readme, series, tree
from vllm_resident.patching.series import PATCHES, Series
from vllm_resident.patching.tree import FileState, Tree


@dataclass(frozen=True)
class Status:
    """How this machine's vLLM stands. `overlay` is the folder a rank would import the
    patched copies from, None if it is yet to be made."""

    version: str
    root: str
    patches: dict[str, str]
    files: dict[str, FileState]
    overlay: str | None


@dataclass(frozen=True)
class Changed:
    """What `apply`, `revert` or `export` did to `root`; `files` is empty where nothing
    needed doing."""

    version: str
    root: str
    files: list[str]
    as_commits: bool = False


def status(patches: Path = PATCHES) -> Status:
    """Look at the installed vLLM; changes nothing. Raises `PatchError` where there is
    no vLLM, or no series for it."""
    installed = tree.installed()
    its_series = series.read(installed.version, patches)
    cached = overlay.find_cached(installed, its_series)
    return Status(
        installed.version,
        str(installed.root),
        {patch.slug: patch.subject for patch in its_series.patches},
        tree.file_states(installed, its_series),
        str(cached) if cached else None,
    )


def apply(directory: Path, patches: Path = PATCHES) -> Changed:
    """Put the series of its version into a vLLM tree, all of it or nothing."""
    found, its_series, states = _open(directory, patches)
    pristine = set(states.values()) == {FileState.ORIGINAL}
    if pristine and history.is_checkout(found.root):
        history.apply(found, its_series)
        return Changed(found.version, str(found.root), list(its_series.base), True)
    return Changed(found.version, str(found.root), tree.apply(found, its_series))


def revert(directory: Path, patches: Path = PATCHES) -> Changed:
    """Take the series out of a vLLM tree again, all of it or nothing."""
    found, its_series, _ = _open(directory, patches)
    if history.is_checkout(found.root) and history.revert(found, its_series):
        return Changed(found.version, str(found.root), list(its_series.base), True)
    return Changed(found.version, str(found.root), tree.revert(found, its_series))


def export(directory: Path, patches: Path = PATCHES) -> Changed:
    """Write the patches that a checkout's last commits are to the folder of the version
    it is tagged with, and the README; returns the files that changed."""
    root = directory.expanduser().resolve()
    if not history.is_checkout(root):
        raise PatchError(
            f"{root} is no git checkout: the patches are taken from commits"
        )
    exported, base = history.export(root)
    version = history.base_version(root, len(exported))
    if not os.access(patches, os.W_OK):
        raise PatchError(f"{patches.resolve()} cannot be written: export in a clone")
    folder = patches / f"v{version}"
    contents = {f"{patch.slug}.patch": patch.text for patch in exported}
    contents["series"] = "".join(f"{patch.slug}\n" for patch in exported)
    contents["BASE"] = series.format_base(version, base)
    changed = [name for name, text in contents.items() if _put(folder / name, text)]
    for path in folder.iterdir():
        if path.name not in contents:
            path.unlink()
            changed.append(path.name)
    if readme.write(patches):
        changed.append("../README.md")
    return Changed(version, str(folder.resolve()), changed)


def describe(files: dict[str, FileState]) -> str:
    """How many files are in which state, in words."""
    counts = Counter(files.values())
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def _open(directory: Path, patches: Path) -> tuple[Tree, Series, dict[str, FileState]]:
    found = tree.find(directory, patches)
    its_series = series.read(found.version, patches)
    states = tree.file_states(found, its_series)
    tree.require(found, its_series, states)
    return found, its_series, states


def _put(path: Path, text: str) -> bool:
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return True
