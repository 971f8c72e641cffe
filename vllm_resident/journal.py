"""The pool's log of transitions: a line of JSON for each, in the pool's folder.

The controller writes it, `vllm-resident trace` reads it. It is bounded: a full file
becomes the old one, and the old one before it goes. Losing a line harms nobody, so a
disk that is full or a folder that cannot be written never stops the pool.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vllm_resident.messages import SwitchReport

FILE_NAME = "transitions.jsonl"
OLD_SUFFIX = ".1"
MAX_BYTES = 16 * 2**20

logger = logging.getLogger("vllm_resident.controller")


class Transition(msgspec.Struct, frozen=True):
    """One line: what was done, when it began (seconds since 1970, by the controller's
    clock), and why: a command and its client, or what the pool did by itself."""

    began_unix_s: float
    pool: str
    cause: str
    report: SwitchReport


class Journal:
    """Appends to the log in `directory`; one writer, one thread."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path = directory / FILE_NAME
        self._max_bytes = max_bytes
        self._is_failing = False

    def append(self, transition: Transition) -> None:
        """Write one line. Where that fails it is lost, with one warning until the next
        that succeeds. Never raises `OSError`."""
        line = msgspec.json.encode(transition) + b"\n"
        try:
            self._rotate(len(line))
            self._write(line)
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "%s cannot be written (%s): transitions are not recorded until it "
                    "can",
                    self.path,
                    error.strerror,
                )
            self._is_failing = True
        else:
            self._is_failing = False

    def _rotate(self, num_more: int) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size and size + num_more > self._max_bytes:
            self.path.replace(old_file(self.path))

    def _write(self, line: bytes) -> None:
        # Opened each time: whoever clears the file away finds it made anew.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, line) < len(line):
                # Half a line would spoil the next one.
                os.ftruncate(fd, size)
                raise OSError(None, "no space for a whole line")
        finally:
            os.close(fd)


def old_file(path: Path) -> Path:
    """Where the log's former file is."""
    return path.with_name(path.name + OLD_SUFFIX)


def read(directory: Path) -> list[Transition]:
    """What the log in `directory` holds, oldest first; [] where there is none.

    A line that is none of ours (half of one, or of another version) is left out.
    Raises `OSError` where a file is there and cannot be read.
    """
    path = directory / FILE_NAME
    return [*_read_file(old_file(path)), *_read_file(path)]


def _read_file(path: Path) -> Iterator[Transition]:
    decoder = msgspec.json.Decoder(Transition)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
