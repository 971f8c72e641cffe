"""Reads a checkpoint's files into the machine's page cache, beside all else.

In threads of its own, which end with the reading: whoever steps engines goes on. They
hold the interpreter's lock only between two blocks, run on any core and give way to
others. Nothing is kept: the page cache is the kernel's. Knows nothing of engines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from vllm_resident.errors import CommandRejected, ErrorInfo, RankFailure, ResidentError
from vllm_resident.messages import CheckpointRead, ReadCheckpoint
from vllm_resident.rank.device import roam

log = logging.getLogger("vllm_resident.rank")

NUM_THREADS = 4
BLOCK_BYTES = 4 * 2**20
# Large files are read by several threads, a part each: whole blocks.
PART_BYTES = 64 * 2**20
_NICENESS = 10
# What vLLM reads only where there are no safetensors (0.32.0,
# model_executor/model_loader/default_loader.py).
_OTHER_WEIGHTS = frozenset((".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot"))

# One checkpoint at a time: two would only take the disk from each other.
_turn = threading.Lock()


def start(
    rank: int, command: ReadCheckpoint, send: Callable[[CheckpointRead], None]
) -> None:
    """Read in the background; `send`, called once from another thread, gets the answer.

    Returns at once. The thread does not keep the process from ending.
    """
    threading.Thread(
        target=lambda: send(answer(rank, command)), name="prefetch", daemon=True
    ).start()


def hint(folder: str) -> None:
    """Have the kernel begin to read a local checkpoint, which is soon to be loaded, and
    return at once; it may be thrown out again where memory is short."""
    if not Path(folder).expanduser().is_dir():
        return
    with contextlib.suppress(ResidentError, OSError):
        for file in find(folder):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def answer(rank: int, command: ReadCheckpoint) -> CheckpointRead:
    """Read the checkpoint and say how much it was, or why it cannot be read."""
    since = time.monotonic()
    num_bytes, error = 0, None
    try:
        with _turn:
            num_bytes = read(find(command.model))
    except ResidentError as refused:
        error = ErrorInfo(
            type(refused).__name__, refused.message, rank, None, "prefetch"
        )
    # Whatever it is, who asked must hear of it.
    except Exception as failure:
        log.exception("event=prefetch_failed model=%s", command.model)
        text = f"reading {command.model}: {failure}"
        error = RankFailure(text, rank=rank, phase="prefetch").to_info()
    log.info(
        "event=prefetch model=%s bytes=%d seconds=%.3f error=%r",
        command.model,
        num_bytes,
        time.monotonic() - since,
        error.message if error else "",
    )
    return CheckpointRead(
        rank=rank, read=command.read, num_bytes=num_bytes, error=error
    )


def find(model: str) -> list[Path]:
    """The files vLLM will read of a checkpoint's folder, of a single file, or of a hub
    model's snapshot in the machine's cache. Raises `CommandRejected`."""
    path = Path(model).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = _snapshot(model)
    # Of a snapshot the files are links; folders (other formats, a .git) are not read.
    files = [entry for entry in sorted(path.iterdir()) if entry.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix not in _OTHER_WEIGHTS]
    if not files:
        raise CommandRejected(f"{path} holds no files")
    return files


def _snapshot(model: str) -> Path:
    """Where the cache of hub models on this machine keeps it; downloads nothing."""
    if model.startswith((".", "/", "~")):
        raise CommandRejected(f"model folder {model} is not there")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CommandRejected(
            f"{model!r} is neither a folder nor a hub model whose files are on this "
            "machine: a prefetch reads, it does not download; load it once, or give a "
            "folder"
        ) from error


def read(files: list[Path]) -> int:
    """Read the files whole; returns their size in bytes. Blocks; takes
    `NUM_THREADS` blocks of memory, and the page cache's share.

    Raises `CommandRejected` where the machine has no memory free to keep them in, and
    `OSError`.
    """
    sizes = {file: file.stat().st_size for file in files}
    total, free = sum(sizes.values()), psutil.virtual_memory().available
    if total > free:
        raise CommandRejected(
            f"{total / 2**30:.2f} GiB of files do not fit into the {free / 2**30:.2f} "
            "GiB of memory this machine has free: what is read would be thrown out "
            "again"
        )
    parts = [
        (file, offset, min(PART_BYTES, size - offset))
        for file, size in sizes.items()
        for offset in range(0, size, PART_BYTES)
    ]
    with ThreadPoolExecutor(NUM_THREADS, "prefetch", _give_way) as pool:
        for _ in pool.map(lambda part: _read_part(*part), parts):
            pass
    return total


def _give_way() -> None:
    """Run on any core, and after everybody else who wants it."""
    roam()
    with contextlib.suppress(OSError):
        # Linux: of this thread alone (setpriority(2), notes).
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _read_part(file: Path, offset: int, size: int) -> None:
    block = bytearray(min(BLOCK_BYTES, size))
    with open(file, "rb", buffering=0) as source:
        source.seek(offset)
        while size > 0:
            count = source.readinto(memoryview(block)[: min(len(block), size)])
            if not count:
                return  # it was cut short since
            size -= count
