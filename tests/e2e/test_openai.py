"""OpenAI's own clients against a pool: what vLLM's server offers for a model works for
every model behind the one address, at TP=1 and over PP=2, of whatever kind."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.odd_bodies import bodies
from tests.e2e.pools import ENGINE_ARGS, SAMPLING, pids, wait_until
from tests.e2e.references import POOLING_ARGS, Expected
from tests.e2e.test_gateway import HttpGateway, num_requests, phases, running_gateway
from tests.members import standing_still
from vllm_resident import Client, CommandRejected

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
# As for `vllm serve`: engine arguments and options of the server.
CHAT: dict[str, Any] = {
    **ENGINE_ARGS,
    "max_model_len": 512,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "chat_template": str(HERE / "tools.jinja"),
}
NO_WAY_ON = "the grammar or schema has come to where no token of the model can follow"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
]
# So small a model calls a tool where it has seen it done.
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
WITH_CALLS: Any = [
    *(
        {"role": role, "content": text % city}
        for city in ("Paris", "Rome", "Paris")
        for role, text in (("user", "How is it in %s?"), ("assistant", CALL))
    ),
    {"role": "user", "content": "How is it in Rome?"},
]


@pytest.fixture(scope="module")
def models(
    shared_pool: Client, smollm2: str, minilm: str, tuned: Expected
) -> Iterator[Client]:
    """ "chat" on one rank, "piped" over both (PP=2), "minilm" for embeddings, and
    "base", of which "tuned" is an adapter, over both (TP=2)."""
    pool = shared_pool
    pool.apply([])
    both: dict[str, Any] = {"ranks": [0, 1], "asleep": True}
    pool.load("piped", smollm2, **both, **{**CHAT, "pipeline_parallel_size": 2})
    spoken: dict[str, Any] = {"chat_template": "{{ messages[0].content }}"}
    pool.load("base", tuned.model, **both, **tuned.engine_args, **spoken)
    pool.load("minilm", minilm, ranks=[0], asleep=True, **POOLING_ARGS)
    pool.load("chat", smollm2, ranks=[0], **CHAT)
    yield pool
    pool.apply([])


@pytest.fixture(scope="module")
def gateway(
    models: Client, pool_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpGateway]:
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    keeps = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with running_gateway(models, pool_folder, log, **keeps) as gateway:
        yield gateway
        text = log.read_text()
        # vLLM logs where it was raised what ends a stream, a caller's fault as well.
        assert text.count("Traceback") == text.count(
            f"VLLMValidationError: {NO_WAY_ON}"
        )


@pytest.fixture(params=["chat", "piped"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------ the official client


def test_the_async_client_streams_and_counts(gateway: HttpGateway, model: str) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
        ) as client:
            arguments: Any = {"model": model, "messages": QUESTION, **SAMPLING}
            stream = await client.chat.completions.create(
                stream=True, stream_options={"include_usage": True}, **arguments
            )
            pieces = [piece async for piece in stream]
            whole = await asyncio.gather(
                *(client.chat.completions.create(**arguments) for _ in range(4))
            )
            return [pieces, whole]

    pieces, whole = asyncio.run(ask())
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert {answer.choices[0].message.content for answer in whole} == {text}
    assert "Paris" in text
    assert pieces[-1].usage.completion_tokens == whole[0].usage.completion_tokens


def test_a_schema_is_kept_to(gateway: HttpGateway, model: str) -> None:
    form: Any = {"name": "weather", "schema": WEATHER, "strict": True}
    answer = gateway.openai.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": form},
    )
    assert json.loads(answer.choices[0].message.content or "") in (
        {"city": "Paris"},
        {"city": "Rome"},
    )


def test_logprobs_are_told(gateway: HttpGateway, model: str) -> None:
    answer = gateway.openai.chat.completions.create(
        model=model, messages=QUESTION, logprobs=True, top_logprobs=3, **SAMPLING
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(len(token.top_logprobs) == 3 for token in logprobs.content)
    assert all(token.logprob <= 0 for token in logprobs.content)


def test_leaving_a_stream_aborts_its_request_on_both_ranks(
    gateway: HttpGateway, models: Client
) -> None:
    leader = pids(models)[0]
    stream = gateway.stream("piped")
    next(iter(stream))
    with standing_still(leader):
        wait_until(models, lambda s: num_requests(s, "piped") == 1, 20, "the count")
    stream.close()
    wait_until(models, lambda s: num_requests(s, "piped") == 0, 30, "the abort")
    assert gateway.complete("piped")  # nobody diverged
    assert phases(models)["piped"] == "ready"


# ------------------------------------------------------------ tools


def num_parsed(gateway: HttpGateway, model: str) -> float:
    """Tool calls of a model's answers, as vLLM counts them."""
    wanted = (
        "tool_call_parser_invocations_total",
        f'model_name="{model}"',
        'outcome="tool_call"',
        'mode="non_streaming"',
        'request_type="chat_completions"',
    )
    page = gateway.http.get("/metrics").text.splitlines()
    lines = [line for line in page if all(word in line for word in wanted)]
    return sum(float(line.split()[-1]) for line in lines)


