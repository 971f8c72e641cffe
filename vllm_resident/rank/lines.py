"""The lines that step plans go over: one socket from a leader to each follower.

Unix sockets in the pool's folder, or TCP under the pool's key where the engine's ranks
are on several machines. Leader and follower find each other through the world's store.
Knows nothing of plans.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import zmq

from vllm_resident import keys, transport
from vllm_resident.errors import RankTimeout
from vllm_resident.keys import PoolKey
from vllm_resident.rank.world import Store

# For a message that was sent already.
CONNECT_TIMEOUT_S = 20.0
# A closed line still sends what the follower has not read yet: the stop plan.
STOP_LINGER_S = 10.0


class Lines:
    """Makes the lines of the engines of this rank, in `context`. Main thread only.

    `directory` is the pool's folder. `controller` is the endpoint of the controller:
    the address by which it sees this machine is the one other machines get.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        directory: Path,
        controller: str = "",
        key: PoolKey | None = None,
    ) -> None:
        self.context = context
        self.key = key
        self._directory = directory
        self._controller = controller
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(keys.guarded(context, key))

    def close(self) -> None:
        """What the context has besides sockets. May be called twice."""
        self._guard.close()

    def lead(
        self,
        generation: int,
        store: Store,
        num_followers: int,
        *,
        spans_machines: bool = False,
    ) -> list[zmq.Socket[bytes]]:
        """One connected socket per follower; blocks until each has said it is there.

        A socket each, not a broadcast: PUB drops for a slow peer, and a lost plan would
        stop the engine.
        """
        sockets: list[zmq.Socket[bytes]] = []
        paths = [
            self._directory / f"plan-{generation}-{follower}.sock"
            for follower in range(1, num_followers + 1)
        ]
        try:
            for follower, path in enumerate(paths, start=1):
                socket = transport.open_socket(self.context, zmq.PAIR)
                sockets.append(socket)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.setsockopt(zmq.LINGER, int(STOP_LINGER_S * 1000))
                endpoint = self._endpoint(path, spans_machines=spans_machines)
                there = transport.bind(socket, endpoint, self.key)
                store.set(f"plan/{follower}", there)
            _await_followers(sockets, generation, store)
        # Cleaned up and raised again, Ctrl-C too: nobody else knows of the sockets.
        except BaseException:
            for socket in sockets:
                socket.close()
            raise
        finally:
            # Their one peer is connected or never will be; libzmq leaves the files.
            for path in paths:
                path.unlink(missing_ok=True)
        return sockets

    def follow(self, rank: int, store: Store) -> zmq.Socket[bytes]:
        """The socket this follower takes its plans from; blocks on the store's
        time-out."""
        endpoint = store.get(f"plan/{rank}").decode()
        socket = transport.open_socket(self.context, zmq.PAIR)
        socket.setsockopt(zmq.RCVHWM, 0)
        transport.connect(socket, endpoint, self.key)
        socket.send(b"here")
        store.set(f"plan/{rank}/sent", b"1")
        return socket

    def _endpoint(self, path: Path, *, spans_machines: bool) -> str:
        if not spans_machines:
            return transport.unix_endpoint(path)
        # A controller that ranks of several machines have joined is at tcp://.
        return transport.tcp_endpoint(transport.own_address(self._controller))


def _await_followers(
    sockets: list[zmq.Socket[bytes]], generation: int, store: Store
) -> None:
    """The store's wait can be called off, a socket's cannot: first one, then the
    other, for a message that was sent already."""
    store.wait([f"plan/{follower}/sent" for follower in range(1, len(sockets) + 1)])
    for follower, socket in enumerate(sockets, start=1):
        if not socket.poll(int(CONNECT_TIMEOUT_S * 1000)):
            raise RankTimeout(
                f"follower {follower} of generation {generation} did not connect to "
                f"its leader within {CONNECT_TIMEOUT_S:g} s",
                generation=generation,
            )
        socket.recv()
