"""The environment's settings of torch's allocators that sleep mode has to do with.

Read from variables alone, before torch is imported; by ranks and by the doctor.
"""

from __future__ import annotations

from collections.abc import Mapping

# torch's own order of precedence (2.13); torch_npu's is its own.
VARIABLES = {
    "cuda": ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    "npu": ("PYTORCH_NPU_ALLOC_CONF",),
}


def expandable_segments(device_type: str, environ: Mapping[str, str]) -> str:
    """The variable that turns on expandable segments for this device type; empty where
    they are off."""
    for name in VARIABLES.get(device_type, ()):
        if settings := environ.get(name):
            options = {}
            for option in settings.split(","):
                key, _, value = option.partition(":")
                options[key.strip()] = value.strip().lower()
            on = options.get("expandable_segments") in ("true", "1")
            return name if on else ""
    return ""
