"""A rank whose device groups go over the SIMULATED backend: CPU otherwise.

`torchrun ... -m tests.simulation.rank`, in the place of `vllm_resident.rank`: the same
process, with the platform's collective library exchanged before anything is formed.
What it costs is in `VLLM_RESIDENT_TEST_SIMULATION` (`backend.Settings`).
"""

from __future__ import annotations

import sys
from typing import Any

from vllm_resident.rank import __main__ as entry
from vllm_resident.rank import device

BACKEND = "hccl"


def main() -> int:
    run = entry._run

    def run_simulated(*arguments: Any) -> int:
        # Not earlier: the process is prepared before torch and vLLM are imported.
        from vllm.platforms import current_platform

        from tests.simulation import backend

        backend.install(BACKEND)
        current_platform.dist_backend = BACKEND
        return run(*arguments)

    device._BACKENDS["cpu"] = BACKEND
    entry._run = run_simulated
    return entry.main()


if __name__ == "__main__":
    sys.exit(main())
