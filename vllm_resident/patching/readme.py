"""patches/README.md, made from the headers of the patches.

What each patch is for is written once, in the patch; the page is a view of it.
"""

from __future__ import annotations

from pathlib import Path

from vllm_resident.patching import series
from vllm_resident.patching.series import PATCHES, Patch

_HEAD = """\
<!-- Made by `vllm-resident patch check --fix` from the patches' headers. -->
# Patches

What vllm-resident changes in vLLM, as one short series of small patches per version,
each fit to be sent upstream. Without its flags set, a patched vLLM behaves as it always
did.

The installed vLLM is never modified: ranks import patched copies of the few files
touched (`vllm_resident/patching/overlay.py`). The same files also apply to a checkout:

    vllm-resident patch status            what this machine has
    vllm-resident patch apply DIR         a checkout (as commits) or an installation
    vllm-resident patch apply --revert DIR
    vllm-resident patch export DIR        the patches again, from a checkout's commits
    vllm-resident patch check             that all of this page is true

"""
_TAIL = """\
## A folder

- `series`: the patches in order, one name a line.
- `BASE`: the version, and the SHA-256 of every file touched as that version has it. The
  overlay takes no other file, so hunks apply exactly where they say or not at all.
- `<slug>.patch`: a commit as `git format-patch` writes it. The subject begins with the
  slug; the message ends with the fields **Why** (it cannot live outside vLLM),
  **Forwarded** (where upstream knows of it), **Drop-When** and **Test**, and says under
  **Absent** which version needs no such patch, and why.

## To change a patch, or port the series to another version

1. In a vLLM checkout at the version's tag: `vllm-resident patch apply .` makes a commit
   of each patch. For a version without a series, `git am` the nearest one's files.
2. Amend, add or rebase the commits, each with the fields above in its message.
3. `vllm-resident patch export .` writes them, `series` and `BASE` to the folder of the
   version that the checkout is tagged with.
4. `vllm-resident patch check --sources .` on the pristine tag, then the tests named in
   the headers.

"""


def text(patches: Path = PATCHES) -> str:
    """The whole page. Raises `PatchError` if a series cannot be read."""
    parts = [_HEAD]
    # In the newest series' order.
    newest: dict[str, Patch] = {}
    holders: dict[str, list[str]] = {}
    for version in reversed(series.versions(patches)):
        for patch in series.read(version, patches).patches:
            newest.setdefault(patch.slug, patch)
            holders.setdefault(patch.slug, []).insert(0, version)
    parts.append("| patch | for vLLM | what it does |\n| --- | --- | --- |\n")
    parts += [
        f"| [{slug}](#{slug}) | {', '.join(holders[slug])} | {patch.subject} |\n"
        for slug, patch in newest.items()
    ]
    parts.append("\n")
    for slug, patch in newest.items():
        parts.append(f"## {slug}\n\n")
        parts += [f"- **{name}**: {value}\n" for name, value in patch.fields.items()]
        files = ", ".join(f"`{file}`" for file in patch.touched)
        parts.append(f"- **Files**: {files}\n\n")
    return "".join([*parts, _TAIL]).rstrip() + "\n"


def write(patches: Path = PATCHES) -> bool:
    """Bring the page up to date; returns whether it was not."""
    path, wanted = patches / "README.md", text(patches)
    if path.is_file() and path.read_text() == wanted:
        return False
    path.write_text(wanted)
    return True
