"""vLLM's OpenAI server over a real pool: every answer is the engine's own, whatever
sleeps, wakes or goes away on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.at_rest import ranks_at_rest
from tests.e2e.pools import (
    ENGINE_ARGS,
    LONG_ARGS,
    SAMPLING,
    eventually,
    meanwhile,
    pids,
    running_pool,
    wait_until,
)
from tests.members import free_port, standing_still
from vllm_resident import Client, CommandRejected, PoolStatus

START_S = 180.0
PROMPT = "The capital of France is"
# Long enough to be in the middle of; of a tiny model with many prompts.
LONG: dict[str, Any] = {"max_tokens": 480, "temperature": 0}
ENDLESS = {"ignore_eos": True}
MANY = ["hi"] * 16

pytestmark = pytest.mark.timeout(300)


class HttpGateway:
    """One gateway process; `url` is where it listens."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120.0)
        self.openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0
        )

    def complete(self, model: str, prompt: str = PROMPT, **more: Any) -> str:
        """The text of a completion by the official client."""
        answer = self.openai.completions.create(
            model=model, prompt=prompt, **{**SAMPLING, **more}
        )
        return answer.choices[0].text

    def stream(self, model: str, **more: Any) -> Any:
        """A long stream's chunks, that does not end by itself for a while."""
        arguments: dict[str, Any] = {**LONG, **more}
        return self.openai.completions.create(
            model=model, prompt=PROMPT, stream=True, extra_body=ENDLESS, **arguments
        )


@contextmanager
def running_gateway(
    pool: Client, folder: Path, log: Path, *options: str, **environment: str
) -> Iterator[HttpGateway]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm_resident.gateway", *options]
    command += ["--pool", pool.status().pool, "--controller", pool.endpoint]
    command += ["--http", f"127.0.0.1:{port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "VLLM_RESIDENT_DIR": str(folder), **environment},
        )
    gateway = HttpGateway(process, url)
    try:
        wait_listening(gateway, log)
        yield gateway
    finally:
        gateway.http.close()
        gateway.openai.close()
        process.kill()
        process.wait()


def wait_listening(gateway: HttpGateway, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert gateway.process.poll() is None, log.read_text()[-3000:]
        try:
            if gateway.http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"it does not listen:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def models(
    shared_pool: Client, checkpoints: dict[str, str], smollm2: str
) -> Iterator[Client]:
    """A pool with "chat" awake on rank 0, and asleep on its ranks "tiny" and "wide"."""
    shared_pool.apply([])
    shared_pool.load("tiny", checkpoints["llama"], ranks=[0], asleep=True, **LONG_ARGS)
    shared_pool.load(
        "wide",
        checkpoints["qwen3"],
        ranks=[0, 1],
        asleep=True,
        tensor_parallel_size=2,
        **LONG_ARGS,
    )
    shared_pool.load("chat", smollm2, ranks=[0], **LONG_ARGS)
    yield shared_pool
    shared_pool.apply([])


@pytest.fixture(scope="module")
def gateway(
    models: Client, pool_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpGateway]:
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    with running_gateway(models, pool_folder, log) as gateway:
        yield gateway
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(30) == 0, log.read_text()[-3000:]
        assert not list((pool_folder / "e2e").glob("http-*"))
        assert "Traceback" not in log.read_text()


@pytest.fixture
def chat(models: Client, gateway: HttpGateway) -> str:
    models.wake_up("chat")
    return "chat"


def phases(pool: Client) -> dict[str, str]:
    return {engine.name: engine.phase for engine in pool.status().engines}


def phase(status: PoolStatus, name: str) -> str:
    return next(e for e in status.engines if e.name == name).phase


def num_requests(status: PoolStatus, name: str) -> int:
    return next(e for e in status.engines if e.name == name).num_requests


# ------------------------------------------------------------ answers