@pytest.mark.parametrize(
    "choice",
    ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["auto", "required", "named"],
)
def test_tools_are_called(gateway: HttpGateway, model: str, choice: Any) -> None:
    """Parsed by the parser that the model was loaded with, out of what it was shown by
    its template."""
    arguments: Any = {
        "model": model,
        "messages": WITH_CALLS,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 60,
        "temperature": 0,
    }
    before = {name: num_parsed(gateway, name) for name in ("chat", "piped")}
    answer = gateway.openai.chat.completions.create(**arguments)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    if choice != "auto":
        return
    assert answer.choices[0].finish_reason == "tool_calls"
    after = {name: num_parsed(gateway, name) for name in before}
    assert after == {**before, model: before[model] + 1}
    pieces = list(gateway.openai.chat.completions.create(stream=True, **arguments))
    calls = [c for p in pieces for c in p.choices[0].delta.tool_calls or []]
    assert [c.function.name for c in calls if c.function.name] == ["get_weather"]
    text = "".join(c.function.arguments or "" for c in calls)
    assert json.loads(text) == {"city": "Rome"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tool_call_parser": "hermse"}, "did you mean 'hermes'"),
        ({"enable_auto_tool_choice": True}, "requires --tool-call-parser"),
        ({"chat_template": "./no/such.jinja"}, "chat template"),
        ({"response_role": 7}, "response_role"),
        ({"respose_role": "x"}, "did you mean response_role"),
        ({"reasoning_parser": "quen3"}, "'quen3.* not found"),
        ({"lora_modules": [{"name": "a", "path": "/a"}]}, "enable_lora"),
        ({"port": 80}, "the gateway's"),
    ],
)
def test_wrong_options_of_the_server_are_refused_before_anything_is_built(
    models: Client, smollm2: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(CommandRejected, match=why):
        models.load("bad", smollm2, ranks=[1], asleep=True, **ENGINE_ARGS, **options)
    assert "bad" not in phases(models)


# ------------------------------------------------------------ other routes


def test_responses(gateway: HttpGateway, model: str) -> None:
    arguments: Any = {
        "model": model,
        "input": "What is the capital of France?",
        "max_output_tokens": 16,
        "temperature": 0,
    }
    whole = gateway.openai.responses.create(**arguments)
    assert "Paris" in whole.output_text
    events = list(gateway.openai.responses.create(stream=True, **arguments))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text
    # Found again by the model's server that keeps it, without a model's name.
    kept = gateway.openai.responses.retrieve(whole.id)
    assert kept.output_text == whole.output_text
    with pytest.raises(openai.NotFoundError, match="no response"):
        gateway.openai.responses.retrieve("resp_nobody")


def test_text_and_tokens(gateway: HttpGateway, model: str) -> None:
    body = {"model": model, "prompt": "The capital of France is"}
    tokens = gateway.http.post("/tokenize", json=body).json()
    assert tokens["count"] == len(tokens["tokens"]) > 3
    body = {"model": model, "tokens": tokens["tokens"]}
    text = gateway.http.post("/detokenize", json=body).json()
    assert text["prompt"] == "The capital of France is"


def test_curl(gateway: HttpGateway) -> None:
    """Plain `curl`, as the README has it: an answer, a stream, an error."""

    def curl(path: str, body: dict[str, Any], *options: str) -> str:
        command = ["curl", "--silent", "--show-error", "--no-buffer", *options]
        command += [f"{gateway.url}{path}", "-H", "content-type: application/json"]
        done = subprocess.run(
            [*command, "-d", json.dumps(body)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    body = {"model": "chat", "messages": QUESTION, **SAMPLING}
    answer = json.loads(curl("/v1/chat/completions", body))
    content = answer["choices"][0]["message"]["content"]
    lines = curl("/v1/chat/completions", {**body, "stream": True}).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(piece.get("content") or "" for piece in pieces) == content
    status = ("--output", "/dev/null", "--write-out", "%{http_code}")
    assert curl("/v1/completions", {"model": "nobody"}, *status) == "404"


def test_what_is_asked_without_a_body(gateway: HttpGateway) -> None:
    assert gateway.http.get("/version").json()["version"].count(".") == 2
    load = gateway.http.get("/load", params={"model": "chat"})
    assert load.json() == {"server_load": 0}
    assert gateway.http.get("/load").status_code == 400  # of which?
    # Of the models that were told to tell it only.
    info = gateway.http.get("/tokenizer_info", params={"model": "chat"})
    assert info.status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/messages", {"max_tokens": 4, "messages": QUESTION}, 200),
        ("/v1/messages/count_tokens", {"messages": QUESTION}, 200),
        ("/invocations", {"messages": QUESTION, "max_tokens": 4}, 200),
        (
            "/v1/chat/completions/batch",
            {"messages": [QUESTION, QUESTION], "max_tokens": 4},
            200,
        ),
        (
            "/generative_scoring",
            {"query": "Paris?", "items": ["yes", "no"], "label_token_ids": [8, 9]},
            200,
        ),
        # Only where the model was loaded with enable_scale_out.
        ("/v1/completions/render", {"prompt": "hello"}, 403),
        # Of pooling models.
        ("/v1/embeddings", {"input": "hello"}, 404),
        ("/v1/audio/transcriptions", {}, 501),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/etc"}, 501),
        ("/collective_rpc", {"method": "exit"}, 501),
    ],
)
def test_the_other_routes_answer(
    gateway: HttpGateway, path: str, body: dict[str, Any], status: int
) -> None:
    answer = gateway.http.post(path, json={"model": "chat", **body})
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"model": "chat", "messages": "hello"},
        {"model": "chat", "messages": [{"role": "nobody", "content": {}}]},
        {"model": "chat", "messages": QUESTION, "temperature": "warm"},
        {"model": "chat", "messages": QUESTION, "max_tokens": 10**9},
        {"model": "chat", "messages": QUESTION, "tools": [{"type": "x"}]},
        {"model": "chat", "messages": QUESTION, "response_format": {"type": "x"}},
        {"model": "chat"},
    ],
)
def test_wrong_types_are_answered(gateway: HttpGateway, body: Any) -> None:
    answer = gateway.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_unknown_fields_are_no_error_and_large_bodies_are_read(
    gateway: HttpGateway,
) -> None:
    """As in vLLM's server; a prompt of ten million letters is vLLM's to refuse."""
    body = {"model": "chat", "messages": QUESTION, "max_tokens": 1, "no_field": 7}
    assert gateway.http.post("/v1/chat/completions", json=body).status_code == 200
    large: dict[str, Any] = {"model": "chat", "prompt": "a " * 5_000_000}
    answer = gateway.http.post("/v1/completions", json=large)
    assert answer.status_code == 400
    assert gateway.complete("chat")


