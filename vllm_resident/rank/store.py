"""A torch.distributed store whose waits can be called off from another thread.

c10d waits for its peers' keys inside C++, where nothing reaches it until its time-out.
A rank whose peer failed before publishing a key would sit there for minutes; through
this store it notices within milliseconds that its world was given up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

# Peers that come within milliseconds are met at once; one that takes minutes does not
# cost the launcher's store a thousand questions a second from each rank.
_FIRST_POLL_S = 0.0003
_LAST_POLL_S = 0.05
_POLL_GROWTH = 1.3
# While something else is served between two polls.
_SERVING_POLL_S = 0.005
# No key has this value.
_ABSENT = b"\xc1nothing was set\xc1"

T = TypeVar("T")


class StoreCancelled(RuntimeError):
    """A wait was called off, not timed out."""


class CancellableStore(dist.Store):
    """`store` with every key under `prefix`, its waits ended by `cancel`.

    c10d calls the methods below from C++ (torch 2.13, PythonStore in
    torch/csrc/distributed/c10d/init.cpp); names and types are its. Waits poll, since
    the underlying client blocks all threads that share it while it waits. The store
    outlives its worlds and forgets nothing by itself: `delete_written` does.
    """

    def __init__(self, store: dist.Store, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._store = dist.PrefixStore(prefix, store)
        self._timeout_s = timeout_s
        self._cancelled = threading.Event()
        self._written: set[str] = set()

    def cancel(self) -> None:
        """End every wait, now and later, with `StoreCancelled`; any thread."""
        self._cancelled.set()

    def of_one_group(self, name: str) -> CancellableStore:
        """A store for one group's keys, under this one's prefix, that can outlive it
        and is cancelled by itself."""
        return CancellableStore(self._store, f"groups/{name}", self._timeout_s)

    def pause(self, seconds: float) -> None:
        """Wait so long, for something that is not in the store; raises
        `StoreCancelled` when called off."""
        if self._cancelled.wait(seconds):
            raise StoreCancelled("what was waited for was called off")

    def delete_written(self) -> None:
        """Delete the keys written through this object; no-op for those gone already.

        For the end of a world: a peer still waiting for one of them waits in vain.
        """
        written, self._written = self._written, set()
        for key in written:
            self._store.delete_key(key)

    def set(self, key: str, value: bytes | str) -> None:
        self._written.add(key)
        self._store.set(key, value)

    def append(self, key: str, value: bytes) -> None:
        """Add to what ranks have said under one key; no answer is waited for."""
        self._written.add(key)
        self._store.append(key, value)

    def get(self, key: str) -> bytes:
        return self.wait_for(lambda: self.peek(key), key, self._timeout_s)

    def peek(self, key: str) -> bytes | None:
        """The value as of now, None if there is none. One question that is answered at
        once, where `get` of the store below first waits for the key inside C++: it may
        be deleted just then. Compared with what no key has, nothing is ever set."""
        value: bytes = self._store.compare_set(key, _ABSENT, _ABSENT)
        return None if value == _ABSENT else value

    def add(self, key: str, amount: int) -> int:
        self._written.add(key)
        total: int = self._store.add(key, amount)
        return total

    def check(self, keys: list[str]) -> bool:
        present: bool = self._store.check(keys)
        return present

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        self.wait_for(lambda: self._store.check(keys) or None, str(keys), timeout_s)

    def wait_for(
        self,
        look: Callable[[], T | None],
        what: str,
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> T:
        """What `look` finds, as soon as it is not None. It and `meanwhile` are called
        in turn, on this thread; raises `StoreCancelled` when called off and
        `DistStoreError`, which says `what` was not there, after the time-out."""
        deadline = time.monotonic() + timeout_s
        longest_s = _LAST_POLL_S if meanwhile is None else _SERVING_POLL_S
        pause_s = _FIRST_POLL_S
        while True:
            # Before the look: what came by the deadline is found, however long the
            # step before it took.
            is_last = time.monotonic() > deadline
            if (found := look()) is not None:
                return found
            if is_last:
                raise dist.DistStoreError(
                    f"{what} did not appear in the store within {timeout_s:g} s"
                )
            if meanwhile is not None:
                meanwhile()
            pause_s = min(pause_s * _POLL_GROWTH, longest_s)
            if self._cancelled.wait(pause_s):
                raise StoreCancelled(f"waiting for {what} was called off")

    def delete_key(self, key: str) -> bool:
        deleted: bool = self._store.delete_key(key)
        return deleted

    def num_keys(self) -> int:
        number: int = self._store.num_keys()
        return number

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        self._written.add(key)
        value: bytes = self._store.compare_set(key, expected, desired)
        return value

    def has_extended_api(self) -> bool:
        return False
