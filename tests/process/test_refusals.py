"""What a leader refuses, as vLLM's frontend tells it to who waits: vLLM's own output
processor and grammars, without an engine."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]


def processor() -> Any:
    from vllm.v1.engine.output_processor import OutputProcessor

    from vllm_resident.gateway.refusals import tell_refusals

    made = OutputProcessor(tokenizer=None, log_stats=False)
    tell_refusals(made)
    return made


def request(name: str, *, pooling: bool = False, n: int = 1) -> Any:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    sampling = SamplingParams(detokenize=False, n=n)
    return EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=None if pooling else sampling,
        pooling_params=PoolingParams(task="embed") if pooling else None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def queue_of(name: str) -> Any:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    return RequestOutputCollector(RequestOutputKind.FINAL_ONLY, name)


def add(processor: Any, name: str, *, pooling: bool = False) -> Any:
    """Its queue, of a request that is waited for."""
    queue = queue_of(name)
    processor.add_request(request(name, pooling=pooling), None, None, 0, queue)
    return queue


def ended(processor: Any, name: str, reason: str, why: str | None) -> list[str]:
    """What is to be aborted when the engine has ended a request so."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    output = EngineCoreOutput(
        name, [], finish_reason=FinishReason[reason], stop_reason=why
    )
    aborted: list[str] = processor.process_outputs([output]).reqs_to_abort
    return aborted


def heard(queue: Any) -> Any:
    return asyncio.run(asyncio.wait_for(queue.get(), 5))


def test_the_reason_of_a_refusal_is_the_callers_to_read() -> None:
    from vllm.exceptions import VLLMValidationError

    made = processor()
    queue, other = add(made, "a"), add(made, "b")
    ended(made, "a", "ERROR", "no such grammar")
    with pytest.raises(VLLMValidationError, match="no such grammar"):
        heard(queue)
    assert list(made.request_states) == ["b"]
    ended(made, "b", "ERROR", None)  # not the caller's fault: as vLLM has it
    assert heard(other).outputs[0].finish_reason == "error"
    assert not made.request_states


def test_of_several_sequences_one_refused_ends_all() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.parallel_sampling import ParentRequest

    made, queue = processor(), queue_of("p")
    parent = ParentRequest(request("p", n=2))
    names = [parent.get_child_info(index)[0] for index in range(2)]
    for index, name in enumerate(names):
        child = request(name)
        child.external_req_id = "p"
        made.add_request(child, None, parent, index, queue)
    assert sorted(ended(made, names[0], "ERROR", "why")) == sorted(names)
    with pytest.raises(VLLMValidationError, match="why"):
        heard(queue)
    assert not made.request_states
    assert not made.parent_requests


@pytest.mark.parametrize("reason", ["ABORT", "ERROR"])
def test_a_pooling_request_that_ends_without_a_result_ends_nothing_else(
    reason: str,
) -> None:
    from vllm_resident.rank.versions import GracefulHTTPError

    made = processor()
    queue = add(made, "pooled", pooling=True)
    ended(made, "pooled", reason, None)
    with pytest.raises(GracefulHTTPError) as raised:
        heard(queue)
    assert raised.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
    assert not made.request_states


class Scheduler:
    """Its requests, by name."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}


def grammar(text: str) -> tuple[Any, Any]:
    """(backend, grammar) of xgrammar's, for a vocabulary of letters."""
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import (
        XgrammarBackend,
        XgrammarGrammar,
    )

    letters = [chr(each) for each in range(97, 123)] + ["</s>"]
    info = xgrammar.TokenizerInfo(letters, stop_token_ids=[26])
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(text)
    backend = XgrammarBackend.__new__(XgrammarBackend)
    backend.vocab_size = len(letters)
    matcher = xgrammar.GrammarMatcher(compiled)
    return backend, XgrammarGrammar(len(letters), matcher, compiled)


@pytest.mark.parametrize(
    ("text", "accepted", "is_dead"),
    [
        ("root ::= root root", [], True),
        ('root ::= "a" dead\ndead ::= dead dead', [0], True),
        ('root ::= "a" "b"', [0], False),
    ],
)
def test_only_a_grammar_without_a_way_on_is_its_callers_fault(
    text: str, accepted: list[int], is_dead: bool
) -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    from vllm_resident.rank.grammars import DEAD_END, Grammars

    backend, made = grammar(text)
    scheduler = Scheduler()
    core: Any = SimpleNamespace(
        scheduler=scheduler, structured_output_manager=SimpleNamespace(backend=backend)
    )
    grammars = Grammars(core)
    scheduler.requests["a"] = SimpleNamespace(
        structured_output_request=SimpleNamespace(grammar=made)
    )
    params = SamplingParams(structured_outputs=StructuredOutputsParams(grammar=text))
    grammars.watch(SimpleNamespace(request_id="a", sampling_params=params))  # type: ignore[arg-type]
    assert made.accept_tokens("a", accepted)
    grammars.explain([EngineCoreOutput("a", [0])])
    assert not made.accept_tokens("a", [5])
    output = EngineCoreOutput("a", [5], finish_reason=FinishReason.ERROR)
    grammars.explain([output])
    assert output.stop_reason == (DEAD_END if is_dead else None)
