"""The frontends of one engine, on its leader: vLLM's engine-core protocol, spoken.

A frontend is an `AsyncLLM` in another process. It sends what it would send an engine
core of its own (vllm 0.32.0, v1/engine/core_client.py): requests, aborts, utility
calls. They enter the leader's plan, so that followers see them at the same step; the
outputs go to whom they are of. Nothing that a frontend sends may fail the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
from vllm.lora.request import LoRARequest
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.engine.core import EngineCore
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from vllm_resident.errors import CommandRejected, ProtocolError
from vllm_resident.keys import PoolKey
from vllm_resident.rank.lockstep import SHARED_UTILITIES, Leader, adapter_of
from vllm_resident.rank.versions import ready_response
from vllm_resident.transport import connect, open_socket

log = logging.getLogger("vllm_resident.rank")

# What one frontend may have done in one round, before the engine steps again.
MESSAGES_PER_ROUND = 64
# Requests of one frontend that wait for a sleeping engine; the next are aborted.
MAX_HELD = 1024
# Calls that change nothing: answered by the leader, at once, also in its sleep.
READING_UTILITIES = frozenset(
    {"get_supported_tasks", "is_sleeping", "is_scheduler_paused", "get_weight_version"}
)
# A count that changes all the time is told so often.
REPORT_INTERVAL_S = 0.5
# A closed frontend still gets what was sent: how its requests ended.
LINGER_MS = 1000
# What `AsyncLLM` takes for the address of its first engine.
IDENTITY = (0).to_bytes(2, "little")


@dataclass
class _Frontend:
    """One frontend: its sockets, and its requests by vLLM's ids."""

    number: int
    input: zmq.Socket[bytes]
    output: zmq.Socket[bytes]
    running: set[str] = field(default_factory=set)
    # What came while the engine slept, in order; admitted when it is awake.
    held: dict[str, EngineCoreRequest] = field(default_factory=dict)
    num_bad_frames: int = 0


