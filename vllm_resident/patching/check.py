"""Prove that the patches are what they claim to be.

Without vLLM's sources: series and folder agree, headers are whole, BASE names what is
touched, the README's table is current. With the sources of a version: they are the ones
of BASE, every hunk goes exactly where it says and nowhere else, the results compile,
and the series comes back from git byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_resident.errors import PatchError
from vllm_resident.patching import diff, history, readme, series
from vllm_resident.patching.series import ABSENT, FIELDS, PATCHES, Patch, Series
from vllm_resident.patching.tree import (
    FileState,
    Tree,
    file_states,
    patched_text,
    require,
)

_MAX_SUBJECT = 72


@dataclass(frozen=True)
class Verdict:
    """What was found about the series of one version, or about the README (version "").

    `sources` is the tree it was applied to, None if there was none; `problems` are
    sentences, none if all is well.
    """

    version: str
    num_patches: int
    sources: str | None
    problems: list[str]


def check(trees: Iterable[Tree] = (), patches: Path = PATCHES) -> list[Verdict]:
    """Check every series, with the sources of its version if they are in `trees`."""
    by_version = {tree.version: tree for tree in trees}
    verdicts = []
    for version in series.versions(patches):
        tree = by_version.get(version)
        try:
            its_series = series.read(version, patches)
            problems = [
                *_folder(patches, its_series),
                *_headers(patches, its_series),
                *_absences(patches, its_series),
            ]
            if tree is not None:
                problems += _against(tree, its_series)
            num_patches = len(its_series.patches)
        except PatchError as error:
            problems, num_patches = [error.message], 0
        where = str(tree.root) if tree is not None else None
        verdicts.append(Verdict(version, num_patches, where, problems))
    return [*verdicts, _readme(patches)]


def _folder(patches: Path, its_series: Series) -> list[str]:
    """The folder holds what `series` names, and BASE what the patches touch."""
    folder = patches / f"v{its_series.version}"
    named = {f"{patch.slug}.patch" for patch in its_series.patches}
    problems = [
        f"{path} is not in {folder / 'series'}: add it there, or remove it"
        for path in sorted(folder.glob("*.patch"))
        if path.name not in named
    ]
    if len(named) != len(its_series.patches):
        problems.append(f"{folder / 'series'} names a patch twice")
    touched = {file for patch in its_series.patches for file in patch.touched}
    if differ := touched ^ its_series.base.keys():
        problems.append(
            f"{folder / 'BASE'} and the patches disagree about "
            f"{', '.join(sorted(differ))}: export the series again"
        )
    return problems


def _headers(patches: Path, its_series: Series) -> list[str]:
    problems = []
    for patch in its_series.patches:
        where = f"v{its_series.version}/{patch.slug}.patch"
        missing = [field for field in FIELDS if not patch.fields.get(field)]
        if missing:
            problems.append(f"{where} has no {', '.join(missing)} in its header")
        if not patch.subject or f"] {patch.slug}: " not in patch.text:
            problems.append(f"the subject of {where} does not begin '{patch.slug}: '")
        if len(f"{patch.slug}: {patch.subject}") > _MAX_SUBJECT:
            problems.append(
                f"the subject of {where} has more than {_MAX_SUBJECT} characters"
            )
        problems += _named_test(patches, where, patch)
    return problems


def _absences(patches: Path, its_series: Series) -> list[str]:
    """What the patches of this series say of the versions that lack them is so, and is
    said of each."""
    problems = []
    for patch in its_series.patches:
        absent = patch.fields.get(ABSENT, "")
        for version in series.versions(patches):
            there = (patches / f"v{version}" / f"{patch.slug}.patch").is_file()
            if there == (version in absent):
                problems.append(
                    f"v{its_series.version}/{patch.slug}.patch says it is absent from "
                    f"{version}, where it is"
                    if there
                    else f"v{its_series.version}/{patch.slug}.patch does not say why "
                    f"{version} has none ({ABSENT}: {version}, ...)"
                )
    return problems


def _named_test(patches: Path, where: str, patch: Patch) -> list[str]:
    """The test in a header is there, where the tests are (not in a wheel)."""
    path, _, name = patch.fields.get("Test", "").partition("::")
    root = patches.resolve().parent
    if not path or not (root / "tests").is_dir():
        return []
    file = root / path
    if not file.is_file() or f"def {name}(" not in file.read_text():
        return [f"the Test of {where}, {path}::{name}, is not there"]
    return []


def _against(tree: Tree, its_series: Series) -> list[str]:
    states = file_states(tree, its_series)
    try:
        require(tree, its_series, states)
        if FileState.PATCHED in states.values():
            return [f"{tree.root} has patches in it: check against a pristine tree"]
        return [
            *_results(tree, its_series),
            *_round_trip(tree, its_series),
        ]
    except PatchError as error:
        return [error.message]


def _results(tree: Tree, its_series: Series) -> list[str]:
    """Every hunk has one place only, and what comes out is Python."""
    problems = []
    for file in its_series.base:
        original = tree.read(file)
        problems += [
            f"{hunk} is in the file more than once: give it more context"
            for hunk in diff.ambiguous_hunks(
                its_series.patches, file, original.decode()
            )
        ]
        try:
            compile(patched_text(its_series, file, original), file, "exec")
        except SyntaxError as error:
            problems.append(f"{file} as patched is no Python: {error}")
    return problems


def _round_trip(tree: Tree, its_series: Series) -> list[str]:
    back = {patch.slug: patch for patch in history.round_trip(tree, its_series)}
    return [
        f"{patch.slug}.patch comes back from git different: export the series again"
        for patch in its_series.patches
        if back.get(patch.slug) != patch
    ]


def _readme(patches: Path) -> Verdict:
    path = patches / "README.md"
    problems = []
    try:
        if not path.is_file() or path.read_text() != readme.text(patches):
            problems = [f"{path} is not current: vllm-resident patch check --fix"]
    except PatchError as error:
        problems = [error.message]
    return Verdict("", 0, None, problems)
