"""Apply the hunks of a series to one file, exactly: no offset, no fuzz.

A hunk goes where it says and onto the lines it says, or nowhere. The series' base is
known to the byte, so anything else would be a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from unidiff.errors import UnidiffParseError
from unidiff.patch import Hunk, PatchSet

from vllm_resident.errors import PatchError
from vllm_resident.patching.series import Patch


def forward(patches: Iterable[Patch], file: str, text: str) -> str:
    """`text`, which is `file`'s, with the patches applied in order.

    Raises `PatchError` naming patch, file and hunk where one does not fit.
    """
    for patch in patches:
        text = _apply(patch, file, text, _hunks(patch, file), reverse=False)
    return text


def backward(patches: Sequence[Patch], file: str, text: str) -> str:
    """`text` with the patches taken out again, last first. Raises `PatchError`."""
    for patch in reversed(patches):
        text = _apply(patch, file, text, _hunks(patch, file), reverse=True)
    return text


def ambiguous_hunks(patches: Iterable[Patch], file: str, text: str) -> list[str]:
    """The hunks whose lines are in the file more than once: an applier that allows
    offsets could put them in the wrong place, so they need more context."""
    found: list[str] = []
    for patch in patches:
        hunks = _hunks(patch, file)
        found += [
            f"{patch.slug}: {file}: {_name(hunk)}"
            for hunk in hunks
            if text.count("".join(_side(hunk, reverse=False))) != 1
        ]
        text = _apply(patch, file, text, hunks, reverse=False)
    return found


def _hunks(patch: Patch, file: str) -> list[Hunk]:
    try:
        parsed = PatchSet.from_string(patch.text)
    except UnidiffParseError as error:
        raise PatchError(
            f"patch {patch.slug} is broken: {error}. Restore {patch.slug}.patch, or "
            f"install vllm-resident again"
        ) from error
    if odd := [each.path for each in parsed if not each.is_modified_file]:
        raise PatchError(
            f"patch {patch.slug} adds, removes or renames {odd[0]}: a series only "
            f"changes files that are there"
        )
    return [hunk for each in parsed if each.path == file for hunk in each]


def _apply(
    patch: Patch, file: str, text: str, hunks: list[Hunk], *, reverse: bool
) -> str:
    # Only "\n" ends a line for diff; `splitlines` knows ten other characters.
    lines = list(StringIO(text))
    for hunk in reversed(hunks):
        start = hunk.target_start if reverse else hunk.source_start
        old, new = _side(hunk, reverse=reverse), _side(hunk, reverse=not reverse)
        # A side without lines names the line it comes after.
        first = start - 1 if old else start
        there = lines[first : first + len(old)]
        if there != old:
            raise PatchError(_misfit(patch, file, hunk, first, old, there))
        lines[first : first + len(old)] = new
    return "".join(lines)


def _side(hunk: Hunk, *, reverse: bool) -> list[str]:
    """The lines a hunk finds, or those it leaves if `reverse`."""
    return [
        line.value
        for line in hunk
        if line.is_context or (line.is_added if reverse else line.is_removed)
    ]


def _misfit(
    patch: Patch, file: str, hunk: Hunk, first: int, old: list[str], there: list[str]
) -> str:
    at = next(
        (
            index
            for index, (wanted, found) in enumerate(zip(old, there, strict=False))
            if wanted != found
        ),
        len(there),
    )
    found = repr(there[at].rstrip()) if at < len(there) else "the end of the file"
    return (
        f"patch {patch.slug} does not fit {file}, {_name(hunk)}: line "
        f"{first + at + 1} should be {old[at].rstrip()!r} and is {found}"
    )


def _name(hunk: Hunk) -> str:
    return (
        f"hunk @@ -{hunk.source_start},{hunk.source_length} "
        f"+{hunk.target_start},{hunk.target_length} @@"
    )
