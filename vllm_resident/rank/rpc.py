"""Where vLLM binds its unix sockets in one rank, and who takes their files away.

vLLM names them at random below `VLLM_RPC_BASE_PATH` (0.32.0, utils/network_utils.py),
by default the temporary folder, and of each world of several ranks some stay there.
Here each rank gives them a folder of its own, in the pool's. Knows nothing of what they
are for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from pathlib import Path

from vllm_resident.transport import MAX_SOCKET_PATH_BYTES

log = logging.getLogger("vllm_resident.rank")

VARIABLE = "VLLM_RPC_BASE_PATH"
# "/" and a UUID.
_NAME_BYTES = 37


class SocketFolder:
    """Of the rank `rank` of the pool whose folder is `directory`; empty at first,
    whatever an earlier process of that rank left there.

    Where vLLM was told another folder, or the paths would be too long for the kernel,
    or a living process has this one, there is none and vLLM's own choice stands.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / f"rpc{rank}"
        self._lock: int | None = None
        if VARIABLE in os.environ:
            return
        if len(os.fsencode(self._path)) + _NAME_BYTES > MAX_SOCKET_PATH_BYTES:
            self._say_why_not("a path in it would be too long")
            return
        self._path.mkdir(mode=0o700, exist_ok=True)
        # Held for the life of this process, however it ends (flock(2)).
        self._lock = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            self._say_why_not("another process has it")
            return
        self.sweep()
        os.environ[VARIABLE] = str(self._path)

    def sweep(self) -> None:
        """Take away what is in it. Only while no world is in use here."""
        if self._lock is not None:
            for path in self._path.glob("*"):
                # Nothing that an unload should fail for.
                with contextlib.suppress(OSError):
                    path.unlink()

    def remove(self) -> None:
        """At the end. May be called twice."""
        if self._lock is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _say_why_not(self, reason: str) -> None:
        log.warning(
            "event=no_socket_folder path=%s reason=%r: vLLM's sockets are in the "
            "temporary folder, and some stay there",
            self._path,
            reason,
        )
