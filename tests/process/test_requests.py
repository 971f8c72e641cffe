"""Generate calls against vLLM's real output processor, with no engine behind it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_resident.errors import CommandRejected

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

SAMPLING = {"max_tokens": 4, "detokenize": False}


class FakeEngineCore:
    """Takes requests and aborts; steps are the test's."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.running: list[str] = []

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        return request, 0

    def add_request(self, request: Any, wave: int) -> None:
        self.running.append(request.request_id)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.aborted.extend(request_ids)

    def step_fn(self) -> tuple[None, bool]:
        return None, False

    def post_step(self, *, model_executed: bool) -> None:
        pass


class FakeEngine:
    """The front half of an `LLMEngine` without tokenizer, as far as `Requests` sees it:
    vLLM's own `add_request` and `abort_request`, output processor and leader."""

    def __init__(self) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.engine.output_processor import OutputProcessor

        from vllm_resident.rank.lockstep import Leader

        self.core = FakeEngineCore()
        self.engine_core = Leader(self.core, [])
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.input_processor = SimpleNamespace(
            process_inputs=self._process,
            assign_request_id=self._assign_id,
        )
        self.model_config = SimpleNamespace(
            get_diff_sampling_param=lambda: dict(SAMPLING),
            is_encoder_decoder=False,
            enable_prompt_embeds=False,
        )
        self.get_supported_tasks = lambda: ("generate",)
        self.add_request = LLMEngine.add_request.__get__(self)
        self.abort_request = LLMEngine.abort_request.__get__(self)

    def _process(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        from vllm.v1.engine import EngineCoreRequest

        token_ids = prompt["prompt_token_ids"]
        if len(token_ids) > 8:
            raise ValueError("too long")
        return EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            mm_features=None,
            sampling_params=params.clone(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    def _assign_id(self, request: Any) -> None:
        request.external_req_id = request.request_id
        request.request_id = f"{request.request_id}-internal"

    def step(self, tokens: dict[str, list[int]], finished: str = "") -> list[Any]:
        """Outputs for a step that gave `tokens`; those whose id contains `finished`
        have ended."""
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        self.engine_core.get_output()
        outputs = [
            EngineCoreOutput(
                name,
                new,
                finish_reason=FinishReason.LENGTH if name == finished else None,
            )
            for name, new in tokens.items()
        ]
        return self.output_processor.process_outputs(outputs).request_outputs

    def left(self) -> list[Any]:
        """What vLLM's front half still holds; all empty when nothing runs."""
        processor = self.output_processor
        return [
            processor.request_states,
            processor.parent_requests,
            dict(processor.external_req_ids),
        ]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def requests(engine: FakeEngine) -> Any:
    from vllm_resident.rank.requests import Requests

    return Requests(engine, engine.engine_core)


def test_a_batch_comes_when_each_prompt_has_ended(
    engine: FakeEngine, requests: Any
) -> None:
    requests.add(3, [[1, 2], [3]], SAMPLING, stream=False)
    first, second = "3-0-internal", "3-1-internal"
    assert requests.collect(engine.step({first: [7], second: [8]})) == []
    ((number, completions, done),) = requests.collect(
        engine.step({first: [9], second: [8]}, finished=first)
    )
    assert (number, done) == (3, False)
    assert [(c.prompt_index, c.token_ids) for c in completions] == [(0, [7, 9])]
    ((_, completions, done),) = requests.collect(
        engine.step({second: [1]}, finished=second)
    )
    assert done
    assert completions[0].finish_reason == "length"
    assert requests.numbers == []
    assert engine.left() == [{}, {}, {}]


@pytest.mark.parametrize("n", [1, 3])
def test_a_refused_prompt_takes_the_whole_call_back(
    engine: FakeEngine, requests: Any, n: int
) -> None:
    prompts = [[1], [2], list(range(9)), [3]]
    with pytest.raises(CommandRejected, match="prompt 2: too long"):
        requests.add(0, prompts, {**SAMPLING, "n": n}, stream=False)
    assert requests.numbers == []
    assert engine.left() == [{}, {}, {}]
    assert not engine.engine_core.has_pending


def test_a_prompt_half_added_is_taken_back(
    engine: FakeEngine, requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM fails between the sequences of one prompt."""
    add, added = engine.engine_core.add_request, []

    def fail_at_the_second(request: Any) -> None:
        added.append(request)
        if len(added) == 2:
            raise RuntimeError("out of luck")
        add(request)

    monkeypatch.setattr(engine.engine_core, "add_request", fail_at_the_second)
    with pytest.raises(CommandRejected, match="prompt 0: out of luck"):
        requests.add(0, [[1]], {**SAMPLING, "n": 3}, stream=False)
    assert engine.left() == [{}, {}, {}]
    assert not engine.engine_core.has_pending


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_an_abort_forgets_everything(
    engine: FakeEngine, requests: Any, n: int, stream: bool
) -> None:
    requests.add(0, [[1], [2]], {**SAMPLING, "n": n}, stream=stream)
    names = list(engine.output_processor.request_states)
    requests.collect(engine.step({name: [5] for name in names}))
    ended = requests.abort(0)
    assert sorted((c.prompt_index, c.index) for c in ended) == [
        (prompt, index) for prompt in range(2) for index in range(n)
    ]
    assert {c.finish_reason for c in ended} == {"abort"}
    assert {tuple(c.token_ids) for c in ended} == {() if stream else (5,)}
    assert engine.left() == [{}, {}, {}]
    engine.step({})
    assert sorted(engine.core.aborted) == sorted(names)
    assert requests.abort(0) == []


def test_an_abort_of_a_batch_keeps_the_sequences_that_had_ended(
    engine: FakeEngine, requests: Any
) -> None:
    requests.add(0, [[1]], {**SAMPLING, "n": 2}, stream=False)
    first, second = "0_0-0-internal", "1_0-0-internal"
    outputs = engine.step({first: [5], second: [6]}, finished=first)
    assert requests.collect(outputs) == []
    ended = requests.abort(0)
    assert [(c.index, c.token_ids, c.finish_reason) for c in ended] == [
        (0, [5], "length"),
        (1, [6], "abort"),
    ]
    assert engine.left() == [{}, {}, {}]


def test_an_aborted_call_gives_nothing_more(engine: FakeEngine, requests: Any) -> None:
    requests.add(0, [[1]], SAMPLING, stream=True)
    requests.abort(0)
    assert requests.collect(engine.step({"0-0-internal": [5]})) == []


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"output_kind": 1}, "say stream or not"),
        ({"temperature": -1.0}, "sampling parameters: "),
        ({"max_tokens": "many"}, "sampling parameters: "),
    ],
)
def test_sampling_parameters_are_checked(
    engine: FakeEngine, requests: Any, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(CommandRejected, match=message):
        requests.add(0, [[1]], parameters, stream=False)
    assert engine.left() == [{}, {}, {}]
