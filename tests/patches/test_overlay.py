"""The overlay, in interpreters of their own, on a small tree named vllm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patches.small_tree import (
    TOUCHED,
    VERSION,
    contents,
    make_patches,
    make_tree,
)

REPO_ROOT = Path(__file__).parents[2]
_PROGRAM = """
import inspect, json, sys
from pathlib import Path
from vllm_resident import patching
from vllm_resident.errors import PatchError
{before}
try:
    done = patching.activate(Path(sys.argv[1]))
except PatchError as error:
    print(json.dumps({{"error": error.message}}))
    sys.exit()
{after}
from vllm import engine
from vllm.sub import comm
print(json.dumps({{
    "speed": engine.speed(),
    "name": engine.Engine.name,
    "groups": comm.GROUPS,
    "relative": comm.other.VALUE,
    "neighbour": engine.neighbour(),
    "file": engine.__file__,
    "source": inspect.getsource(engine.speed) + inspect.getsource(engine.Engine),
    "code_file": engine.speed.__code__.co_filename,
    "package": sys.modules["vllm"].__file__,
    "folder": str(done.folder) if done.folder else None,
    "modules": done.modules,
    "seconds": done.seconds,
    "again": patching.activate() is done,
}}))
"""


class Place:
    """A tree, its patches and a cache folder, and interpreters to import it in."""

    def __init__(self, folder: Path) -> None:
        self.root = make_tree(folder / "site-packages")
        self.patches = make_patches(folder / "patches")
        self.cache = folder / "cache"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def start(self, before: str = "", after: str = "") -> subprocess.Popen[str]:
        program = _PROGRAM.format(before=before, after=after)
        return subprocess.Popen(
            [sys.executable, "-c", program, str(self.patches)],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{self.root}:{REPO_ROOT}",
                "XDG_CACHE_HOME": str(self.cache),
                "TMPDIR": str(self.temporary),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, before: str = "", after: str = "") -> dict[str, Any]:
        return self.result(self.start(before, after))

    @staticmethod
    def result(process: subprocess.Popen[str]) -> dict[str, Any]:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        seen: dict[str, Any] = json.loads(output)
        return seen

    def overlays(self) -> list[Path]:
        """What lies in the cache folder, half-made things included."""
        return sorted((self.cache / "vllm-resident" / "overlay").iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    before = contents(made.root)
    yield made
    assert contents(made.root) == before, "the installed tree was changed"


def is_patched(seen: dict[str, Any]) -> bool:
    return (seen["speed"], seen["name"], seen["groups"]) == ("fast", "patched", {})


def test_the_patched_modules_are_imported_and_no_others(place: Place) -> None:
    seen = place.run()
    assert is_patched(seen)
    assert seen["modules"] == ["vllm.engine", "vllm.sub.comm"]
    assert seen["package"] == str(place.root / "vllm" / "__init__.py")
    assert seen["again"]


def test_sources_are_those_that_run(place: Place) -> None:
    seen = place.run()
    assert "fast" in seen["source"]
    assert "patched" in seen["source"]
    assert seen["file"] == seen["code_file"]
    assert "fast" in Path(seen["file"]).read_text()


def test_what_lies_beside_a_file_is_found_from_the_copy(place: Place) -> None:
    seen = place.run()
    assert seen["neighbour"] == "data"
    assert seen["relative"] == 1


def test_a_warm_start_takes_milliseconds_and_writes_nothing(place: Place) -> None:
    place.run()
    (overlay,) = place.overlays()
    made = (overlay / "manifest.json").stat().st_mtime_ns
    seen = [place.run() for _ in range(5)]
    assert all(map(is_patched, seen))
    assert (overlay / "manifest.json").stat().st_mtime_ns == made
    assert min(each["seconds"] for each in seen) < 0.05


def test_many_processes_at_once(place: Place) -> None:
    processes = [place.start() for _ in range(6)]
    assert all(is_patched(place.result(process)) for process in processes)
    assert len(place.overlays()) == 1


def test_what_another_process_made_meanwhile_is_not_moved(place: Place) -> None:
    """It imports from it already."""
    place.run()
    (overlay,) = place.overlays()
    before = overlay.stat().st_ino
    assert is_patched(place.run(before=_FIND_NOTHING_AT_FIRST))
    assert place.overlays() == [overlay]
    assert overlay.stat().st_ino == before


@pytest.mark.parametrize("damage", ["truncate", "edit", "manifest", "remove", "file"])
def test_a_damaged_cache_is_made_anew(place: Place, damage: str) -> None:
    place.run()
    (overlay,) = place.overlays()
    copy = overlay / TOUCHED[0]
    if damage == "truncate":
        copy.write_text(copy.read_text()[:20])
    elif damage == "edit":
        copy.write_text(copy.read_text().replace("fast", "hacked"))
    elif damage == "manifest":
        (overlay / "manifest.json").write_text('{"root": ')
    elif damage == "remove":
        copy.unlink()
    else:
        (overlay / "manifest.json").write_text("[]")
    assert is_patched(place.run())
    assert place.overlays() == [overlay]


def test_a_folder_half_written_is_not_taken_for_whole(place: Place) -> None:
    place.run()
    (overlay,) = place.overlays()
    for path in (overlay / "manifest.json", overlay / TOUCHED[1]):
        path.unlink()
    assert is_patched(place.run())


def test_a_cache_that_cannot_be_written_but_is_whole(place: Place) -> None:
    place.run()
    seen = place.run(before=_REFUSE_WRITES)
    assert is_patched(seen)
    assert seen["folder"].startswith(str(place.cache))


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_one(
    place: Place,
) -> None:
    place.cache.write_text("a file where a folder should be")
    seen = place.run()
    assert is_patched(seen)
    assert seen["folder"].startswith(str(place.temporary))
    assert (Path(seen["folder"]).parent.stat().st_mode & 0o777) == 0o700


def test_nowhere_to_write_says_what_to_do(place: Place) -> None:
    seen = place.run(before=_REFUSE_WRITES)
    assert "set XDG_CACHE_HOME or TMPDIR" in seen["error"]
    assert f"vllm-resident patch apply {place.root}" in seen["error"]


def test_another_version(place: Place) -> None:
    version = place.root / "vllm" / "_version.py"
    before = version.read_text()
    version.write_text(before.replace(VERSION, "1.2.4+cpu"))
    seen = place.run()
    version.write_text(before)
    assert "no patches for vLLM 1.2.4, only for: 1.2.3" in seen["error"]
    assert "Install one of these versions" in seen["error"]


@pytest.mark.parametrize("warm", [False, True])
def test_a_file_edited_by_hand(place: Place, warm: bool) -> None:
    if warm:
        place.run()
    path = place.root / TOUCHED[0]
    before = path.read_text()
    path.write_text(before.replace("slow", "mine"))
    seen = place.run()
    path.write_text(before)
    for part in (str(path), "Patch fast", "hunk @@ -4,3 +4,3 @@", "install"):
        assert part in seen["error"]


def test_a_broken_patch(place: Place) -> None:
    path = place.patches / f"v{VERSION}" / "groups.patch"
    path.write_text(path.read_text().replace("-GROUPS = []", "-GROUPS = ()"))
    seen = place.run()
    for part in (
        "patch groups",
        "vllm/sub/comm.py",
        "hunk @@ -2,2 +2,2 @@",
        f"restore the folder patches/v{VERSION}",
    ):
        assert part in seen["error"]


def test_vllm_imported_too_early(place: Place) -> None:
    assert "before the first import of vllm" in place.run("import vllm")["error"]


def test_a_tree_that_has_the_patches_needs_no_overlay(place: Place) -> None:
    from vllm_resident.patching import actions

    actions.apply(place.root, place.patches)
    seen = place.run()
    assert is_patched(seen)
    assert seen["folder"] is None
    assert not place.cache.exists()
    actions.revert(place.root, place.patches)


def test_a_tree_that_has_half_of_them(place: Place) -> None:
    from vllm_resident.patching import actions

    path = place.root / TOUCHED[0]
    before = path.read_text()
    actions.apply(place.root, place.patches)
    path.write_text(before)
    assert "in some of its files and not in others" in place.run()["error"]
    actions.revert(place.root, place.patches)


# Root may write anywhere, whatever the modes say; so the calls themselves refuse.
_REFUSE_WRITES = """
import os
def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied", str(args[0]))
os.mkdir = refuse
"""

_FIND_NOTHING_AT_FIRST = """
from vllm_resident.patching import overlay
look, answers = overlay._is_whole, [False]
overlay._is_whole = lambda *args: answers.pop() if answers else look(*args)
"""
