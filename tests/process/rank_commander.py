"""Commands real ranks, as a controller would, and hears their answers.

`Ranks` starts `python -m vllm_resident.rank` once for each rank and is the other end of
their control channels: real loops, real vLLM, no controller. A thread answers their
heartbeats, whatever the test is busy with.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import zmq

from tests.members import free_port
from vllm_resident.messages import (
    AddRequest,
    BuildEngine,
    Completion,
    DropEngine,
    EngineBuilt,
    EngineClosed,
    EngineFailed,
    EnginePrepared,
    EngineResumed,
    EngineSuspended,
    ExitRank,
    FromRank,
    Heartbeat,
    HeartbeatAck,
    Hello,
    PhaseStarted,
    PrepareEngine,
    RankGauges,
    RankMessage,
    RequestOutput,
    ResumeEngine,
    SuspendEngine,
    ToRankMessage,
    Welcome,
)
from vllm_resident.transport import Decoder, encode, open_socket

REPOSITORY = Path(__file__).parents[2]
START_S = 100.0
ANSWER_S = 60.0
POOL = "commanded"

Answer = TypeVar("Answer", bound=FromRank)


class Ranks:
    """`size` ranks that do as they are told; end them with `end`."""

    def __init__(self, size: int, faults: Sequence[dict[str, Any]] = ()) -> None:
        self.size = size
        self.folder = Path(tempfile.mkdtemp(prefix="vr-"))
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = open_socket(self._context, zmq.ROUTER)
        endpoint = f"ipc://{self.folder}/control"
        self._socket.bind(endpoint)
        self._decoder: Decoder[RankMessage] = Decoder(RankMessage)
        self._answers: list[FromRank] = []
        self.gauges: dict[int, RankGauges] = {}
        self._num_heartbeats: Counter[int] = Counter()
        # Held by whoever uses the socket.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._listener = threading.Thread(target=self._listen_always, daemon=True)
        self._listener.start()
        self._generation = 0
        self.members: dict[int, list[int]] = {}
        self._request = 0
        environment = {
            **os.environ,
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "VLLM_RESIDENT_DIR": str(self.folder),
            "VLLM_RESIDENT_FAULTS": json.dumps(list(faults)),
        }
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm_resident.rank"),
                    *("--controller", endpoint, "--pool", POOL),
                ],
                cwd=REPOSITORY,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(size)
        ]
        try:
            self.expect(Hello, range(size), timeout_s=START_S)
        except AssertionError:
            self.end()
            raise
        self.tell(Welcome(session="test", pool=POOL), range(size))

    def end(self) -> None:
        # Those that have not come yet, or are gone, are killed below.
        with contextlib.suppress(zmq.ZMQError):
            self.tell(ExitRank(reason="the test is over"), range(self.size))
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._ended.set()
        self._listener.join()
        self._context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, rank: int) -> str:
        path = self.folder / POOL / "logs" / f"rank-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # ------------------------------------------------------------- the channel

    def tell(self, message: ToRankMessage, ranks: Sequence[int]) -> None:
        for rank in ranks:
            with self._lock:
                self._socket.send_multipart([b"rank-%d" % rank, *encode(message)])

    def expect(
        self,
        kind: type[Answer],
        ranks: Sequence[int],
        *,
        timeout_s: float = ANSWER_S,
        may_fail: bool = False,
        **values: Any,
    ) -> list[Answer]:
        """One message of `kind` with these values from each rank; a failure of their
        generation that nobody expects is an error."""
        deadline = time.monotonic() + timeout_s
        found: dict[int, Answer] = {}
        while len(found) < len(ranks):
            for answer in list(self._answers):
                if (
                    isinstance(answer, kind)
                    and answer.rank in ranks
                    and answer.rank not in found
                    and all(getattr(answer, name) == values[name] for name in values)
                ):
                    self._answers.remove(answer)
                    found[answer.rank] = answer
                elif isinstance(answer, EngineFailed) and (
                    answer.generation == values.get("generation")
                    and kind is not EngineFailed
                    and not may_fail
                ):
                    raise AssertionError(f"{answer}\n{self.log(answer.rank)[-3000:]}")
            if len(found) < len(ranks):
                assert time.monotonic() < deadline, (kind, values, self._answers)
                time.sleep(0.005)
        return [found[rank] for rank in ranks]

    def _listen_always(self) -> None:
        while not self._ended.wait(0.002):
            with self._lock:
                while self._socket.poll(0):
                    self._receive()

    def _receive(self) -> None:
        identity, *frames = self._socket.recv_multipart()
        message = self._decoder.decode(frames)
        if isinstance(message, Heartbeat):
            self.gauges[message.rank] = message.gauges
            self._num_heartbeats[message.rank] += 1
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([identity, *encode(HeartbeatAck())])
        elif not isinstance(message, PhaseStarted):
            self._answers.append(message)

    def settled_gauges(self) -> dict[int, RankGauges]:
        """Gauges that each rank has read after all that was asked has been done."""
        before = self._num_heartbeats.copy()
        deadline = time.monotonic() + ANSWER_S
        # The first may have been on its way already.
        while any(self._num_heartbeats[r] < before[r] + 2 for r in self.gauges):
            assert time.monotonic() < deadline, "no heartbeats"
            time.sleep(0.05)
        return dict(self.gauges)

    # ----------------------------------------------------------------- engines

    def build(self, name: str, model: str, ranks: list[int], **engine_args: Any) -> int:
        """Prepare and build; the generation."""
        self._generation += 1
        generation = self._generation
        self.members[generation] = ranks
        self.tell(
            PrepareEngine(
                generation=generation,
                name=name,
                model=model,
                engine_args=engine_args,
                ranks=ranks,
            ),
            ranks,
        )
        self.expect(EnginePrepared, ranks, generation=generation)
        self.tell(BuildEngine(generation=generation, timeout_s=ANSWER_S), ranks)
        self.expect(EngineBuilt, ranks, generation=generation)
        return generation

    def ask_suspend(self, generation: int, level: int, timeout_s: float = 30) -> None:
        self.tell(
            SuspendEngine(generation=generation, level=level, timeout_s=timeout_s),
            self.members[generation],
        )

    def suspend(self, generation: int, level: int) -> list[EngineSuspended]:
        self.ask_suspend(generation, level)
        return self.expect(
            EngineSuspended, self.members[generation], generation=generation
        )

    def ask_resume(self, generation: int) -> None:
        self.tell(
            ResumeEngine(generation=generation, timeout_s=30), self.members[generation]
        )

    def resume(self, generation: int) -> list[EngineResumed]:
        self.ask_resume(generation)
        return self.expect(
            EngineResumed, self.members[generation], generation=generation
        )

    def drop(self, generation: int) -> list[EngineClosed]:
        ranks = self.members.pop(generation)
        self.tell(DropEngine(generation=generation, reason="test", timeout_s=20), ranks)
        # A rank that is not done with something yet says that it was called off.
        closed = self.expect(EngineClosed, ranks, generation=generation, may_fail=True)
        self.forget_failures(generation)
        return closed

    def forget_failures(self, generation: int) -> None:
        """What else came of a failure that was looked at."""
        with self._lock:
            self._answers = [
                each
                for each in self._answers
                if getattr(each, "generation", None) != generation
            ]

    # ---------------------------------------------------------------- requests

    def add(
        self, generation: int, prompts: list[Any], sampling_params: dict[str, Any]
    ) -> int:
        self._request += 1
        self.tell(
            AddRequest(
                generation=generation,
                request=self._request,
                prompts=prompts,
                sampling_params=sampling_params,
                stream=False,
            ),
            self.members[generation][:1],
        )
        return self._request

    def outputs(self, generation: int, request: int) -> list[Completion]:
        """Everything of a request, once it is done."""
        completions: list[Completion] = []
        done = False
        while not done:
            (output,) = self.expect(
                RequestOutput, self.members[generation][:1], request=request
            )
            completions.extend(output.completions)
            done = output.done
        return sorted(completions, key=lambda each: each.prompt_index)

    def tokens(
        self, generation: int, prompts: list[Any], sampling_params: dict[str, Any]
    ) -> list[list[int]]:
        request = self.add(generation, prompts, sampling_params)
        return [each.token_ids for each in self.outputs(generation, request)]
