"""The series of one vLLM version, as it lies in its folder.

`series` is the order, `BASE` the version and the SHA-256 of every file touched, and
each `<slug>.patch` one commit as `git format-patch` writes it. Reading is cheap, for
every rank does it when it starts; parsing headers and diffs is left to who needs it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_resident.errors import PatchError

# A link to the repository's own folder; a wheel holds its files in its place.
PATCHES = Path(__file__).parent / "patches"

FIELDS = ("Why", "Forwarded", "Drop-When", "Test")
# Where a version has no such patch: which, and why.
ABSENT = "Absent"
_NAMES = "|".join((*FIELDS, ABSENT))
_FIELD = re.compile(rf"^({_NAMES}): *(.*(?:\n[ \t].*)*)", re.MULTILINE)
_SUBJECT = re.compile(r"^Subject: \[PATCH\] (.*(?:\n[ \t].*)*)", re.MULTILINE)
_TOUCHED = re.compile(r"^--- a/(.*)$", re.MULTILINE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Patch:
    """One patch: its name, which is also how its subject begins, and its whole text."""

    slug: str
    text: str

    @cached_property
    def subject(self) -> str:
        """What it does: the commit's subject without the slug."""
        match = _SUBJECT.search(self._head)
        subject = _unfold(match[1]) if match else ""
        return subject.removeprefix(f"{self.slug}: ")

    @cached_property
    def fields(self) -> dict[str, str]:
        """The header's fields that are there, by name, each on one line."""
        return {match[1]: _unfold(match[2]) for match in _FIELD.finditer(self._head)}

    @cached_property
    def touched(self) -> list[str]:
        """The files it changes, relative to the folder `vllm` is in."""
        return _TOUCHED.findall(self.text)

    @property
    def _head(self) -> str:
        return self.text.partition("\ndiff --git ")[0] + "\n"


@dataclass(frozen=True)
class Series:
    """The patches for one version, in order, and what they must be applied to."""

    version: str
    patches: tuple[Patch, ...]
    # SHA-256 of each file before the first patch, by path from the folder `vllm` is in.
    base: dict[str, str]
    digest: str


def versions(patches: Path = PATCHES) -> list[str]:
    """The versions there is a series for, oldest first."""
    found = [path.parent.name[1:] for path in patches.glob("v[0-9]*/series")]
    return sorted(found, key=lambda version: [int(n) for n in version.split(".")])


def read(version: str, patches: Path = PATCHES) -> Series:
    """The series for `version`. Raises `PatchError` if there is none, or if its folder
    is not whole."""
    folder = patches / f"v{version}"
    if not (folder / "series").is_file():
        known = ", ".join(versions(patches)) or "none"
        raise PatchError(
            f"there are no patches for vLLM {version}, only for: {known}. Install one "
            f"of these versions, or port the series (patches/README.md says how)"
        )
    try:
        order = (folder / "series").read_text().split()
        base_text = (folder / "BASE").read_text()
        texts = [(folder / f"{slug}.patch").read_bytes() for slug in order]
    except OSError as error:
        raise PatchError(
            f"the series for vLLM {version} is not whole: {error.filename}: "
            f"{error.strerror}. Install vllm-resident again"
        ) from error
    return Series(
        version,
        tuple(
            Patch(slug, text.decode()) for slug, text in zip(order, texts, strict=True)
        ),
        parse_base(base_text, folder / "BASE", version),
        _digest([base_text.encode(), *texts]),
    )


def parse_base(text: str, path: Path, version: str) -> dict[str, str]:
    """The hashes in a BASE file: its first line names the version, each other one is a
    SHA-256, two spaces and a path, as `sha256sum` writes it."""
    first, *rest = text.splitlines()
    base = {}
    for line in rest:
        sha, _, file = line.partition("  ")
        if not _SHA256.fullmatch(sha) or not file:
            raise PatchError(f"{path}: not a hash and a path: {line!r}")
        base[file] = sha
    if first != f"vllm {version}":
        raise PatchError(f"{path}: says {first!r}, not 'vllm {version}'")
    return base


def format_base(version: str, base: dict[str, str]) -> str:
    """A BASE file's text."""
    lines = [f"{sha}  {file}" for file, sha in sorted(base.items())]
    return "\n".join([f"vllm {version}", *lines]) + "\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(parts: Sequence[bytes]) -> str:
    return sha256("".join(sha256(part) for part in parts).encode())


def _unfold(text: str) -> str:
    return " ".join(text.split())
