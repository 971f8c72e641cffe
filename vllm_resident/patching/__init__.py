"""The changes this project needs in vLLM: a short series of patches per version.

`activate` puts the series under the installed vLLM when a process starts, without
touching it; `apply`, `revert` and `export` work on a vLLM tree; `check` proves that the
patches are what they claim to be. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_resident.patching.overlay import Activation, activate

__all__ = ["FLAGS", "Activation", "activate"]

# What a process whose engines come and go sets in its environment, beside `activate`
# and before vLLM is imported: variables the series adds (patches/README.md).
FLAGS = {
    "VLLM_RESIDENT_PROCESS": "1",
    "VLLM_INSPECT_MODELS_IN_PROCESS": "1",
}
