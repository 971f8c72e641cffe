"""The generate calls in an engine, on its leader: prompts in, completions out.

Translates between the pool's messages and vLLM's request objects. Knows nothing of
ranks, plans or sockets.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import FinishReason
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_resident.errors import CommandRejected
from vllm_resident.messages import Completion
from vllm_resident.rank.lockstep import Leader

_OURS = {"output_kind": "say stream or not instead"}
_NAMES = sorted(
    name
    for name in SamplingParams.__struct_fields__
    if not name.startswith("_") and name not in _OURS
)


@dataclass
class _Call:
    """One generate call: vLLM's ids of its prompts that are still running."""

    running: dict[str, int] = field(default_factory=dict)


class Requests:
    """All generate calls of one engine on its leader. Main thread only."""

    def __init__(self, llm: LLMEngine, leader: Leader) -> None:
        self._llm = llm
        self._leader = leader
        self._calls: dict[int, _Call] = {}

    def add(
        self,
        number: int,
        prompts: list[str | list[int]],
        sampling_params: dict[str, Any],
        stream: bool,
    ) -> None:
        """Take all prompts of a call in, or none: `CommandRejected` says why."""
        params = self._sampling_params(sampling_params, stream)
        call = _Call()
        try:
            for index, prompt in enumerate(prompts):
                external = f"{number}-{index}"
                call.running[external] = index
                given = prompt if isinstance(prompt, str) else _tokens(prompt)
                self._llm.add_request(external, given, params)
        # vLLM refuses a request by many kinds of exception, and nothing has run yet.
        except Exception as error:
            processor = self._llm.output_processor
            self._leader.withdraw(
                processor.abort_requests(self._internal_ids(call), internal=True)
            )
            raise CommandRejected(f"prompt {index}: {error}") from error
        self._calls[number] = call

    def collect(
        self, outputs: list[RequestOutput]
    ) -> list[tuple[int, list[Completion], bool]]:
        """(call, its new completions, whether it is done) for one step's outputs."""
        fresh: dict[int, list[Completion]] = {}
        for output in outputs:
            number = int(output.request_id.partition("-")[0])
            if (call := self._calls.get(number)) is None:
                continue
            index = call.running[output.request_id]
            fresh.setdefault(number, []).extend(_completions(index, output))
            if output.finished:
                del call.running[output.request_id]
        result = []
        for number, completions in fresh.items():
            if done := not self._calls[number].running:
                del self._calls[number]
            result.append((number, completions, done))
        return result

    def abort(self, number: int) -> list[Completion]:
        """End a call; what it had so far, with finish reason "abort". A call that is
        not there (it has just ended) gives nothing."""
        if (call := self._calls.pop(number, None)) is None:
            return []
        ended: list[Completion] = []
        internal_ids = self._internal_ids(call)
        for internal in internal_ids:
            state = self._llm.output_processor.request_states.get(internal)
            if state is None:
                continue
            # As the processor itself does for a request that has a queue (vllm 0.32.0,
            # v1/engine/output_processor.py, abort_requests). Of a batch with n > 1 the
            # last sequence's output has them all, also those that ended before.
            output = state.make_request_output([], None, FinishReason.ABORT, None)
            if output is not None:
                index = call.running[state.external_req_id]
                ended.extend(_completions(index, output))
        self._llm.abort_request(internal_ids, internal=True)
        return ended

    def _internal_ids(self, call: _Call) -> list[str]:
        """vLLM's ids of what runs of a call: its sequences, then, where n > 1, their
        parents, which vLLM forgets only when it is given their own ids (0.32.0)."""
        processor = self._llm.output_processor
        sequences = [
            internal
            for external in call.running
            for internal in processor.external_req_ids.get(external, [])
        ]
        states = [processor.request_states[internal] for internal in sequences]
        parents = {state.parent_req.request_id for state in states if state.parent_req}
        return [*sequences, *sorted(parents)]

    @property
    def numbers(self) -> list[int]:
        return list(self._calls)

    def _sampling_params(self, given: dict[str, Any], stream: bool) -> SamplingParams:
        """vLLM's object; with nothing given the model's own defaults, as `LLM` does."""
        for name in given:
            if name in _OURS:
                raise CommandRejected(f"sampling parameter {name!r}: {_OURS[name]}")
            if name not in _NAMES:
                near = difflib.get_close_matches(name, _NAMES, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise CommandRejected(f"vLLM has no sampling parameter {name!r}{hint}")
        values = given or self._llm.model_config.get_diff_sampling_param()
        try:
            params: SamplingParams = msgspec.convert(values, SamplingParams)
        # vLLM refuses values by errors of its own, not all of them ValueErrors.
        except Exception as error:
            raise CommandRejected(f"sampling parameters: {error}") from error
        params.output_kind = (
            RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        )
        return params


def _tokens(token_ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": token_ids}


def _completions(prompt_index: int, output: RequestOutput) -> list[Completion]:
    return [
        Completion(
            prompt_index=prompt_index,
            index=each.index,
            text=each.text,
            token_ids=list(each.token_ids),
            finish_reason=each.finish_reason,
            stop_reason=each.stop_reason,
            cumulative_logprob=each.cumulative_logprob,
        )
        for each in output.outputs
    ]