def test_completions_are_the_engines_own(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    own = models.generate(chat, PROMPT, SAMPLING)[0]
    assert gateway.complete(chat) == own.text
    assert own.text.startswith(" Paris")


def test_a_chat_answers(gateway: HttpGateway, chat: str) -> None:
    answer = gateway.openai.chat.completions.create(
        model=chat,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    assert answer.model == chat
    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_stream_adds_up(gateway: HttpGateway, chat: str) -> None:
    messages: Any = [{"role": "user", "content": "Say something about Paris."}]
    arguments: dict[str, Any] = {"model": chat, "messages": messages, **SAMPLING}
    whole = gateway.openai.chat.completions.create(**arguments)
    pieces = list(gateway.openai.chat.completions.create(stream=True, **arguments))
    texts = [p.choices[0].delta.content or "" for p in pieces]
    assert sum(map(bool, texts)) > 3
    assert "".join(texts) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_grammars_logprobs_and_several_sequences(
    gateway: HttpGateway, chat: str
) -> None:
    answer = gateway.openai.completions.create(
        model=chat,
        prompt=PROMPT,
        n=2,
        logprobs=2,
        max_tokens=8,
        seed=3,
        extra_body={"structured_outputs": {"choice": [" Berlin", " Rome"]}},
    )
    assert len(answer.choices) == 2
    assert all(c.text in (" Berlin", " Rome") for c in answer.choices)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs


def test_two_ranks_answer_as_through_the_pool(
    gateway: HttpGateway, models: Client
) -> None:
    """TP=2, woken by the first request; followers see every request in lockstep."""
    text = gateway.complete("wide", "hello world")
    assert phases(models)["wide"] == "ready"
    assert text == models.generate("wide", "hello world", SAMPLING)[0].text
    texts = [gateway.complete("wide", f"fox {n}", temperature=1.0) for n in range(4)]
    assert len(texts) == 4
    assert phases(models)["wide"] == "ready"  # nobody diverged


# ------------------------------------------------------------ on demand


def test_models_wake_when_they_are_called(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    wanted = gateway.complete(chat)
    tiny = gateway.complete("tiny", "hello world")
    assert phases(models)["tiny"] == "ready"
    assert phases(models)["chat"] == "asleep"
    assert gateway.complete(chat) == wanted
    assert gateway.complete("tiny", "hello world") == tiny
    assert tiny == models.generate("tiny", "hello world", SAMPLING)[0].text


def test_two_called_at_once_take_turns(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    """On one rank, in one moment: each caller gets its own model's answer."""
    wanted = {name: gateway.complete(name) for name in (chat, "tiny")}
    wrong: list[str] = []

    def caller(name: str) -> None:
        answers = [gateway.complete(name) for _ in range(3)]
        wrong.extend(text for text in answers if text != wanted[name])

    callers = [
        threading.Thread(target=caller, args=(name,))
        for name in (chat, "tiny")
        for _ in range(3)
    ]
    for each in callers:
        each.start()
    for each in callers:
        each.join(120)
    assert not any(each.is_alive() for each in callers)
    assert wrong == []


def test_models_are_listed(gateway: HttpGateway, chat: str) -> None:
    assert sorted(m.id for m in gateway.openai.models.list()) == [
        "chat",
        "tiny",
        "wide",
    ]
    assert gateway.openai.models.retrieve(chat).id == chat
    cards = gateway.http.get("/v1/models").json()["data"]
    assert {card["id"]: card["state"] for card in cards}[chat] == "ready"


# ------------------------------------------------------------ what goes wrong


def test_an_unknown_model_is_404(gateway: HttpGateway) -> None:
    with pytest.raises(openai.NotFoundError, match="'chat', 'tiny', 'wide'"):
        gateway.complete("nobody")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{nope", 400),
        (b"[]", 400),
        (b'{"prompt": "x"}', 400),  # of several models, which?
        (b'{"model": "chat", "prompt": "x", "max_tokens": -1}', 400),
        (b'{"model": "chat", "prompt": {"no": "text"}}', 400),
    ],
)
def test_a_bad_request_is_answered(
    gateway: HttpGateway, chat: str, body: bytes, status: int
) -> None:
    answer = gateway.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert gateway.complete(chat)


@pytest.mark.parametrize(("model", "prompt"), [("chat", PROMPT), ("wide", MANY)])
def test_leaving_a_stream_aborts_its_request(
    gateway: HttpGateway, models: Client, model: str, prompt: str | list[str]
) -> None:
    leader = models.status().ranks[0].pid
    body = {"model": model, "prompt": prompt, "stream": True, **LONG, **ENDLESS}
    with gateway.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        with standing_still(leader):
            wait_until(models, lambda s: num_requests(s, model) > 0, 20, "the count")
    wait_until(models, lambda s: num_requests(s, model) == 0, 30, "the abort")
    assert gateway.complete(model)


def test_falling_asleep_ends_a_stream(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    (leader, _) = pids(models)
    stream = gateway.stream(chat)
    pieces = [next(stream)]
    with meanwhile(
        models, chat, leader, command=lambda: models.sleep(chat, drain_s=0.0)
    ):
        pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "abort"
    time.sleep(2.5)
    assert phases(models)[chat] == "asleep"  # nobody woke it for what was aborted


def test_draining_lets_a_stream_finish_and_later_ones_wait(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    late: list[threading.Thread] = []

    def is_waited_for(status: PoolStatus) -> bool:
        """Until the gateway has heard that it drains, calls go to it still."""
        late.append(threading.Thread(target=gateway.complete, args=(chat,)))
        late[-1].start()
        return bool(status.waiting.get(chat))

    leader = models.status().ranks[0].pid
    stream = gateway.stream(chat, max_tokens=230)
    pieces = [next(stream)]
    sleeping = threading.Thread(
        target=lambda: models.sleep(chat, drain_s=120), daemon=True
    )
    # So that it does not end meanwhile.
    with standing_still(leader):
        sleeping.start()
        wait_until(models, lambda s: phase(s, chat) == "draining", 10, "the draining")
        wait_until(models, is_waited_for, 15, "a call that waits")
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    sleeping.join(120)
    for each in late:  # the gateway has woken it again
        each.join(60)
        assert not each.is_alive()
    assert phases(models)[chat] == "ready"


def test_what_reaches_a_sleeper_is_refused_where_nothing_makes_room(
    gateway: HttpGateway, models: Client, checkpoints: dict[str, str]
) -> None:
    """The gateway takes seconds to read the prompt, and its engine sleeps by then."""

    def is_with_its_model(_: PoolStatus) -> bool:
        counted = 'gateway_requests_in_flight{model_name="tiny"} 1.0'
        return counted in gateway.http.get("/metrics").text

    assert gateway.complete("tiny")
    body = {"model": "tiny", "prompt": "fox " * 2**21, "truncate_prompt_tokens": 8}
    answers: list[httpx.Response] = []
    caller = threading.Thread(
        target=lambda: answers.append(gateway.http.post("/v1/completions", json=body))
    )
    caller.start()
    wait_until(models, is_with_its_model, 30, "the call")
    stays: dict[str, Any] = {"ranks": [0], "pinned": True, **ENGINE_ARGS}
    try:
        # So that it is not done before.
        with standing_still(gateway.process.pid):
            models.sleep("tiny")
            models.load("stays", checkpoints["qwen3"], **stays)
        caller.join(30)
        assert [answer.status_code for answer in answers] == [503]
        assert "no room" in answers[0].json()["error"]["message"]
        assert answers[0].headers["retry-after"]
        wait_until(models, lambda s: num_requests(s, "tiny") == 0, 30, "the abort")
    finally:
        with contextlib.suppress(CommandRejected):
            models.unload("stays")
        caller.join(60)


BUILD_FRONTEND = """if True:
    import sys
    from vllm_resident import CommandRejected, EngineSpec
    from vllm_resident.gateway.__main__ import prepare_imports
    prepare_imports()
    from vllm_resident.gateway.frontend import VllmFrontend
    model, folder = sys.argv[1:]
    spec = EngineSpec("a", model, engine_args={"max_model_len": 64})
    try:
        VllmFrontend.build(spec, f"ipc://{folder}/in", f"ipc://{folder}/out")
    except CommandRejected as error:
        print(error)
"""


def test_a_leader_that_went_away_is_not_listened_for_for_ever(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD_FRONTEND, checkpoints["llama"], str(tmp_path)],
        env={**os.environ, "VLLM_ENGINE_READY_TIMEOUT_S": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "its leader did not say that it is ready" in done.stdout


def test_an_engine_loaded_anew_is_served_anew(
    gateway: HttpGateway, models: Client, checkpoints: dict[str, str]
) -> None:
    text = gateway.complete("tiny", "hello world")
    models.unload("tiny")
    with pytest.raises(openai.NotFoundError):
        gateway.complete("tiny")
    models.load("tiny", checkpoints["llama"], ranks=[0], asleep=True, **LONG_ARGS)
    assert gateway.complete("tiny", "hello world") == text


# ------------------------------------------------------------ beside inference


def test_the_pools_routes_are_the_clients(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    status = gateway.http.get("/pool").json()
    assert {e["name"] for e in status["engines"]} == {"chat", "tiny", "wide"}
    report = gateway.http.post("/pool/sleep", json={"name": chat}).json()
    assert report["action"] == "sleep"
    assert phases(models)[chat] == "asleep"
    with gateway.http.stream("GET", "/pool/events") as events:
        lines = events.iter_lines()
        assert next_event(lines, "status")["pool"] == "e2e"
        # Another client's commands.
        began = time.time()
        models.wake_up(chat)
        woken = own_switch(lines, "wake_up", began, [chat])
        assert woken["report"]["error"] == ""
        models.sleep(chat)
        own_switch(lines, "sleep", began, [chat])
    refused = gateway.http.post("/pool/sleep", json={"name": "nobody"})
    assert refused.status_code == 409
    assert refused.json()["error"]["kind"] == "CommandRejected"


# Two clocks of one machine differ by less, and the switch before was over earlier.
CLOCKS_S = 0.01


def own_switch(
    lines: Iterator[str], action: str, since: float, engines: list[str]
) -> Any:
    """The data of the first switch of that kind, of those engines, that began since:
    who begins to listen is told first of those that ended before, anybody's."""
    while True:
        ended = next_event(lines, "switch")
        found = ended["report"]["action"], ended["engines"]
        if found == (action, engines) and ended["began_unix_s"] > since - CLOCKS_S:
            return ended


def next_event(lines: Iterator[str], kind: str) -> Any:
    """The data of the next server-sent event of that kind, which comes within some
    seconds: each has a status."""
    num_statuses = 0
    while (line := next(lines)) != f"event: {kind}":
        num_statuses += line == "event: status"
        assert num_statuses < 20, f"no {kind}"
    return json.loads(next(lines).removeprefix("data: "))


def num_steps(gateway: HttpGateway, model: str) -> list[float]:
    """Of each rank that has taken any, as the metrics say."""
    name = f'lockstep_step_seconds_count{{model_name="{model}"'
    lines = gateway.http.get("/metrics").text.splitlines()
    return [float(line.split()[-1]) for line in lines if name in line]


def test_steps_and_switches_are_metrics(
    gateway: HttpGateway, models: Client, chat: str
) -> None:
    """Both ranks of an engine counted the same steps; the switch that brought it up was
    nobody's command."""
    gateway.complete("wide")

    def is_counted(_: PoolStatus) -> bool:
        counts = num_steps(gateway, "wide")
        return len(counts) == 2 and counts[0] == counts[1] > 0

    wait_until(models, is_counted, 60.0, "heartbeats bring it")
    page = gateway.http.get("/metrics").text
    assert 'vllm_resident:switch_seconds_count{action="wake_up"' in page
    assert 'engine_state{model_name="wide",rank="1",state="awake"} 1.0' in page


def test_metrics_are_of_all_models(gateway: HttpGateway, chat: str) -> None:
    gateway.complete(chat)
    gateway.complete("tiny")
    page = gateway.http.get("/metrics").text
    for name in (chat, "tiny"):
        counted = f'vllm:generation_tokens_total{{engine="0",model_name="{name}"}}'
        (line,) = [each for each in page.splitlines() if each.startswith(counted)]
        assert float(line.split()[-1]) > 0
    assert page.count("# TYPE vllm:generation_tokens_total counter") <= 1


def test_a_killed_gateway_leaves_nothing_running(
    models: Client, pool_folder: Path, tmp_path: Path
) -> None:
    """Its requests are aborted on both ranks, and its sockets closed, within seconds;
    with a key, which its callers need."""
    before = ranks_at_rest(models)
    environment = {"VLLM_API_KEY": "secret"}
    log = tmp_path / "gateway.log"
    with running_gateway(models, pool_folder, log, **environment) as gateway:
        with pytest.raises(openai.AuthenticationError):
            gateway.complete("wide")
        client = gateway.openai.with_options(api_key="secret")
        stream = client.completions.create(
            model="wide", prompt=MANY, stream=True, extra_body=ENDLESS, **LONG
        )
        next(iter(stream))
        with standing_still(before[0].pid):
            wait_until(models, lambda s: num_requests(s, "wide") > 0, 20, "the count")
        gateway.process.kill()
        wait_until(models, lambda s: num_requests(s, "wide") == 0, 30, "the abort")
    assert models.generate("wide", "hello", SAMPLING)

    def check() -> None:
        for old, new in zip(before, ranks_at_rest(models), strict=True):
            assert new.pid == old.pid
            assert new.num_sockets <= old.num_sockets

    eventually(check)


def test_a_lost_rank_fails_its_streams_and_serves_again(
    tmp_path: Path, checkpoints: dict[str, str]
) -> None:
    """Nobody waits for an engine whose process is dead; torchrun brings it back."""
    with (
        short_folder() as folder,
        running_pool("lost", folder, num_ranks=1, max_restarts=1) as pool,
        running_gateway(pool, folder, tmp_path / "gateway.log") as gateway,
    ):
        pool.load("tiny", checkpoints["llama"], **LONG_ARGS)
        rank = pool.status().ranks[0].pid
        text = gateway.complete("tiny", "hello world")
        body = {"model": "tiny", "prompt": MANY, "stream": True, **LONG}
        began = time.monotonic()
        with gateway.http.stream("POST", "/v1/completions", json=body | ENDLESS) as got:
            lines = got.iter_lines()
            next(lines)
            os.kill(rank, signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: ")]
        assert "error" in json.loads(rest[-2].removeprefix("data: "))
        assert rest[-1] == "data: [DONE]"
        assert time.monotonic() - began < 15
        # The next one waits until the rank is back and its engine restored.
        assert gateway.complete("tiny", "hello world") == text


def test_up_http_serves_declared_models_and_ends_with_the_pool(
    tmp_path: Path, checkpoints: dict[str, str]
) -> None:
    config = tmp_path / "pool.toml"
    arguments = {key: json.dumps(value) for key, value in LONG_ARGS.items()}
    lines = [f"model = {json.dumps(checkpoints['llama'])}"]
    lines += [f"{key} = {value}" for key, value in arguments.items()]
    tables = [f"[models.{name}]\n" + "\n".join(lines) for name in ("tiny", "other")]
    limits = "[pool]\nmin_residency_s = 60\nmax_queue = 1\nidle_ttl_s = 2\n"
    limits += 'response_role = "helper"\nchat_template = "{{ messages[0].content }}"'
    config.write_text("\n".join([limits, *tables]))
    with short_folder() as folder:
        environment = {**os.environ, "VLLM_RESIDENT_DIR": str(folder)}

        def run(*words: str) -> Any:
            done = subprocess.run(
                [sys.executable, "-m", "vllm_resident.cli", *words, "--json"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                timeout=START_S,
                check=True,
            )
            return json.loads(done.stdout)

        port = free_port()
        options = ["--config", str(config), "--http", f":{port}"]
        started = run("up", "--detach", "--nproc-per-node", "1", *options)
        try:
            assert started["http"] == f"http://127.0.0.1:{port}/v1"
            answer = httpx.post(
                f"{started['http']}/completions",
                json={"model": "tiny", "prompt": "hello", "max_tokens": 4},
                timeout=120.0,
            )
            assert answer.status_code == 200, answer.text
            check_options_of_all(started["http"])
            check_limits(started["http"].removesuffix("/v1"))
        finally:
            run("shutdown")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) != 0:
                    break
            time.sleep(0.2)
        else:
            raise AssertionError("the gateway outlives its pool")


def check_options_of_all(url: str) -> None:
    """A checkpoint without a template has the pool's, and speaks in the pool's role."""
    messages = [{"role": "user", "content": "hello"}]
    answer = httpx.post(
        f"{url}/chat/completions",
        json={"model": "tiny", "messages": messages, "max_tokens": 4},
        timeout=60.0,
    )
    assert answer.json()["choices"][0]["message"]["role"] == "helper", answer.text


def check_limits(url: str) -> None:
    """One call waits for "other" while "tiny" is busy, a second is one too many; when
    nobody calls any more, both fall asleep."""
    answers: list[httpx.Response] = []
    other = {"model": "other", "prompt": "hello", "max_tokens": 4}
    busy = {"model": "tiny", "prompt": MANY, "stream": True, **LONG, **ENDLESS}
    with httpx.Client(base_url=url, timeout=60.0) as http:

        def ask() -> None:
            answers.append(http.post("/v1/completions", json=other))

        def wait_for(key: str, wanted: Any) -> None:
            deadline = time.monotonic() + 60
            while (found := _seen(http.get("/pool").json(), key)) != wanted:
                assert time.monotonic() < deadline, found
                time.sleep(0.05)

        waiting = threading.Thread(target=ask)
        with http.stream("POST", "/v1/completions", json=busy) as stream:
            next(stream.iter_lines())
            waiting.start()
            wait_for("waiting", {"other": 1})
            refused = http.post("/v1/completions", json=other)
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["retry-after"]) > 0
        assert "max_queue" in refused.json()["error"]["message"]
        waiting.join(60)
        assert [answer.status_code for answer in answers] == [200]
        wait_for("phases", {"asleep"})


def _seen(status: dict[str, Any], key: str) -> Any:
    return (
        status["waiting"]
        if key == "waiting"
        else {engine["phase"] for engine in status["engines"]}
    )


@contextmanager
def short_folder() -> Iterator[Path]:
    """Unix socket paths hold 107 bytes: pytest's own folders are too deep."""
    with tempfile.TemporaryDirectory(prefix="vr-") as folder:
        yield Path(folder)
