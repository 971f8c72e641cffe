"""The overlay: patched copies of a few files, imported in place of the installed ones.

The copies lie in a cache folder, beside links to the files' neighbours, so that code
which looks for something next to `__file__` finds it. They are made once per vLLM,
series and installation, and proven by hash at each start. Everything that may differ
from one process to the next (cache folder read-only, half written, made by two at
once) is dealt with here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from vllm_resident.errors import PatchError
from vllm_resident.patching import series
from vllm_resident.patching.series import PATCHES, Series, sha256
from vllm_resident.patching.tree import (
    FileState,
    Tree,
    file_states,
    installed,
    patched_text,
    require,
)

# Half-written folders have random names and lose their name here only when whole.
_MANIFEST = "manifest.json"
# For a process that looks and moves a folder: milliseconds.
_LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Activation:
    """What `activate` did: `folder` holds the copies, or is None where the installed
    files have the series in them (`vllm-resident patch apply`)."""

    version: str
    digest: str
    folder: Path | None
    modules: tuple[str, ...]
    seconds: float


class _Finder(MetaPathFinder):
    """Finds the patched modules, and no other, in the overlay."""

    def __init__(self, files: dict[str, tuple[Path, Path]]) -> None:
        # By module: the copy, and the folder of the installed file.
        self._files = files

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname not in self._files:
            return None
        file, folder = self._files[fullname]
        packages = [str(folder)] if file.name == "__init__.py" else None
        return spec_from_file_location(
            fullname, file, submodule_search_locations=packages
        )


_active: Activation | None = None


def activate(patches: Path = PATCHES) -> Activation:
    """Make `import vllm` in this process give the patched vLLM; call it before.

    The installed files are not touched. Costs milliseconds, the first time on a machine
    some tens. A second call returns what the first did. Children that are forked
    inherit it; an interpreter started anew must call it for itself. Raises
    `PatchError` if vLLM is missing, imported already, of a version without a series,
    or not the files the series was made for, and if no folder can take the copies.
    """
    global _active
    if _active is not None:
        return _active
    start = time.perf_counter()
    if "vllm" in sys.modules:
        raise PatchError(
            "vLLM is imported already: call vllm_resident.patching.activate() before "
            "the first import of vllm"
        )
    tree = installed()
    its_series = series.read(tree.version, patches)
    folder = _overlay(tree, its_series)
    modules: dict[str, tuple[Path, Path]] = {}
    if folder is not None:
        modules = {
            _module(file): (folder / file, (tree.root / file).parent)
            for file in its_series.base
        }
        sys.meta_path.insert(0, _Finder(modules))
    _active = Activation(
        tree.version,
        its_series.digest,
        folder,
        tuple(modules),
        time.perf_counter() - start,
    )
    return _active


def find_cached(tree: Tree, its_series: Series) -> Path | None:
    """The overlay for this installation if it lies whole in a cache folder."""
    for parent in _cache_folders():
        folder = parent / _name(tree, its_series)
        if _is_whole(folder, tree, its_series):
            return folder
    return None


def _overlay(tree: Tree, its_series: Series) -> Path | None:
    """The folder with the patched copies, made if need be; None where the installed
    files are patched themselves."""
    if not _is_original(tree, its_series):
        states = file_states(tree, its_series)
        require(tree, its_series, states)
        if set(states.values()) == {FileState.PATCHED}:
            return None
        raise PatchError(
            f"{tree.root} has the patches in some of its files and not in others: "
            f"`vllm-resident patch apply {tree.root}` completes it, with --revert it "
            f"is as it was"
        )
    return find_cached(tree, its_series) or _make(tree, its_series)


def _is_original(tree: Tree, its_series: Series) -> bool:
    try:
        return all(
            sha256(tree.read(file)) == wanted
            for file, wanted in its_series.base.items()
        )
    except FileNotFoundError:
        return False


def _is_whole(folder: Path, tree: Tree, its_series: Series) -> bool:
    """Whether the manifest is of this overlay and every copy is as it says."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        return bool(
            manifest["root"] == str(tree.root)
            and manifest["series"] == its_series.digest
            and manifest["files"].keys() == its_series.base.keys()
            and all(
                sha256((folder / file).read_bytes()) == wanted
                for file, wanted in manifest["files"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(tree: Tree, its_series: Series) -> Path:
    """Make the overlay in the first cache folder that takes it."""
    contents = {
        file: patched_text(its_series, file, tree.read(file))
        for file in its_series.base
    }
    refused = []
    for parent in _cache_folders():
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if parent == _shared_folder() and not _is_private(parent):
                raise PermissionError(errno.EPERM, "another user was here first")
            return _write(parent, tree, its_series, contents)
        except OSError as error:
            refused.append(f"{parent}: {error.strerror}")
    raise PatchError(
        f"no folder takes the patched copies of vLLM ({'; '.join(refused)}): set "
        f"XDG_CACHE_HOME or TMPDIR to one that can be written, or put the patches into "
        f"vLLM itself: vllm-resident patch apply {tree.root}"
    )


def _write(
    parent: Path, tree: Tree, its_series: Series, contents: dict[str, bytes]
) -> Path:
    """Write the overlay under a name of its own and move it to its place."""
    folder = parent / _name(tree, its_series)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
    try:
        for file, content in contents.items():
            (fresh / file).parent.mkdir(parents=True, exist_ok=True)
            (fresh / file).write_bytes(content)
        for directory in {
            each for file in contents for each in Path(file).parents[:-1]
        }:
            _link_neighbours(tree.root / directory, fresh / directory)
        manifest = {
            "root": str(tree.root),
            "series": its_series.digest,
            "files": {file: sha256(content) for file, content in contents.items()},
        }
        (fresh / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        with _alone_in(parent):
            # Another process may have put its own there meanwhile, and import from it.
            if not _is_whole(folder, tree, its_series):
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(tempfile.mkdtemp(prefix=".old-", dir=parent))
                fresh.rename(folder)
        if not _is_whole(folder, tree, its_series):
            raise OSError(errno.EIO, "what is written there does not stay")
        return folder
    finally:
        for rest in (fresh, *parent.glob(".old-*")):
            shutil.rmtree(rest, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """While one process looks and moves, the others wait; the lock ends with it."""
    lock = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def _link_neighbours(source: Path, copies: Path) -> None:
    """Link what else lies in `source`, for code that looks beside its own file."""
    for path in source.iterdir():
        if path.name != "__pycache__" and not (copies / path.name).exists():
            (copies / path.name).symlink_to(path)


def _cache_folders() -> Iterator[Path]:
    """Where overlays may lie, the best first."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the specification: ignore a relative one
        home = os.path.expanduser("~/.cache")
    if os.path.isabs(home):
        yield Path(home) / "vllm-resident" / "overlay"
    if _is_private(_shared_folder()):
        yield _shared_folder()


def _shared_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm-resident-overlay-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Whether a folder in a place others can write to is ours alone, or not there:
    what lies in it will be run."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return True
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.getuid()
        and not status.st_mode & 0o077
    )


def _name(tree: Tree, its_series: Series) -> str:
    where = sha256(str(tree.root).encode())
    return f"{its_series.version}-{its_series.digest[:16]}-{where[:8]}"


def _module(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
