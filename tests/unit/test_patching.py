"""The patch series: reading it, applying it exactly, and saying what does not fit."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.patches.small_tree import (
    FAST,
    FILES,
    TOUCHED,
    VERSION,
    contents,
    make_patches,
    make_tree,
)
from vllm_resident.errors import PatchError
from vllm_resident.patching import actions, diff, overlay, readme, series, tree
from vllm_resident.patching.series import Patch
from vllm_resident.patching.tree import FileState


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    return make_patches(tmp_path / "patches")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "site-packages")


def test_a_series_is_read(patches: Path) -> None:
    found = series.read(VERSION, patches)
    assert series.versions(patches) == [VERSION]
    assert [patch.slug for patch in found.patches] == ["fast", "groups"]
    assert found.patches[0].subject == "be fast"
    assert found.patches[0].fields["Why"] == "it is deep inside"
    assert found.patches[1].touched == ["vllm/sub/comm.py"]
    assert sorted(found.base) == sorted(TOUCHED)


def test_a_change_anywhere_is_another_digest(patches: Path) -> None:
    before = series.read(VERSION, patches).digest
    path = patches / f"v{VERSION}" / "fast.patch"
    path.write_text(FAST.replace("What it is about", "What it is for"))
    assert series.read(VERSION, patches).digest != before


def test_a_version_without_a_series_names_those_with_one(patches: Path) -> None:
    with pytest.raises(PatchError, match=re.escape("vLLM 9.9, only for: 1.2.3")):
        series.read("9.9", patches)


def test_a_patch_that_is_missing_is_named(patches: Path) -> None:
    (patches / f"v{VERSION}" / "groups.patch").unlink()
    with pytest.raises(PatchError, match=r"groups\.patch: No such file"):
        series.read(VERSION, patches)


def test_a_base_that_is_no_list_of_hashes(patches: Path) -> None:
    path = patches / f"v{VERSION}" / "BASE"
    path.write_text(path.read_text() + "rubbish\n")
    with pytest.raises(PatchError, match="BASE: not a hash and a path: 'rubbish'"):
        series.read(VERSION, patches)


def test_a_base_of_another_version(patches: Path) -> None:
    path = patches / f"v{VERSION}" / "BASE"
    path.write_text(path.read_text().replace(VERSION, "1.2.4"))
    with pytest.raises(PatchError, match=re.escape("says 'vllm 1.2.4'")):
        series.read(VERSION, patches)


def test_forward_and_back_is_where_it_began() -> None:
    original = FILES["vllm/engine.py"]
    patch = Patch("fast", FAST)
    patched = diff.forward([patch], "vllm/engine.py", original)
    assert 'return "fast"' in patched
    assert 'name = "patched"' in patched
    assert diff.backward([patch], "vllm/engine.py", patched) == original


def test_a_file_the_patch_does_not_touch_stays() -> None:
    assert diff.forward([Patch("fast", FAST)], "vllm/x.py", "text\n") == "text\n"


@pytest.mark.parametrize(
    "shifted",
    ["\n" + FILES["vllm/engine.py"], FILES["vllm/engine.py"].replace("slow", "brisk")],
    ids=["moved by a line", "another line"],
)
def test_no_offset_and_no_fuzz(shifted: str) -> None:
    with pytest.raises(
        PatchError, match=r"patch fast does not fit vllm/engine\.py, hunk @@ -\d+,\d+"
    ):
        diff.forward([Patch("fast", FAST)], "vllm/engine.py", shifted)


def test_a_file_that_ends_too_soon() -> None:
    with pytest.raises(PatchError, match="is the end of the file"):
        diff.forward([Patch("fast", FAST)], "vllm/engine.py", "import os\n")


def test_lines_end_at_newlines_only() -> None:
    odd = FILES["vllm/engine.py"].replace("class Engine", "\f\x1c\u2028class Engine")
    patch = Patch("fast", FAST.replace("class Engine", "\f\x1c\u2028class Engine"))
    assert "patched" in diff.forward([patch], "vllm/engine.py", odd)


def test_a_hunk_cut_short_is_a_broken_patch() -> None:
    broken = FAST[: FAST.index('+    return "fast"')]
    with pytest.raises(PatchError, match=r"patch fast is broken.*Restore fast\.patch"):
        diff.forward([Patch("fast", broken)], "vllm/engine.py", "")


def test_a_patch_that_adds_a_file_is_refused() -> None:
    text = "--- /dev/null\n+++ b/vllm/new.py\n@@ -0,0 +1 @@\n+x = 1\n"
    with pytest.raises(PatchError, match=r"patch new adds.*vllm/new\.py"):
        diff.forward([Patch("new", text)], "vllm/new.py", "")


def test_lines_that_are_in_the_file_twice_are_ambiguous() -> None:
    text = FILES["vllm/engine.py"]
    patch = Patch("fast", FAST)
    assert diff.ambiguous_hunks([patch], "vllm/engine.py", text) == []
    twice = text + '\n\nclass Engine:\n    name = "plain"\n'
    assert diff.ambiguous_hunks([patch], "vllm/engine.py", twice) == [
        "fast: vllm/engine.py: hunk @@ -12,2 +12,2 @@"
    ]


@pytest.mark.parametrize("inside", ["", "vllm"])
def test_a_tree_is_found(sources: Path, inside: str, patches: Path) -> None:
    assert tree.find(sources / inside, patches) == tree.Tree(sources, VERSION)


def test_no_tree(tmp_path: Path, patches: Path) -> None:
    with pytest.raises(PatchError, match=r"holds no vLLM: give the folder"):
        tree.find(tmp_path, patches)


def test_a_checkout_never_built_is_known_by_its_files(
    sources: Path, patches: Path
) -> None:
    (sources / "vllm" / "_version.py").unlink()
    assert tree.find(sources, patches).version == VERSION
    (sources / "vllm" / "engine.py").write_text("x = 1\n")
    with pytest.raises(PatchError, match=re.escape("is none of 1.2.3")):
        tree.find(sources, patches)


def test_apply_and_revert(sources: Path, patches: Path) -> None:
    before = contents(sources)
    assert sorted(actions.apply(sources, patches).files) == sorted(TOUCHED)
    changed = {file for file, text in contents(sources).items() if text != before[file]}
    assert changed == set(TOUCHED)
    assert actions.apply(sources, patches).files == []
    assert sorted(actions.revert(sources, patches).files) == sorted(TOUCHED)
    assert contents(sources) == before
    assert actions.revert(sources, patches).files == []


def test_apply_completes_what_was_left_half_done(sources: Path, patches: Path) -> None:
    before = contents(sources)
    actions.apply(sources, patches)
    (sources / TOUCHED[0]).write_text(before[TOUCHED[0]])
    assert actions.apply(sources, patches).files == [TOUCHED[0]]
    actions.revert(sources, patches)
    assert contents(sources) == before


def test_a_file_edited_by_hand_is_refused_and_nothing_changes(
    sources: Path, patches: Path
) -> None:
    path = sources / "vllm" / "engine.py"
    path.write_text(path.read_text().replace("slow", "my own"))
    before = contents(sources)
    with pytest.raises(
        PatchError,
        match=r"engine\.py is not the file.*Patch fast does not fit.*hunk @@ -4,3"
        r".*To mend it, install",
    ) as caught:
        actions.apply(sources, patches)
    assert str(path) in caught.value.message
    assert contents(sources) == before


def test_an_edit_between_the_hunks_is_refused_too(sources: Path, patches: Path) -> None:
    path = sources / "vllm" / "engine.py"
    path.write_text(path.read_text() + "# mine\n")
    with pytest.raises(PatchError, match=r"Every hunk of fast would still fit"):
        actions.apply(sources, patches)


def test_a_failure_in_the_middle_puts_everything_back(
    sources: Path, patches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(sources)
    replace, calls = Path.replace, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(PatchError, match=r"No space left.*nothing in .* was changed"):
        actions.apply(sources, patches)
    assert contents(sources) == before


def test_the_mode_of_a_file_is_kept(sources: Path, patches: Path) -> None:
    path = sources / TOUCHED[0]
    path.chmod(0o640)
    actions.apply(sources, patches)
    assert path.stat().st_mode & 0o777 == 0o640


def test_file_states(sources: Path, patches: Path) -> None:
    found, its = tree.find(sources, patches), series.read(VERSION, patches)
    assert set(tree.file_states(found, its).values()) == {FileState.ORIGINAL}
    actions.apply(sources, patches)
    assert set(tree.file_states(found, its).values()) == {FileState.PATCHED}
    (sources / TOUCHED[0]).unlink()
    (sources / TOUCHED[1]).write_bytes(b"\xff")
    states = tree.file_states(found, its)
    assert states == {TOUCHED[0]: FileState.MISSING, TOUCHED[1]: FileState.EDITED}
    assert actions.describe(states) == "1 edited, 1 missing"


def test_the_readme_is_the_headers(patches: Path) -> None:
    assert readme.write(patches)
    assert not readme.write(patches)
    page = (patches / "README.md").read_text()
    assert "| [fast](#fast) | 1.2.3 | be fast |" in page
    assert "- **Why**: it is deep inside" in page


def test_a_cache_folder_others_could_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shared = tmp_path / f"vllm-resident-overlay-{os.getuid()}"
    home = tmp_path / "home" / ".cache" / "vllm-resident" / "overlay"
    assert list(overlay._cache_folders()) == [home, shared]
    shared.mkdir(mode=0o755)
    assert list(overlay._cache_folders()) == [home]
    shared.rmdir()
    shared.symlink_to(tmp_path)
    assert list(overlay._cache_folders()) == [home]
