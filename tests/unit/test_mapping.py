"""Shared-memory mappings of this very process, over small real segments."""

import mmap
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_resident.rank import mapping

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm and /proc")

NUM_BYTES = 4 * mmap.PAGESIZE


class Segment:
    """A segment under /dev/shm, mapped by this process and open to be read back."""

    def __init__(self, name: str) -> None:
        self.path = Path("/dev/shm") / name
        with self.path.open("xb+") as file:
            file.truncate(NUM_BYTES)
            self.memory = mmap.mmap(file.fileno(), NUM_BYTES)
            # Another process's view, for all that mapping.py is concerned.
            self.file = os.dup(file.fileno())
        self.memory[:4] = b"mine"

    def contents(self) -> bytes:
        return os.pread(self.file, 4, 0)

    def close(self) -> None:
        self.memory.close()
        os.close(self.file)
        self.path.unlink(missing_ok=True)


@pytest.fixture
def token() -> str:
    return f"vrtest{uuid.uuid4().hex[:12]}_"


@pytest.fixture
def segments(token: str) -> Iterator[list[Segment]]:
    found = [Segment(f"{token}-tp:0-[0-1]-{number}") for number in range(2)]
    yield found
    for segment in found:
        segment.close()


@pytest.fixture
def foreign(token: str) -> Iterator[Segment]:
    segment = Segment(f"other{token.removesuffix('_')}")
    yield segment
    segment.close()


def test_segments_are_counted_by_token(token: str, segments: list[Segment]) -> None:
    assert mapping.num_shared_segments(token) == len(segments)
    assert mapping.num_shared_segments("x" + token) == 0


def test_unlinking_takes_the_name_and_leaves_the_memory(
    token: str, segments: list[Segment], foreign: Segment
) -> None:
    mapping.unlink_shared(token)
    mapping.unlink_shared(token)
    assert not any(segment.path.exists() for segment in segments)
    assert foreign.path.exists()
    assert mapping.num_shared_segments(token) == len(segments)
    segments[0].memory[:4] = b"more"
    assert segments[0].contents() == b"more"


def test_releasing_gives_the_pages_back_in_place(
    token: str, segments: list[Segment], foreign: Segment
) -> None:
    assert mapping.release_shared(token) == len(segments) * NUM_BYTES
    assert mapping.num_shared_segments(token) == 0
    assert not any(segment.path.exists() for segment in segments)
    for segment in segments:
        assert segment.memory[:4] == b"\0\0\0\0"
        segment.memory[:4] = b"late"  # as a destructor does: harmless, and private
        assert segment.contents() == b"mine"
    assert foreign.path.exists()
    assert foreign.memory[:4] == b"mine"
    foreign.memory[:4] = b"live"
    assert foreign.contents() == b"live"


def test_releasing_after_unlinking_and_twice(
    token: str, segments: list[Segment]
) -> None:
    mapping.unlink_shared(token)
    assert mapping.release_shared(token) == len(segments) * NUM_BYTES
    assert mapping.release_shared(token) == 0


def test_releasing_what_was_never_there() -> None:
    assert mapping.release_shared("vrtest-no-such-token_") == 0
