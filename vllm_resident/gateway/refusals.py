"""Why an engine did not take or finish a request, told to who waits for it.

vLLM's frontend knows of a failed request only that it failed, and answers 500 to all of
them; one of a pooling model that failed or was aborted in the engine is not foreseen at
all and ends the frontend (0.32.0, v1/engine/output_processor.py). A leader says why,
where its caller can mend it (`rank/frontends.py`, `rank/grammars.py`).
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from vllm_resident.rank.versions import GracefulHTTPError


def tell_refusals(processor: OutputProcessor) -> None:
    """From now on whoever waits for a request that was refused gets the reason raised.
    Call it once, before the first output."""
    process = processor.process_outputs

    def process_outputs(
        outputs: list[EngineCoreOutput], *args: Any, **more: Any
    ) -> Any:
        aborted: list[str] = []
        for output in outputs:
            state = processor.request_states.get(output.request_id)
            if state is not None and (error := _failure(output, state)):
                aborted += _end(processor, state, error)
        processed = process(outputs, *args, **more)  # without those that have ended
        processed.reqs_to_abort.extend(aborted)
        return processed

    processor.process_outputs = process_outputs  # type: ignore[method-assign]


def _failure(output: EngineCoreOutput, state: RequestState) -> Exception | None:
    if output.finish_reason is None:
        return None
    is_error = output.finish_reason is FinishReason.ERROR
    if is_error and isinstance(output.stop_reason, str):
        return VLLMValidationError(output.stop_reason)
    is_pooling = state.detokenizer is None
    is_missed = getattr(output, "mm_cache_miss_hashes", None)  # 0.23.0 has none
    if is_pooling and output.pooling_output is None and not is_missed:
        return GracefulHTTPError(
            "the engine has ended the request; ask again",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
    return None


def _end(
    processor: OutputProcessor, state: RequestState, error: Exception
) -> list[str]:
    """End a request and, where it is one of several sequences, the others. Gives vLLM's
    ids of all of them: the engine may still have some."""
    parent = state.parent_req
    name = state.request_id if parent is None else parent.request_id
    ended = processor.abort_requests([name], internal=True)
    if state.queue is not None:
        state.queue.put(error)  # in the place of what the abort has put there
    return ended
