"""What is remembered of a checkpoint's files between two loads, and when to forget it.

vLLM caches configuration and tokenizers by the checkpoint's name, for as long as the
process lives, which is what makes a second load quick. In a process that outlives its
engines, somebody may write the folder anew in between. Knows nothing of engines.
"""

from __future__ import annotations

import os
import sys
from functools import _lru_cache_wrapper
from pathlib import Path

# In the order in which vLLM looks for them.
_FORMATS = (".safetensors", ".bin", ".pt", ".pth")
_WEIGHTS = frozenset(_FORMATS)
# Modules of vLLM whose caches hold what was read from a checkpoint (0.32.0).
_READERS = ("vllm.transformers_utils",)
_TOKENIZERS = ("vllm.tokenizers", "vllm.renderers")

# (size, modification time in ns) by file name, of each folder when last looked at.
Files = dict[str, tuple[int, int]]
_known: dict[str, Files] = {}


def forget_if_changed(folder: str) -> None:
    """Empty vLLM's caches if files of a local checkpoint changed since the last call.

    New weights alone leave the tokenizers, which are slow to make. For the name of a
    model on a hub, whose revisions do not change, this does nothing.
    """
    files = _files(folder)
    known = _known.setdefault(folder, files)
    changed = {name for name, _ in files.items() ^ known.items()}
    if not changed:
        return
    _known[folder] = files
    _clear_caches(_READERS)
    if any(Path(name).suffix not in _WEIGHTS for name in changed):
        _clear_caches(_TOKENIZERS)


def num_weight_bytes(folder: str) -> int:
    """The size of a local checkpoint's weights; 0 for the name of a model on a hub.
    Where the same weights are there in several formats, vLLM reads one: safetensors."""
    sizes: dict[str, int] = {}
    for name, (num_bytes, _) in _files(folder).items():
        # Weights in a folder below are another form of the same.
        if os.path.dirname(name) == "":
            suffix = Path(name).suffix
            sizes[suffix] = sizes.get(suffix, 0) + num_bytes
    return next((sizes[suffix] for suffix in _FORMATS if suffix in sizes), 0)


def _files(folder: str) -> Files:
    files: Files = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            status = os.stat(path)
            files[os.path.relpath(path, folder)] = status.st_size, status.st_mtime_ns
    return files


def _clear_caches(packages: tuple[str, ...]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(packages):
            for value in list(vars(module).values()):
                if isinstance(value, _lru_cache_wrapper):
                    value.cache_clear()