# ------------------------------------------------------------ pooling models


def test_embeddings_are_plain_vllms(
    gateway: HttpGateway, models: Client, embedded: dict[str, list[float]]
) -> None:
    """In the same pool, on the same rank as a model that generates; also after each
    has made room for the other, and at both levels of sleep."""
    for level in (0, 1, 2):
        if level:
            models.sleep("minilm", level)
        answer = gateway.openai.embeddings.create(
            model="minilm", input=list(embedded), encoding_format="float"
        )
        assert phases(models)["minilm"] == "ready"
        for each, wanted in zip(answer.data, embedded.values(), strict=True):
            assert each.embedding == pytest.approx(wanted, abs=1e-5)
        if level == 0:
            assert gateway.complete("chat").startswith(" Paris")
            models.switch("chat", "minilm")
    wait_until(
        models,
        lambda status: num_requests(status, "minilm") == 0,
        10,
        "the end of each request",
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": [101, 7592, 102]}),
        ("/v2/embed", {"texts": ["hello"]}),
        ("/pooling", {"input": "hello"}),
        ("/score", {"text_1": "hello", "text_2": ["hello", "goodbye"]}),
        ("/v1/score", {"text_1": "hello", "text_2": ["hello", "goodbye"]}),
        ("/rerank", {"query": "hello", "documents": ["hello", "goodbye"]}),
        ("/v1/rerank", {"query": "hello", "documents": ["hello", "goodbye"]}),
        ("/v2/rerank", {"query": "hello", "documents": ["hello", "goodbye"]}),
        ("/tokenize", {"prompt": "hello"}),
        ("/invocations", {"input": "hello"}),
    ],
)
def test_the_routes_of_pooling_models(
    gateway: HttpGateway, path: str, body: dict[str, Any]
) -> None:
    answer = gateway.http.post(path, json={"model": "minilm", **body})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    if "score" in path:
        same, other = (each["score"] for each in content["data"])
        assert same == pytest.approx(1.0, abs=1e-4)
        assert other < same
    if "rerank" in path:
        assert content["results"][0]["document"]["text"] == "hello"


