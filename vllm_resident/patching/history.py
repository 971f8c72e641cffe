"""A series as the commits of a git checkout, in and out.

`git am` makes a commit of each patch, `git format-patch` a patch of each commit; the
way out is a function of the commits alone, so that what came in unchanged comes out
byte for byte. Only who develops patches needs this, and git.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from vllm_resident.errors import PatchError
from vllm_resident.patching.series import FIELDS, Patch, Series, sha256
from vllm_resident.patching.tree import Tree

# Base and series are known to the byte: one line of context says where a hunk belongs,
# as long as its lines are in the file once (`check` proves that).
_FORMAT = (
    "--zero-commit",
    "--no-signature",
    "--no-stat",
    "--no-numbered",
    "--full-index",
    "--unified=1",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--no-renames",
    "--diff-algorithm=myers",
    "--no-attach",
    "--no-thread",
    "--no-cover-letter",
    "--no-base",
    "--no-add-header",
    "--no-to",
    "--no-cc",
)
# Whatever the user's own settings are.
_PLAIN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
_COMMITTER = {
    "GIT_COMMITTER_NAME": "vllm-resident",
    "GIT_COMMITTER_EMAIL": "vllm-resident@localhost",
}
_VERSION_TAG = re.compile(r"v\d+(\.\d+)+")
_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*(?=: )")


def is_checkout(root: Path) -> bool:
    return (root / ".git").exists()


def apply(tree: Tree, its_series: Series) -> None:
    """Commit each patch onto the checkout's HEAD; nothing is left of a failure."""
    with tempfile.TemporaryDirectory() as folder:
        for patch in its_series.patches:
            (Path(folder) / patch.slug).write_text(patch.text, newline="")
        mails = [str(Path(folder) / patch.slug) for patch in its_series.patches]
        try:
            _git(tree.root, "am", "--quiet", "--keep-non-patch", *mails)
        except PatchError:
            # There is nothing to abort if it refused to begin.
            with contextlib.suppress(PatchError):
                _git(tree.root, "am", "--abort")
            raise


def revert(tree: Tree, its_series: Series) -> bool:
    """Drop the series' commits if they are the last ones; returns whether they were."""
    commits = _patch_commits(tree.root)
    if [slug for _, slug in commits] != [each.slug for each in its_series.patches]:
        return False
    _git(tree.root, "reset", "--quiet", "--keep", f"{commits[0][0]}^")
    return True


def export(root: Path) -> tuple[list[Patch], dict[str, str]]:
    """The patches that the checkout's last commits are, in order, and the hashes of the
    files they touch as they were before.

    A commit is a patch if its subject begins with a slug and a colon and its message
    has the header's fields. Raises `PatchError` if the last commit is none.
    """
    commits = _patch_commits(root)
    if not commits:
        raise PatchError(
            f"the last commit of {root} is not a patch: its subject must be `slug: "
            f"what it does`, its message must have {', '.join(FIELDS)}"
        )
    patches = [
        Patch(
            slug,
            _git(root, "format-patch", "--stdout", *_FORMAT, "-1", commit).decode(),
        )
        for commit, slug in commits
    ]
    touched = sorted({file for patch in patches for file in patch.touched})
    base = f"{commits[0][0]}^"
    return patches, {
        file: sha256(_git(root, "cat-file", "blob", f"{base}:{file}"))
        for file in touched
    }


def base_version(root: Path, num_patches: int) -> str:
    """The version whose tag the commit under the patches has. Raises `PatchError`."""
    tags = _git(root, "tag", "--points-at", f"HEAD~{num_patches}").decode().split()
    versions = [tag[1:] for tag in tags if _VERSION_TAG.fullmatch(tag)]
    if len(versions) != 1:
        raise PatchError(
            f"the commit of {root} that the patches stand on has no version's tag: "
            f"rebase them onto one (v0.32.0), or tag it"
        )
    return versions[0]


def round_trip(tree: Tree, its_series: Series) -> list[Patch]:
    """The patches as they come out again after `git am` in a scratch repository that
    holds the few files they touch, originals from `tree`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _git(root, "init", "--quiet")
        for file in its_series.base:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(tree.read(file))
        _git(root, "add", "--all")
        _git(root, "commit", "--quiet", "--message", f"vLLM {its_series.version}")
        apply(Tree(root, its_series.version), its_series)
        return export(root)[0]


def _patch_commits(root: Path) -> list[tuple[str, str]]:
    """(commit, slug) of the patches at the end of the history, oldest first."""
    log = _git(root, "log", "-100", "--format=%H%x00%B%x00%x00").decode()
    commits: list[tuple[str, str]] = []
    for entry in log.split("\0\0"):
        commit, _, message = entry.strip().partition("\0")
        slug = _SLUG.match(message)
        if slug is None or not all(f"\n{name}: " in message for name in FIELDS):
            break
        commits.insert(0, (commit, slug[0]))
    return commits


def _settings(root: Path) -> list[str]:
    """What must hold whatever the checkout's own settings and hooks say."""
    values = {
        "commit.gpgSign": "false",
        "core.autocrlf": "false",
        "core.hooksPath": os.devnull,
        # A container's checkout often belongs to another user; it was named on purpose.
        "safe.directory": str(root),
    }
    return [word for key, value in values.items() for word in ("-c", f"{key}={value}")]


def _git(root: Path, *arguments: str) -> bytes:
    """Run git in `root`; returns its output. Raises `PatchError` with its words."""
    environment = {**os.environ, **_PLAIN, **_COMMITTER}
    environment.setdefault("GIT_AUTHOR_NAME", _COMMITTER["GIT_COMMITTER_NAME"])
    environment.setdefault("GIT_AUTHOR_EMAIL", _COMMITTER["GIT_COMMITTER_EMAIL"])
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *_settings(root), *arguments],
            capture_output=True,
            check=False,
            env=environment,
        )
    except FileNotFoundError as error:
        raise PatchError("this needs git, which is not here: install it") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or "no reason given"
        raise PatchError(f"git {arguments[0]} in {root}: {words}")
    return done.stdout
