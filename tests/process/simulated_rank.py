"""Simulates one rank: speaks its side of the protocol, holds no model.

Run as `python -m tests.process.simulated_rank`, a process of its own, so that it can be
killed. What it does is in the engine's `engine_args`, under names that vLLM's real
ones do not have:

    fail       "prepare" | "build" | "suspend" | "resume" | "close": the rank
               `fail_rank` answers EngineFailed
    hang       the same, or "drop": the rank `fail_rank` does not answer
    until      a file: a build's "load_model" goes on when it is there (with take_s)
    take_s     how long a build, and each other command a tenth of it, takes; it says
               which phases it begins meanwhile (without it, what --take-s says)

It generates `max_tokens` pieces of text "x", one each `piece_s` seconds (both from the
sampling parameters). Checkpoints it does read, by the real rank/prefetch.py. Every
message it receives becomes a line of JSON in `--record`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket as network
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import zmq

from vllm_resident.errors import ErrorInfo
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
    EngineFailed,
    EngineMemory,
    EnginePrepared,
    EngineResumed,
    EngineSuspended,
    ExitRank,
    FromRank,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    PhaseStarted,
    PrepareEngine,
    RankGauges,
    ReadCheckpoint,
    RequestOutput,
    RequestsAccepted,
    ResumeEngine,
    StepCount,
    SuspendEngine,
    ToRankMessage,
)
from vllm_resident.rank import prefetch
from vllm_resident.transport import Decoder, encode, host_id, open_socket

GAUGES = RankGauges(1, 2, 3, 4, 5)
HEARTBEAT_S = 0.5
AWAKE = EngineMemory(device_bytes=1000)
AT_LEVEL = {1: EngineMemory(host_bytes=1000), 2: EngineMemory()}
ENGINE_ARGS = ["tensor_parallel_size", "max_model_len", "fail", "hang", "fail_rank",
               "take_s", "until"]  # fmt: skip
# What a real rank says it does, with the part of the time that it takes.
PHASES = {
    "build": {"form_world": 0.1, "tokenizer": 0.1, "load_model": 0.5, "kv_cache": 0.2,
              "lockstep": 0.1},
    "suspend": {"stop": 0.2, "free_kv_cache": 0.3, "free_weights": 0.5},
    "resume": {"read_weights": 0.6, "restore_kv_cache": 0.3, "resume": 0.1},
    "close": {"release": 1.0},
}  # fmt: skip


@dataclass
class Running:
    """A request it generates for."""

    message: AddRequest
    next_piece: float
    num_pieces: int = 0

    @property
    def piece_s(self) -> float:
        return float(self.message.sampling_params.get("piece_s", 0.0))

    @property
    def max_tokens(self) -> int:
        return int(self.message.sampling_params.get("max_tokens", 3))


@dataclass
class SimulatedRank:
    options: argparse.Namespace
    engines: dict[int, PrepareEngine] = field(default_factory=dict)
    requests: dict[int, Running] = field(default_factory=dict)
    steps: dict[str, StepCount] = field(default_factory=dict)
    # What is to be said, and when.
    later: list[tuple[float, FromRank]] = field(default_factory=list)
    # What is to be said then, or as much later as that file is late.
    gated: list[tuple[Path, float, FromRank]] = field(default_factory=list)
    # What other threads have to say: a socket is for one.
    answers: SimpleQueue[FromRank] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = open_socket(self.context, zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, b"rank-%d" % self.options.rank)
        self.decoder: Decoder[ToRankMessage] = Decoder(ToRankMessage)

    def run(self) -> None:
        hello = self.hello()
        # Who has this name already takes it back soon: be heard before that.
        self.socket.connect(self.options.endpoint)
        self.say(hello)
        next_heartbeat = 0.0
        while os.getppid() == self.options.parent:
            now = time.monotonic()
            if now >= next_heartbeat:
                next_heartbeat = now + HEARTBEAT_S
                beat = Heartbeat(
                    rank=self.options.rank,
                    incarnation=self.options.incarnation,
                    gauges=self.gauges(),
                )
                self.say(beat)
            self.open_gate(now)
            while self.later and self.later[0][0] <= now:
                self.say(self.later.pop(0)[1])
            while not self.answers.empty():
                self.say(self.answers.get())
            for running in list(self.requests.values()):
                self.generate(running, now)
            if self.socket.poll(10):
                message = self.decoder.decode(self.socket.recv_multipart())
                self.record(message)
                self.handle(message)

    def hello(self) -> Hello:
        return Hello(
            rank=self.options.rank,
            protocol_version=self.options.protocol_version,
            world_size=self.options.world_size,
            local_rank=self.options.rank,
            host=network.gethostname(),
            host_id=self.options.host_id,
            pid=os.getpid(),
            incarnation=self.options.incarnation,
            device="simulated",
            gauges=self.gauges(),
            vllm_version="none",
            torch_version="none",
            engine_arg_names=ENGINE_ARGS,
            generations=sorted(self.engines),
        )

    def gauges(self) -> RankGauges:
        return msgspec.structs.replace(
            GAUGES,
            memory_used_bytes=self.options.used_bytes,
            memory_total_bytes=self.options.total_bytes,
            num_engines=len(self.engines),
            steps=self.steps,
        )

    def say(self, message: FromRank) -> None:
        self.socket.send_multipart(encode(message))

    def record(self, message: ToRankMessage) -> None:
        if isinstance(message, HeartbeatAck):
            return
        line = {"message": type(message).__name__, **msgspec.to_builtins(message)}
        with open(self.options.record, "a") as file:
            file.write(json.dumps(line) + "\n")

    def handle(self, message: ToRankMessage) -> None:
        match message:
            case HelloAgain():
                self.say(self.hello())
            case ExitRank():
                sys.exit(int(message.failed))
            case ReadCheckpoint():
                prefetch.start(self.options.rank, message, self.answers.put)
            case AddRequest() | AbortRequest():
                self.handle_request(message)
            case _:
                self.handle_engine(message)

    def handle_engine(self, message: ToRankMessage) -> None:
        match message:
            case PrepareEngine():
                self.engines[message.generation] = message
                self.answer("prepare", message.generation)
            case BuildEngine():
                self.answer("build", message.generation)
            case SuspendEngine():
                self.answer("suspend", message.generation, message.level)
            case ResumeEngine():
                self.answer("resume", message.generation)
            case CloseEngine():
                self.answer("close", message.generation)
            case DropEngine():
                self.answer("drop", message.generation)

    def handle_request(self, message: AddRequest | AbortRequest) -> None:
        match message:
            case AddRequest():
                self.say(
                    RequestsAccepted(
                        rank=self.options.rank,
                        generation=message.generation,
                        request=message.request,
                    )
                )
                self.requests[message.request] = Running(message, time.monotonic())
            case AbortRequest():
                if running := self.requests.pop(message.request, None):
                    self.output(running, "abort")

    def answer(self, command: str, generation: int, level: int = 0) -> None:
        engine = self.engines.get(generation)
        args = engine.engine_args if engine else {}
        is_faulty = args.get("fail_rank") == self.options.rank
        if is_faulty and args.get("hang") == command:
            return
        rank = self.options.rank
        self.say(PhaseStarted(rank=rank, generation=generation, phase=command))
        if is_faulty and args.get("fail") == command:
            kind = "CommandRejected" if command == "prepare" else "RankFailure"
            error = ErrorInfo(kind, f"{command} fails, as asked", phase=command)
            self.say(EngineFailed(rank=rank, generation=generation, error=error))
            return
        if command == "prepare":
            self.say(
                EnginePrepared(
                    rank=rank, generation=generation, seconds=0.0, memory=AWAKE
                )
            )
            return
        gate = args.get("until") if command == "build" else None
        phases = self.pass_through(
            command, generation, float(args.get("take_s", self.options.take_s)), gate
        )
        did = {
            "rank": rank,
            "generation": generation,
            "phases": phases,
            "memory_before_bytes": 1,
            "memory_after_bytes": 2,
        }
        done_at = time.monotonic() + sum(phases.values())
        match command:
            case "build":
                self.say_at(done_at, EngineBuilt(**did, memory=AWAKE), gate)
            case "suspend":
                memory = AT_LEVEL[level]
                self.say_at(done_at, EngineSuspended(**did, level=level, memory=memory))
            case "resume":
                self.say_at(done_at, EngineResumed(**did, memory=AWAKE))
            case _:
                self.say_at(done_at, EngineClosed(**did))
        if command in ("close", "drop"):
            self.engines.pop(generation, None)

    def pass_through(
        self, command: str, generation: int, take_s: float, gate: str | None
    ) -> dict[str, float]:
        """Say which phases begin when, those behind "load_model" not before there is a
        file `gate`; returns how long each takes."""
        if not take_s or command not in PHASES:
            return {command: 0.0}
        whole_s = take_s if command == "build" else take_s / 10
        phases = {name: part * whole_s for name, part in PHASES[command].items()}
        began, is_behind = time.monotonic(), False
        for name, seconds in phases.items():
            started = PhaseStarted(
                rank=self.options.rank, generation=generation, phase=name
            )
            self.say_at(began, started, gate if is_behind else None)
            is_behind |= name == "load_model"
            began += seconds
        return phases

    def open_gate(self, now: float) -> None:
        if self.gated and self.gated[0][0].exists():
            late_s = max(0.0, now - self.gated[0][1])
            gated, self.gated = self.gated, []
            for _, when, message in gated:
                self.say_at(when + late_s, message)

    def say_at(self, when: float, message: FromRank, gate: str | None = None) -> None:
        if gate is not None:
            self.gated.append((Path(gate), when, message))
        elif when <= time.monotonic():
            self.say(message)
        else:
            self.later.append((when, message))
            self.later.sort(key=lambda item: item[0])

    def generate(self, running: Running, now: float) -> None:
        if now < running.next_piece:
            return
        running.next_piece = now + running.piece_s
        running.num_pieces += 1
        if engine := self.engines.get(running.message.generation):
            count = self.steps.get(engine.name, StepCount())
            self.steps[engine.name] = StepCount(
                count.num_steps + 1, count.seconds + 0.25
            )
        is_last = running.num_pieces == running.max_tokens
        if is_last:
            del self.requests[running.message.request]
        if is_last or running.message.stream:
            self.output(running, "length" if is_last else None)

    def output(self, running: Running, finish_reason: str | None) -> None:
        message = running.message
        number = 1 if message.stream else running.num_pieces
        completions = [
            Completion(prompt, 0, "x" * number, [1] * number, finish_reason)
            for prompt in range(len(message.prompts))
        ]
        self.say(
            RequestOutput(
                rank=self.options.rank,
                generation=message.generation,
                request=message.request,
                completions=completions,
                done=finish_reason is not None,
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--record", required=True)
    parser.add_argument("--incarnation", type=int, default=0)
    parser.add_argument("--protocol-version", type=int, default=PROTOCOL_VERSION)
    parser.add_argument("--host-id", default=host_id())
    parser.add_argument("--used-bytes", type=int, default=GAUGES.memory_used_bytes)
    parser.add_argument("--total-bytes", type=int, default=GAUGES.memory_total_bytes)
    parser.add_argument("--take-s", type=float, default=0.0)
    parser.add_argument("--parent", type=int, required=True)
    SimulatedRank(parser.parse_args()).run()


if __name__ == "__main__":
    main()