def test_a_pooling_model_does_not_generate(
    gateway: HttpGateway, models: Client
) -> None:
    models.wake_up("minilm")
    with pytest.raises(CommandRejected, match="does not support generation"):
        models.generate("minilm", "hello", SAMPLING)
    refused = gateway.http.post(
        "/v1/completions", json={"model": "minilm", "prompt": "hello"}
    )
    assert refused.status_code == 404
    assert phases(models)["minilm"] == "ready"


# ------------------------------------------------------------ adapters


def test_an_adapter_is_a_model_of_its_own(
    gateway: HttpGateway, models: Client, tuned: Expected
) -> None:
    """On every rank, and after both levels of sleep; by its name alone."""
    assert tuned.with_adapter != tuned.without
    for level in (0, 1, 2):
        if level:
            models.sleep("base", level)
        for name, wanted in (("tuned", tuned.with_adapter), ("base", tuned.without)):
            answer = gateway.openai.completions.create(
                model=name, prompt=tuned.prompt, **SAMPLING
            )
            assert answer.model == name
            assert answer.choices[0].text == wanted
    assert phases(models)["base"] == "ready"
    card = gateway.http.get("/v1/models/tuned").json()
    assert (card["parent"], card["state"]) == ("base", "ready")
    assert "tuned" in {each.id for each in gateway.openai.models.list()}


def test_an_adapter_has_its_name_alone(models: Client, tuned: Expected) -> None:
    with pytest.raises(CommandRejected, match=r"'tuned' is in use by engine 'base'"):
        models.load("other", tuned.model, ranks=[1], asleep=True, **tuned.engine_args)


# ------------------------------------------------------------ odd bodies

ODD_ANSWER_S = 30.0


def test_no_body_harms_anybody(
    gateway: HttpGateway, models: Client, tuned: Expected
) -> None:
    """Of an engine over two ranks: each is answered below 500, in time; then it gives
    the same tokens as before, and so do others, in the same processes."""
    names = ("base", "piped", "chat")
    generations = {e.name: e.generation for e in models.status().engines}
    before = {name: gateway.complete(name, tuned.prompt) for name in names}
    processes = pids(models)
    wrong = []
    for title, route, body in bodies("base", "minilm"):
        try:
            answer = post(gateway, route, body)
        except httpx.TimeoutException:
            wrong.append((title, "no answer"))
        else:
            if answer.status_code >= 500:
                wrong.append((title, answer.text[:300]))
    assert wrong == []
    assert {name: gateway.complete(name, tuned.prompt) for name in names} == before
    assert before["base"] == tuned.without
    assert pids(models) == processes
    assert {e.name: e.generation for e in models.status().engines} == generations


def post(gateway: HttpGateway, route: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return gateway.http.post(route, content=body, headers=headers, timeout=ODD_ANSWER_S)


@pytest.mark.parametrize("model", ["base", "chat"])
@pytest.mark.parametrize(
    "outputs",
    [
        {"grammar": "root ::= root root"},
        {"grammar": 'root ::= "b" dead\ndead ::= dead dead'},
        {"json": {"$ref": "#"}},
    ],
)
def test_a_grammar_of_nothing_is_the_callers_fault(
    gateway: HttpGateway, model: str, outputs: dict[str, Any]
) -> None:
    """Plain vLLM says 500 and no more. Here it says why, in a stream as well."""
    body = {"model": model, "prompt": "hello", "max_tokens": 8}
    body["structured_outputs"] = outputs
    answer = gateway.http.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert NO_WAY_ON in answer.json()["error"]["message"]
    streamed = gateway.http.post("/v1/completions", json={**body, "stream": True})
    lines = [line for line in streamed.text.splitlines() if "error" in line]
    (error,) = [json.loads(line.removeprefix("data: "))["error"] for line in lines]
    assert error["code"] == 400