class Frontends:
    """All frontends of one engine on its leader. Main thread only.

    Each has a client index of its own, its number, which is never 0: that is the pool
    itself. `on_count` hears how many requests there are, at once when it changes from
    or to 0. Sockets are registered with `poller`, so that a rank at rest sleeps. Over
    TCP a frontend must hold the pool's `key`, if it has one. `adapters` are the LoRA
    adapters that the engine was loaded with, paths by name: a frontend may have these
    read and no other file.
    """

    def __init__(
        self,
        core: EngineCore,
        leader: Leader,
        context: zmq.Context[Any],
        poller: zmq.Poller,
        on_count: Callable[[int], None],
        adapters: Mapping[str, str] | None = None,
        key: PoolKey | None = None,
    ) -> None:
        self._core = core
        self._leader = leader
        self._context = context
        self._poller = poller
        self._on_count = on_count
        self._key = key
        # With the number that vLLM's server gives each (0.32.0, init_static_loras).
        self._adapters = {
            name: (path, number)
            for number, (name, path) in enumerate((adapters or {}).items(), 1)
        }
        self._frontends: dict[int, _Frontend] = {}
        self._encoder = MsgpackEncoder()
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._ids = MsgpackDecoder(list[str])
        self._anything = MsgpackDecoder()
        self._reported = 0
        self._reported_at = 0.0

    @property
    def num_requests(self) -> int:
        """Running, or held until the engine is awake."""
        return sum(len(f.running) + len(f.held) for f in self._frontends.values())

    def connect(self, number: int, input_address: str, output_address: str) -> None:
        """Connect to a frontend and tell it that the engine is ready.

        It need not listen yet: what is sent waits for it. Raises `CommandRejected`
        where an address is none, or the number is taken.
        """
        if number < 1 or number in self._frontends:
            raise CommandRejected(f"frontend number {number} is taken")
        receiving = open_socket(self._context, zmq.DEALER)
        sending = open_socket(self._context, zmq.PUSH)
        try:
            receiving.setsockopt(zmq.IDENTITY, IDENTITY)
            sending.setsockopt(zmq.LINGER, LINGER_MS)
            connect(receiving, input_address, self._key)
            connect(sending, output_address, self._key)
            receiving.send(self._ready())
        except zmq.ZMQError as error:
            receiving.close()
            sending.close(linger=0)
            raise CommandRejected(
                f"cannot connect to {input_address} and {output_address}: {error}"
            ) from error
        self._frontends[number] = _Frontend(number, receiving, sending)
        self._poller.register(receiving, zmq.POLLIN)

    def disconnect(self, number: int) -> None:
        """Forget a frontend; its requests are aborted on every rank. No-op if there is
        none of that number."""
        if (frontend := self._frontends.pop(number, None)) is None:
            return
        self._leader.abort_requests(sorted(frontend.running))
        self._close(frontend)
        self._report()

    def close(self) -> None:
        """Tell every frontend that its requests failed, and forget them all."""
        self.end_requests(FinishReason.ERROR, tell_leader=False)
        for frontend in self._frontends.values():
            self._close(frontend)
        self._frontends.clear()

    def end_requests(self, reason: FinishReason, *, tell_leader: bool = True) -> None:
        """End all that runs; what is held goes on waiting. Each frontend gets an
        output with that reason for each of its requests."""
        for frontend in list(self._frontends.values()):
            ended = sorted(frontend.running)
            frontend.running.clear()
            if not ended:
                continue
            if tell_leader:
                self._leader.abort_requests(ended)
            self._finish(frontend, ended, reason)
        self._report()

    def admit_held(self) -> None:
        """The engine is awake: take in what came while it slept."""
        for frontend in self._frontends.values():
            held, frontend.held = frontend.held, {}
            for request in held.values():
                self._admit(frontend, request)

    def receive(self, *, hold: bool) -> bool:
        """Take what the frontends have sent, a bounded part of it, without waiting;
        True if there was anything. `hold`: the engine cannot take requests now."""
        was_busy = False
        for frontend in list(self._frontends.values()):
            for _ in range(MESSAGES_PER_ROUND):
                if frontend.number not in self._frontends:
                    break  # it did not read what it was answered
                try:
                    frames = frontend.input.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                was_busy = True
                self._take(frontend, frames, hold=hold)
        if was_busy:
            self._report()
        return was_busy

    def send_outputs(self) -> None:
        """Send each frontend what the leader's last steps brought for it."""
        others = self._leader.take_others()
        for number, outputs in others:
            # One that is gone may still be among a step's clients.
            if (frontend := self._frontends.get(number)) is not None:
                for output in outputs.outputs:
                    if output.finished:
                        frontend.running.discard(output.request_id)
                self._send(frontend, outputs)
        if others:
            self._report()

    # ------------------------------------------------------------ what comes in

    def _take(self, frontend: _Frontend, frames: list[bytes], *, hold: bool) -> None:
        try:
            kind, *payload = frames
            if kind == EngineCoreRequestType.ADD.value:
                self._add(frontend, self._requests.decode(payload), hold=hold)
            elif kind == EngineCoreRequestType.ABORT.value:
                self._abort(frontend, self._ids.decode(payload))
            elif kind == EngineCoreRequestType.UTILITY.value:
                self._call(frontend, self._anything.decode(payload), hold=hold)
            else:
                raise ProtocolError(f"a message of kind {kind[:8]!r}")
        # Decoding makes tensors and vLLM's objects of what came, and raises whatever
        # those do: the frame is at fault, not the engine.
        except Exception as error:  # noqa: BLE001
            frontend.num_bad_frames += 1
            log.error(
                "event=bad_frame frontend=%d number=%d error=%r",
                frontend.number, frontend.num_bad_frames, error,
            )  # fmt: skip
            self._answer_bad(frontend, frames, str(error))

    def _answer_bad(self, frontend: _Frontend, frames: list[bytes], why: str) -> None:
        """Who sent a request or a call that cannot be read hears so, where at least its
        name can be."""
        with suppress(msgspec.DecodeError, IndexError, TypeError, KeyError):
            name = msgspec.msgpack.decode(frames[1])
            if frames[0] == EngineCoreRequestType.ADD.value and isinstance(
                name[0], str
            ):
                self._finish(frontend, [name[0]], FinishReason.ERROR, why)
            elif frames[0] == EngineCoreRequestType.UTILITY.value and isinstance(
                name[1], int
            ):
                self._answer(frontend, UtilityOutput(name[1], failure_message=why))

    def _add(
        self, frontend: _Frontend, request: EngineCoreRequest, *, hold: bool
    ) -> None:
        name = request.request_id
        if why := self._refusal(request):
            log.error("event=request_refused request=%s why=%r", name, why)
            self._finish(frontend, [name], FinishReason.ERROR, why)
        elif not hold:
            self._admit(frontend, request)
        elif len(frontend.held) < MAX_HELD:
            frontend.held[name] = request
        else:
            self._finish(frontend, [name], FinishReason.ABORT)

    def _refusal(self, request: EngineCoreRequest) -> str:
        """Why the scheduler must not see the request: it would not survive it."""
        if any(
            request.request_id in each.running or request.request_id in each.held
            for each in self._frontends.values()
        ):
            return "its id is in use"
        if request.resumable:
            return "input that comes in pieces is not supported"
        if (adapter := request.lora_request) and not self._is_ours(adapter):
            return f"the engine was loaded without adapter {adapter.lora_name!r}"
        limit = self._core.vllm_config.model_config.max_model_len
        if len(request.prompt_token_ids or ()) > limit:
            return f"it is longer than {limit} tokens"
        return ""

    def _is_ours(self, adapter: LoRARequest) -> bool:
        given = adapter.lora_path, adapter.lora_int_id
        return self._adapters.get(adapter.lora_name) == given

    def _admit(self, frontend: _Frontend, request: EngineCoreRequest) -> None:
        request.client_index = frontend.number
        self._leader.add_request(request)
        if not request.abort_immediately:
            frontend.running.add(request.request_id)

    def _abort(self, frontend: _Frontend, request_ids: list[str]) -> None:
        """Only its own; those that have ended meanwhile are no error."""
        for name in request_ids:
            frontend.held.pop(name, None)
        running = [name for name in request_ids if name in frontend.running]
        frontend.running.difference_update(running)
        self._leader.abort_requests(running)

    def _call(self, frontend: _Frontend, call: Any, *, hold: bool) -> None:
        _, call_id, method, args = call
        if method in READING_UTILITIES and not args:
            answer = UtilityOutput(call_id)
            answer.result = UtilityResult(getattr(self._core, method)())
            self._answer(frontend, answer)
        elif method in SHARED_UTILITIES and not hold and self._may_share(method, args):
            self._leader.share_utility(frontend.number, call_id, method, list(args))
        else:
            log.warning(
                "event=utility_refused frontend=%d method=%r",
                frontend.number, str(method)[:80],
            )  # fmt: skip
            why = f"{str(method)[:80]!r} is not served by an engine of a pool"
            if method == "add_lora" and not hold:
                why = "adapters are given to an engine when it is loaded (lora_modules)"
            elif method in SHARED_UTILITIES:
                why = f"{method!r} is not possible now: the engine sleeps"
            elif method in ("sleep", "wake_up"):
                why = f"{method!r} is the pool's to do: command it"
            self._answer(frontend, UtilityOutput(call_id, failure_message=why))

    def _may_share(self, method: str, args: Any) -> bool:
        """Whether the arguments are such as cannot do harm."""
        if not isinstance(args, list | tuple):
            return False
        if method == "add_lora":
            return len(args) == 1 and self._is_ours(adapter_of(args[0]))
        return all(isinstance(each, bool) for each in args)

    # ------------------------------------------------------------ what goes out

    def _answer(self, frontend: _Frontend, answer: UtilityOutput) -> None:
        self._send(frontend, EngineCoreOutputs(utility_output=answer))

    def _finish(
        self,
        frontend: _Frontend,
        request_ids: list[str],
        reason: FinishReason,
        why: str | None = None,
    ) -> None:
        outputs = [
            EngineCoreOutput(name, [], finish_reason=reason, stop_reason=why)
            for name in request_ids
        ]
        self._send(
            frontend,
            EngineCoreOutputs(outputs=outputs, finished_requests=set(request_ids)),
        )

    def _send(self, frontend: _Frontend, outputs: EngineCoreOutputs) -> None:
        try:
            frontend.output.send_multipart(self._encoder.encode(outputs), zmq.NOBLOCK)
        except zmq.Again:
            # Ten thousand steps unread: it is gone or hopeless.
            log.error("event=frontend_does_not_read frontend=%d", frontend.number)
            self.disconnect(frontend.number)

    def _ready(self) -> bytes:
        return msgspec.msgpack.encode(ready_response(self._core))

    def _report(self) -> None:
        count, now = self.num_requests, time.monotonic()
        is_due = now - self._reported_at >= REPORT_INTERVAL_S
        if count != self._reported and (not count or not self._reported or is_due):
            self._reported, self._reported_at = count, now
            self._on_count(count)

    def _close(self, frontend: _Frontend) -> None:
        self._poller.unregister(frontend.input)
        frontend.input.close()
        frontend.output.close(linger=LINGER_MS)
