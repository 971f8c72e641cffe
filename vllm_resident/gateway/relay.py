"""Carries a frontend's messages to and from a leader on another machine.

vLLM's `AsyncLLM` listens without keys, so it gets unix sockets and this, beside it,
listens on TCP under the pool's key: what comes in at one side goes out at the other as
it is. Knows sockets and frames, and nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import zmq

from vllm_resident import keys, transport
from vllm_resident.keys import PoolKey

log = logging.getLogger("vllm_resident.gateway")

# What `AsyncLLM` takes for the address of its first engine (rank/frontends.py).
_IDENTITY = (0).to_bytes(2, "little")


class Relay:
    """One frontend's, with a thread of its own. `input_address` and `output_address`
    are what its leader is to be told.

    `into` and `out` are the addresses of the frontend, which need not listen yet. Close
    it once the frontend is detached; may be called twice. `on_end` is called on the
    thread if that ends before: a leader that does not read, or is not there any more.
    """

    def __init__(
        self,
        into: str,
        out: str,
        on_end: Callable[[], None],
        address: str,
        key: PoolKey,
    ) -> None:
        self._on_end = on_end
        self._context: zmq.Context[Any] = zmq.Context()
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(keys.guarded(self._context, key))
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            here, there = self._open(zmq.DEALER), self._open(zmq.DEALER)
            here.setsockopt(zmq.IDENTITY, _IDENTITY)
            here.connect(into)
            endpoint = transport.tcp_endpoint(address)
            self.input_address = transport.bind(there, endpoint, key)
            outputs, answers = self._open(zmq.PULL), self._open(zmq.PUSH)
            self.output_address = transport.bind(outputs, endpoint, key)
            answers.connect(out)
        # Given back and raised again: nobody has the relay yet.
        except BaseException:
            self._give_back()
            raise
        self._ways = {here: there, there: here, outputs: answers}
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def _open(self, kind: int) -> zmq.Socket[Any]:
        return transport.open_socket(self._context, kind)

    def close(self) -> None:
        """End the thread and give everything back."""
        if self._end < 0:
            return
        os.eventfd_write(self._end, 1)
        self._thread.join()
        self._give_back()

    def _give_back(self) -> None:
        self._guard.close()
        self._context.destroy(linger=0)
        os.close(self._end)
        self._end = -1

    def _run(self) -> None:
        was_asked_to_end = False
        try:
            was_asked_to_end = self._carry()
        except zmq.ZMQError as error:
            log.error("event=relay_ended why=%r", str(error))
        finally:
            if not was_asked_to_end:
                self._on_end()

    def _carry(self) -> bool:
        """Whether it was asked to end."""
        poller = zmq.Poller()
        poller.register(self._end, zmq.POLLIN)
        for source in self._ways:
            poller.register(source, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._end in ready:
                return True
            for source in self._ways.keys() & ready.keys():
                if not _forward(source, self._ways[source].send_multipart):
                    log.error("event=relay_ended why='its peer does not read'")
                    return False


def _forward(source: zmq.Socket[Any], send: Callable[..., Any]) -> bool:
    """Pass on one message; False if the other side has ten thousand unread."""
    frames = source.recv_multipart(copy=False)
    try:
        send(frames, zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    return True
