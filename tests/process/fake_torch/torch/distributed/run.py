"""Stands for torchrun and its ranks: a real controller, ranks that only talk.

Found instead of torch's where this folder comes first in PYTHONPATH, so that `up` and
the client meet a whole pool in a second, on a machine without torch. Every prompt is
"completed" by its own words, one a step; the prompt "forever" never ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time

import zmq

from vllm_resident.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    AddRequest,
    BuildEngine,
    CloseEngine,
    Completion,
    DropEngine,
    EngineBuilt,
    EngineClosed,
    EngineMemory,
    EnginePrepared,
    EngineResumed,
    EngineSuspended,
    ExitRank,
    FromRank,
    Heartbeat,
    Hello,
    HelloAgain,
    PrepareEngine,
    RankGauges,
    RequestOutput,
    RequestsAccepted,
    ResumeEngine,
    SuspendEngine,
    ToRankMessage,
)
from vllm_resident.transport import (
    Decoder,
    controller_endpoint,
    encode,
    host_id,
    open_socket,
)

GAUGES = RankGauges(2**30, 2**34, 16, 4, 0)
CLOSED = {"phases": {}, "memory_before_bytes": 2, "memory_after_bytes": 1}
BUILT = {"phases": {"build": 0.1}, "memory_before_bytes": 1, "memory_after_bytes": 2}


class TalkingRank(threading.Thread):
    def __init__(self, rank: int, world_size: int, endpoint: str) -> None:
        super().__init__(daemon=True)
        self.rank, self.world_size, self.endpoint = rank, world_size, endpoint
        self.running: dict[tuple[int, int], tuple[int, list[str]]] = {}
        self.ended = False

    def run(self) -> None:
        socket = open_socket(zmq.Context.instance(), zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, f"rank-{self.rank}".encode())
        socket.connect(self.endpoint)
        decoder = Decoder[ToRankMessage](ToRankMessage)
        self.socket = socket
        self.send(self.hello())
        beat = time.monotonic()
        while not self.ended:
            if socket.poll(20):
                self.handle(decoder.decode(socket.recv_multipart()))
            self.step()
            if time.monotonic() > beat + 0.5:
                beat = time.monotonic()
                self.send(Heartbeat(rank=self.rank, incarnation=0, gauges=GAUGES))
        # Closing does not wait for what is still to be sent.
        time.sleep(0.1)

    def send(self, message: FromRank) -> None:
        self.socket.send_multipart(encode(message))

    def hello(self) -> Hello:
        return Hello(
            rank=self.rank,
            protocol_version=PROTOCOL_VERSION,
            world_size=self.world_size,
            local_rank=self.rank,
            host="here",
            host_id=host_id(),
            pid=os.getpid(),
            incarnation=0,
            device="cpu",
            gauges=GAUGES,
            vllm_version="0",
            torch_version="0",
            engine_arg_names=["model", "dtype", "tensor_parallel_size"],
            generations=[],
        )

    def handle(self, message: ToRankMessage) -> None:
        match message:
            case HelloAgain():
                self.send(self.hello())
            case PrepareEngine(generation=generation):
                self.send(
                    EnginePrepared(rank=self.rank, generation=generation, seconds=0.0)
                )
            case BuildEngine(generation=generation):
                self.send(EngineBuilt(rank=self.rank, generation=generation, **BUILT))
            case SuspendEngine() | ResumeEngine():
                self.move(message)
            case CloseEngine(generation=generation) | DropEngine(generation=generation):
                self.running = {
                    key: value
                    for key, value in self.running.items()
                    if key[0] != generation
                }
                self.send(EngineClosed(rank=self.rank, generation=generation, **CLOSED))
            case AddRequest():
                self.add(message)
            case AbortRequest(generation=generation, request=request):
                if self.running.pop((generation, request), None):
                    self.output(
                        generation, request, [Completion(0, 0, "", [], "abort")]
                    )
            case ExitRank():
                self.ended = True

    def move(self, message: SuspendEngine | ResumeEngine) -> None:
        ids = {"rank": self.rank, "generation": message.generation}
        if isinstance(message, ResumeEngine):
            memory = EngineMemory(device_bytes=2**20)
            self.send(EngineResumed(**ids, **BUILT, memory=memory))
            return
        memory = EngineMemory(host_bytes=2**20 if message.level == 1 else 0)
        self.send(EngineSuspended(**ids, **CLOSED, level=message.level, memory=memory))

    def add(self, message: AddRequest) -> None:
        ids = {"generation": message.generation, "request": message.request}
        self.send(RequestsAccepted(rank=self.rank, **ids))
        words = str(message.prompts[0]).split()
        if message.stream or words == ["forever"]:
            self.running[message.generation, message.request] = (0, words)
            return
        whole = [
            Completion(number, 0, str(prompt), [number], "stop")
            for number, prompt in enumerate(message.prompts)
        ]
        self.output(message.generation, message.request, whole)

    def step(self) -> None:
        for key, (done, words) in list(self.running.items()):
            endless = words == ["forever"]
            last = not endless and done + 1 >= len(words)
            word = words[0] if endless else words[done]
            reason = "stop" if last else None
            self.output(*key, [Completion(0, 0, word, [done], reason)], done=last)
            self.running[key] = (done + 1, words)
            if last:
                del self.running[key]

    def output(
        self,
        generation: int,
        request: int,
        completions: list[Completion],
        done: bool = True,
    ) -> None:
        self.send(
            RequestOutput(
                rank=self.rank,
                generation=generation,
                request=request,
                completions=completions,
                done=done,
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rdzv-backend")
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("--nnodes")
    parser.add_argument("--nproc-per-node", type=int)
    parser.add_argument("--max-restarts")
    parser.add_argument("--log-dir")
    parser.add_argument("-m")
    parser.add_argument("--pool")
    options = parser.parse_args()
    sys.stdout.write(f"fake torchrun {os.getpid()}\n")
    sys.stdout.flush()
    fault = os.environ.get("FAKE_TORCHRUN", "")
    if fault == "crash":
        raise RuntimeError("no such device")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    if fault == "hang":
        time.sleep(600)
    controller = ["-m", "vllm_resident.controller", "--pool", options.pool]
    subprocess.Popen(
        [sys.executable, *controller, "--owner-pid", str(os.getpid())],
        start_new_session=True,
    )
    endpoint = controller_endpoint(options.pool)
    size = options.nproc_per_node
    ranks = [TalkingRank(rank, size, endpoint) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    # The controller sees a rank of this machine gone when its process is.
    return 0


if __name__ == "__main__":
    sys.exit(main())
