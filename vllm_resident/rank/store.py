"""A torch.distributed store whose waits can be called off from another thread.

c10d waits for its peers' keys inside C++, where nothing reaches it until its time-out.
A rank whose peer failed before publishing a key would sit there for minutes; through
this store it notices within milliseconds that its world was given up.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.001


class StoreCancelled(RuntimeError):
    """A wait was called off, not timed out."""


class CancellableStore(dist.Store):
    """`store` with every key under `prefix`, its waits ended by `cancel`.

    c10d calls the methods below from C++ (torch 2.13, PythonStore in
    torch/csrc/distributed/c10d/init.cpp); names and types are its. Waits poll, since
    the underlying client blocks all threads that share it while it waits.
    """

    def __init__(self, store: dist.Store, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._store = dist.PrefixStore(prefix, store)
        self._timeout_s = timeout_s
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End every wait, now and later, with `StoreCancelled`; any thread."""
        self._cancelled.set()

    def set(self, key: str, value: bytes | str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        value: bytes = self._store.get(key)
        return value

    def add(self, key: str, amount: int) -> int:
        total: int = self._store.add(key, amount)
        return total

    def check(self, keys: list[str]) -> bool:
        present: bool = self._store.check(keys)
        return present

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + timeout_s
        while not self._store.check(keys):
            if self._cancelled.wait(_POLL_S):
                raise StoreCancelled(f"waiting for {keys} was called off")
            if time.monotonic() > deadline:
                raise dist.DistStoreError(
                    f"{keys} did not appear in the store within {timeout_s:g} s"
                )

    def delete_key(self, key: str) -> bool:
        deleted: bool = self._store.delete_key(key)
        return deleted

    def num_keys(self) -> int:
        number: int = self._store.num_keys()
        return number

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        value: bytes = self._store.compare_set(key, expected, desired)
        return value

    def has_extended_api(self) -> bool:
        return False
