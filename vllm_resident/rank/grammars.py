"""Why a request's grammar ended it, on the leader.

vLLM ends a request as failed, without a word, when its grammar does not compile or has
come to where no token can follow: `root ::= root root` describes no text at all. That
is its caller's mistake, whom the reason must reach; a grammar that could have gone on
is vLLM's. Knows nothing of frontends and lines.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore

DEAD_END = "the grammar or schema has come to where no token of the model can follow"


class Grammars:
    """The grammars of an engine's running requests. Main thread only."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        # vLLM's `StructuredOutputRequest`s: it forgets its own before it tells the end.
        self._running: dict[str, Any] = {}

    def watch(self, request: EngineCoreRequest) -> None:
        """Remember the grammar, if there is one, of a request just admitted."""
        params = request.sampling_params
        if params is None or params.structured_outputs is None:
            return
        name = request.request_id
        admitted = self._core.scheduler.requests.get(name)
        if admitted is not None and admitted.structured_output_request is not None:
            self._running[name] = admitted.structured_output_request

    def forget(self, request_ids: list[str]) -> None:
        """No-op for those that have none."""
        for name in request_ids:
            self._running.pop(name, None)

    def explain(self, outputs: list[EngineCoreOutput]) -> None:
        """Give those of a step's outputs that end a request for its grammar the reason,
        as their `stop_reason`; forget all that have ended."""
        if not self._running:
            return
        for output in outputs:
            if output.finish_reason is None:
                continue
            structured = self._running.pop(output.request_id, None)
            if structured and output.finish_reason is FinishReason.ERROR:
                output.stop_reason = self._fault_of(structured.grammar)

    def _fault_of(self, grammar: Any) -> str | None:
        if isinstance(grammar, Exception):
            return f"the grammar or schema does not compile: {grammar}"
        backend = self._core.structured_output_manager.backend
        if grammar is None or backend is None or grammar.is_terminated():
            return None
        # What it lets follow; a token that it has not accepted has not moved it.
        allowed = backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(allowed, 0)
        return None if allowed.any() else DEAD_END
