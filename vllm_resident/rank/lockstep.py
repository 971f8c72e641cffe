"""The leader's step plans to its followers.

Every rank of an engine has a scheduler of its own, so all must see the same inputs at
the same step. Before each step the leader sends a plan: requests to add and abort, and
calls that change a scheduler's state, in order, and whether to step or to stop. It
carries the digest of the leader's last outputs; a follower whose own differ raises
`RankDiverged`. Plans are raw frames over one ZMQ socket per follower (`lines.py`): a
header, then vLLM's own engine-core frames.

Requests are of clients, by vLLM's client index: 0 is the pool itself, on the leader,
the others are frontends (`frontends.py`).
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from vllm_resident.errors import (
    ProtocolError,
    RankDiverged,
    RankFailure,
)
from vllm_resident.rank.grammars import Grammars
from vllm_resident.rank.versions import MultiModalCacheMissError

# A rank forms one world at a time, and each generation once.
_MAX_HELD = 64

# vLLM's utility calls that change what a scheduler does next: every rank makes them at
# the same step. None of them runs code or reads files that its caller names: of
# adapters, only those that the engine was loaded with (`frontends.py` sees to that).
SHARED_UTILITIES = frozenset(
    {"reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache", "add_lora"}
)

_ADD = EngineCoreRequestType.ADD.value
_ABORT = EngineCoreRequestType.ABORT.value
_UTILITY = EngineCoreRequestType.UTILITY.value

log = logging.getLogger("vllm_resident.rank")


class StepPlan(msgspec.Struct, array_like=True, frozen=True):
    """What every rank of the engine does next.

    `step` numbers the plans from 0; `digest` is of the outputs of the step before;
    `actions` are (request type, number of frames) of what is to be applied first, the
    frames following the header. `run`: take a step. `stop`: there is no next plan.
    `hold`: no step follows before the world of this generation is formed and its engine
    built, by whichever of the ranks it is.
    """

    step: int
    digest: int
    run: bool
    stop: bool
    actions: list[tuple[bytes, int]]
    hold: int = 0


class Wish(msgspec.Struct, array_like=True, frozen=True):
    """What a follower asks of its leader, the other way along the same line: to hold
    the engine at the same step on every rank while it forms the world of a generation,
    or (`done`) to hold it for that no longer."""

    generation: int
    done: bool


class UtilityCall(msgspec.Struct, array_like=True, frozen=True):
    """One of `SHARED_UTILITIES` with its arguments."""

    method: str
    args: list[Any]


def adapter_of(sent: Any) -> LoRARequest:
    """An adapter as it was sent; raises `msgspec.ValidationError`."""
    return msgspec.convert(sent, LoRARequest)


def digest(outputs: Mapping[int, EngineCoreOutputs] | None, previous: int) -> int:
    """Checksum over all outputs up to and including these, of all clients: who got
    which tokens."""
    for client in sorted(outputs or ()):
        assert outputs is not None
        for output in outputs[client].outputs:
            reason = "" if output.finish_reason is None else output.finish_reason.name
            row = f"{output.request_id} {output.new_token_ids} {reason}"
            previous = zlib.crc32(row.encode(), previous)
    return previous


class Leader(InprocClient):
    """vLLM's in-process engine-core client with the plan put before each step.

    Put in the place of an `LLMEngine`'s own client: what the engine's front half adds
    and aborts is recorded, sent to the followers with the next plan, and applied here
    at the same point. With no followers nothing is encoded or sent.
    """

    def __init__(self, core: EngineCore, followers: Sequence[zmq.Socket[bytes]]):
        # InprocClient's own constructor would build a second core.
        self.engine_core = core
        self._followers = followers
        self._grammars = Grammars(core)
        self._encoder = MsgpackEncoder()
        self._pending: list[tuple[bytes, Any]] = []
        # Client and call number of each utility call in `_pending`, in order.
        self._callers: list[tuple[int, int]] = []
        # What is for the pool's own requests beside a step's outputs, and what is for
        # the other clients.
        self._own: list[EngineCoreOutput] = []
        self._others: list[tuple[int, EngineCoreOutputs]] = []
        self._step = 0
        self._digest = 0

    @property
    def has_pending(self) -> bool:
        """Whether something is left to be planned, or to be told the pool itself."""
        return bool(self._pending or self._own)

    def add_request(self, request: EngineCoreRequest) -> None:
        self._pending.append((_ADD, request))

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids:
            self._pending.append((_ABORT, request_ids))

    def share_utility(
        self, client: int, call_id: int, method: str, args: list[Any]
    ) -> None:
        """Make one of `SHARED_UTILITIES` with the next plan, on every rank; the
        client's `UtilityOutput` is then among what `take_others` gives."""
        self._pending.append((_UTILITY, UtilityCall(method, args)))
        self._callers.append((client, call_id))

    def take_others(self) -> list[tuple[int, EngineCoreOutputs]]:
        """What has come for each client but the pool itself since the last call."""
        others, self._others = self._others, []
        return others

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Take back requests recorded since the last plan, as if never added."""
        gone = set(request_ids)
        self._pending = [
            (kind, item)
            for kind, item in self._pending
            if kind != _ADD or item.request_id not in gone
        ]

    def get_output(self) -> EngineCoreOutputs:
        """Plan and take one step; collective. Raises `RankFailure` when a follower
        has closed its line: it will not take part any more."""
        self._publish(run=True)
        outputs, self._digest = _run(self.engine_core, self._digest)
        for each in outputs.values():
            self._grammars.explain(each.outputs)
        mine = outputs.pop(0, None) or EngineCoreOutputs()
        self._others.extend(outputs.items())
        if self._own:
            mine.outputs = [*mine.outputs, *self._own]
            self._own = []
        return mine

    def settle(self) -> None:
        """Send what is pending and the last digest without a step, at the end of a
        burst: a divergence in the last step shows at once, not at the next request."""
        self._publish(run=False)

    def stop(self) -> None:
        """Tell the followers that this was the last plan."""
        self._publish(run=False, stop=True)

    def hold(self, generation: int) -> None:
        """Tell the followers that no step follows before the world of `generation` is
        there; the caller sees to that. Those that are gone are not missed."""
        with suppress(RankFailure):
            self._publish(run=False, hold=generation)

    def take_wishes(self) -> list[tuple[int, Wish]]:
        """What followers have asked since the last call, by their place."""
        wishes = []
        for follower, socket in enumerate(self._followers, start=1):
            while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                wishes.append((follower, _decode_wish(socket.recv())))
        return wishes

    def close(self) -> None:
        for socket in self._followers:
            socket.close()

    def _publish(self, *, run: bool, stop: bool = False, hold: int = 0) -> None:
        pending, self._pending = self._pending, []
        if self._followers:
            # Encoded before anything is applied: preprocessing may change a request.
            frames = [self._encoder.encode(item) for _, item in pending]
            actions = [
                (kind, len(parts))
                for (kind, _), parts in zip(pending, frames, strict=True)
            ]
            header = StepPlan(self._step, self._digest, run, stop, actions, hold)
            plan = [msgspec.msgpack.encode(header)]
            for parts in frames:
                plan.extend(parts)
            self._send(plan)
        self._step += 1
        callers, self._callers = iter(self._callers), []
        for kind, item in pending:
            outcome, self._digest = _apply(self.engine_core, kind, item, self._digest)
            if kind == _UTILITY:
                self._answer(*next(callers), item.method, outcome)
            elif outcome is not None:
                self._refuse(item, outcome)
            elif kind == _ADD:
                self._grammars.watch(item)
            else:
                self._grammars.forget(item)

    def _answer(self, client: int, call_id: int, method: str, outcome: Any) -> None:
        answer = UtilityOutput(call_id)
        if isinstance(outcome, Exception):
            answer.failure_message = f"{method} failed: {outcome}"
        else:
            answer.result = UtilityResult(outcome)
        self._others.append((client, EngineCoreOutputs(utility_output=answer)))

    def _refuse(self, request: EngineCoreRequest, error: Exception) -> None:
        log.error("event=request_refused request=%s error=%r",
                  request.request_id, error)  # fmt: skip
        output = EngineCoreOutput(
            request.request_id, [], finish_reason=FinishReason.ERROR
        )
        if isinstance(error, MultiModalCacheMissError):
            # The frontend forgets what it took for known here, and its caller's next
            # try succeeds (vllm 0.32.0, v1/engine/core.py, _handle_mm_cache_miss).
            output.mm_cache_miss_hashes = error.mm_hashes
        elif isinstance(error, (ValueError, TypeError)):
            # Its caller's mistake, as vLLM raises them; others are not told outside.
            output.stop_reason = f"the engine refused the request: {error}"
        if request.client_index == 0:
            self._own.append(output)
        else:
            outputs = EngineCoreOutputs(
                outputs=[output], finished_requests={request.request_id}
            )
            self._others.append((request.client_index, outputs))

    def _send(self, plan: list[bytes]) -> None:
        for follower, socket in enumerate(self._followers, start=1):
            try:
                # The lines hold any number of plans: only one without its peer blocks.
                socket.send_multipart(plan, zmq.NOBLOCK)
            except zmq.Again as error:
                raise RankFailure(
                    f"follower {follower} has left the engine", phase="step"
                ) from error


class Follower:
    """Applies the leader's plans to this rank's engine core."""

    def __init__(self, core: EngineCore, socket: zmq.Socket[bytes]) -> None:
        self._core = core
        self.socket = socket
        self._requests = MsgpackDecoder(EngineCoreRequest)
        self._ids = MsgpackDecoder(list[str])
        self._calls = MsgpackDecoder(UtilityCall)
        self._step = 0
        self._digest = 0
        self.stopped = False
        # Of the plans, those that said to step.
        self.num_steps = 0
        # Worlds for which the leader has stopped stepping, the last ones. It may do so
        # before this rank asks: another asked first, or it forms that world itself.
        self.held: deque[int] = deque(maxlen=_MAX_HELD)
        self._asked: set[int] = set()

    def follow(self) -> bool:
        """Take the next plan if there is one, without waiting; True if there was.

        Collective when the plan says to step. Raises `RankDiverged` before anything of
        the plan is applied, `ProtocolError` when a plan is missing or malformed.
        """
        try:
            header, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        plan = self._check(header)
        for kind, item in self._decode(plan.actions, frames):
            _, self._digest = _apply(self._core, kind, item, self._digest)
        self.stopped = plan.stop
        if plan.hold:
            self.held.append(plan.hold)
        if plan.run:
            _, self._digest = _run(self._core, self._digest)
            self.num_steps += 1
        return True

    def ask_to_hold(self, generation: int) -> None:
        """Ask the leader for no more steps while this rank forms a world; it says when
        in its plans (`held`). May be called again."""
        if generation not in self._asked:
            self._asked.add(generation)
            self._wish(Wish(generation, done=False))

    def end_hold(self, generation: int) -> None:
        """Take back what was asked, if it was."""
        if generation in self._asked:
            self._asked.discard(generation)
            self._wish(Wish(generation, done=True))

    def _wish(self, wish: Wish) -> None:
        # Without its leader the engine is over, which others find out.
        with suppress(zmq.ZMQError):
            self.socket.send(msgspec.msgpack.encode(wish), zmq.NOBLOCK)

    def close(self) -> None:
        self.socket.close()

    def _decode(
        self, actions: list[tuple[bytes, int]], frames: list[bytes]
    ) -> list[tuple[bytes, Any]]:
        decoders = {_ADD: self._requests, _ABORT: self._ids, _UTILITY: self._calls}
        if [kind for kind, _ in actions if kind not in decoders] or (
            sum(num_frames for _, num_frames in actions) != len(frames)
        ):
            raise ProtocolError(f"step plan of {actions} with {len(frames)} frames")
        items = []
        for kind, num_frames in actions:
            parts, frames = frames[:num_frames], frames[num_frames:]
            try:
                item = decoders[kind].decode(parts)
            except msgspec.DecodeError as error:
                raise ProtocolError(f"in a step plan: {error}") from error
            if kind == _UTILITY and item.method not in SHARED_UTILITIES:
                raise ProtocolError(f"in a step plan: a call of {item.method!r}")
            items.append((kind, item))
        return items

    def _check(self, header: bytes) -> StepPlan:
        try:
            plan = msgspec.msgpack.decode(header, type=StepPlan)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"not a step plan: {error}") from error
        if plan.step != self._step:
            raise ProtocolError(f"step plan {plan.step} came, {self._step} was due")
        if plan.digest != self._digest:
            raise RankDiverged(
                f"this rank's outputs up to step {self._step} differ from its leader's "
                f"({self._digest:08x} against {plan.digest:08x})",
                phase="step",
            )
        self._step += 1
        return plan


def _decode_wish(frame: bytes) -> Wish:
    try:
        return msgspec.msgpack.decode(frame, type=Wish)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a follower's wish: {error}") from error


def _apply(core: EngineCore, kind: bytes, item: Any, before: int) -> tuple[Any, int]:
    """Do one action of a plan. Gives what a utility call gave, and the digest.

    What vLLM raises about a request (a grammar it cannot compile, a task the model has
    not) or a call is given back, not raised: the request is at fault, not the engine.
    It enters the digest, since every rank must have refused it.
    """
    if kind == _ABORT:
        core.abort_requests(item)
        return None, before
    try:
        if kind == _UTILITY:
            if item.method == "add_lora":
                return core.add_lora(adapter_of(*item.args)), before
            return getattr(core, item.method)(*item.args), before
        request, wave = core.preprocess_add_request(item)
        core.add_request(request, wave)
    # Of any kind: grammar backends and multi-modal processors raise their own.
    except Exception as error:  # noqa: BLE001 (logged and answered by the leader)
        return error, zlib.crc32(b"refused", before)
    return None, before


def _run(core: EngineCore, before: int) -> tuple[dict[int, EngineCoreOutputs], int]:
    outputs, model_executed = core.step_fn()
    core.post_step(model_executed=model_executed)
    return outputs or {}, digest(outputs, before)
