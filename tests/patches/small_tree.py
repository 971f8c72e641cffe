"""A vLLM of three files and a series of two patches for it, to break in every way."""

from __future__ import annotations

from pathlib import Path

from vllm_resident.patching.series import format_base, sha256

VERSION = "1.2.3"
FILES = {
    "vllm/__init__.py": "from vllm._version import __version__\n",
    "vllm/_version.py": f"__version__ = version = '{VERSION}'\n",
    "vllm/engine.py": (
        "from pathlib import Path\n\n\n"
        "def speed():\n"
        '    return "slow"\n\n\n'
        "def neighbour():\n"
        '    return (Path(__file__).parent / "data.txt").read_text()\n\n\n'
        "class Engine:\n"
        '    name = "plain"\n'
    ),
    "vllm/data.txt": "data",
    "vllm/sub/__init__.py": "",
    "vllm/sub/comm.py": "from . import other\n\nGROUPS = []\n",
    "vllm/sub/other.py": "VALUE = 1\n",
}
HEADER = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Some One <one@example.invalid>
Date: Sun, 22 Nov 2026 09:00:00 +0000
Subject: [PATCH] {slug}: {subject}

What it is about.

Why: it is deep
 inside
Forwarded: not yet
Drop-When: upstream does it
Test: tests/patches/test_series.py::test_the_small_series_is_whole

"""
FAST = HEADER.format(slug="fast", subject="be fast") + (
    "diff --git a/vllm/engine.py b/vllm/engine.py\n"
    "--- a/vllm/engine.py\n"
    "+++ b/vllm/engine.py\n"
    "@@ -4,3 +4,3 @@ from pathlib import Path\n"
    " def speed():\n"
    '-    return "slow"\n'
    '+    return "fast"\n'
    " \n"
    "@@ -12,2 +12,2 @@ def neighbour():\n"
    " class Engine:\n"
    '-    name = "plain"\n'
    '+    name = "patched"\n'
)
GROUPS = HEADER.format(slug="groups", subject="hold the groups in a dict") + (
    "diff --git a/vllm/sub/comm.py b/vllm/sub/comm.py\n"
    "--- a/vllm/sub/comm.py\n"
    "+++ b/vllm/sub/comm.py\n"
    "@@ -2,2 +2,2 @@ from . import other\n"
    " \n"
    "-GROUPS = []\n"
    "+GROUPS = {}\n"
)
TOUCHED = ("vllm/engine.py", "vllm/sub/comm.py")


def make_tree(root: Path) -> Path:
    """The sources, as an installation has them; returns `root`."""
    for file, text in FILES.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def make_patches(folder: Path) -> Path:
    """A folder like the repository's `patches/`; returns it."""
    series = folder / f"v{VERSION}"
    series.mkdir(parents=True)
    (series / "fast.patch").write_text(FAST)
    (series / "groups.patch").write_text(GROUPS)
    (series / "series").write_text("fast\ngroups\n")
    base = {file: sha256(FILES[file].encode()) for file in TOUCHED}
    (series / "BASE").write_text(format_base(VERSION, base))
    return folder


def contents(root: Path) -> dict[str, str]:
    """Every source of the tree."""
    return {
        str(path.relative_to(root)): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
