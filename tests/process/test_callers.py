"""The callers of the benchmarks, against a server that streams what it is told to: a
simulated one, so that what they should see is known."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from benchmarks import callers, mixed, serve
from benchmarks.callers import Figures, Heard, Load
from benchmarks.mixed import Call, Callers, Seen
from benchmarks.serve import Against, FirstTokens, Row, Turn

TOKEN_S = 0.005
WHAT = {"num_words": 4, "max_tokens": 4}


class SimulatedServer:
    """Answers completions with the tokens 0, 1, 2, ... or as its `fault` says."""

    def __init__(self) -> None:
        self.fault = ""
        self.url = ""
        self.num_at_once = self.most_at_once = self.num_left = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
        except ValueError:
            return problem(400)
        if not isinstance(body, dict) or body.get("max_tokens", 0) < 1:
            return problem(400)
        if body["model"] == "nobody":
            return problem(404)
        if self.fault == "full":
            return problem(503, {"Retry-After": "1"})
        return await (self.stream if body.get("stream") else self.whole)(request, body)

    async def whole(
        self, _request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        choice = {
            "token_ids": self.tokens(body),
            "finish_reason": "abort" if self.fault == "abort" else "length",
        }
        model = "other" if self.fault == "model" else body["model"]
        return web.json_response({"model": model, "choices": [choice]})

    def tokens(self, body: dict[str, Any]) -> list[int]:
        tokens = list(range(body["max_tokens"]))
        if self.fault == "token":
            tokens[-1] += 100
        return tokens

    async def stream(
        self, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            for number, token in enumerate(self.tokens(body), 1):
                await asyncio.sleep(TOKEN_S)
                choice = {"text": "x", "token_ids": [token], "finish_reason": None}
                if number == body["max_tokens"]:
                    choice["finish_reason"] = "length"
                await self.send(answer, {"model": body["model"], "choices": [choice]})
            usage = {"completion_tokens": body["max_tokens"]}
            if body.get("stream_options"):
                await self.send(answer, {"choices": [], "usage": usage})
            if self.fault != "end":
                await answer.write(b"data: [DONE]\n\n")
        except ConnectionResetError:
            self.num_left += 1
        finally:
            self.num_at_once -= 1
        return answer

    async def send(self, answer: web.StreamResponse, event: dict[str, Any]) -> None:
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())


def problem(status: int, headers: dict[str, str] | None = None) -> web.Response:
    error = {"error": {"message": "no"}}
    return web.json_response(error, status=status, headers=headers)


@pytest.fixture
async def server() -> AsyncIterator[SimulatedServer]:
    simulated = SimulatedServer()
    app = web.Application()
    app.router.add_post("/v1/completions", simulated.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    simulated.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield simulated
    await runner.cleanup()


# ------------------------------------------------------------ for the benchmark


async def heard(server: SimulatedServer, load: Load) -> list[Heard]:
    return await asyncio.to_thread(callers.run, server.url, "m", load)


async def test_a_load_is_out_no_more_than_so_many_at_once(
    server: SimulatedServer,
) -> None:
    found = await heard(server, callers.closed("l", "", 9, 3, **WHAT))
    assert len(found) == 9
    assert server.most_at_once == 3
    for each in found:
        assert each.sent < each.first_byte <= each.first < each.last
        assert (each.num_tokens, each.text) == (4, "xxxx")
        assert each.last - each.sent >= 4 * TOKEN_S


async def test_fewer_tokens_than_asked_for_end_a_benchmark(
    server: SimulatedServer,
) -> None:
    server.fault = "full"
    with pytest.raises(RuntimeError, match="503"):
        await heard(server, callers.closed("l", "", 1, 1, **WHAT))


def test_schedules_are_the_same_each_time_and_prompts_differ() -> None:
    one, other = (callers.steady("l", "", 20, 2.0, **WHAT) for _ in range(2))
    assert one == other
    assert len({ask.prompt for ask in one.asks}) == 20
    arrivals = [ask.at_s for ask in one.asks]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(10.0, rel=0.5)


def test_figures_are_of_the_whole_and_of_the_middle_call() -> None:
    of = [
        Heard(0.0, 0.1, 1.0, 3.0, 11, ""),
        Heard(0.0, 0.1, 2.0, 2.5, 11, ""),
        Heard(1.0, 1.1, 4.0, 5.0, 11, ""),
    ]
    assert callers.figures(of) == Figures(33 / 5.0, 0.1, 2.0)


def test_a_row_is_by_the_better_of_the_others() -> None:
    def turns(*tokens: float) -> list[Turn]:
        return [Turn(Figures(each, 1 / each, 0.1), 0.01) for each in tokens]

    own = turns(90, 100, 95)
    slow, fast = turns(80, 80, 80), turns(100, 100, 100)
    row = Row("tp1_eight", "", [Against("a", own, slow), Against("b", own, fast)])
    assert row.throughput_ratio == pytest.approx(0.95)
    assert row.per_token_ratio == pytest.approx(1 / 0.95)
    assert not row.is_met
    assert Row("tp1_eight", "", [Against("a", own, slow)]).is_met
    document = row.as_json()
    assert document["rounds"] == 3
    assert document["gateway"]["tokens_per_s"] == 95


async def test_a_disturbed_turn_is_taken_again(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.4, 0.02])
    monkeypatch.setattr(serve, "SETTLE_S", 0.0)
    monkeypatch.setattr(serve.machine.Watch, "others_share", lambda _: next(shares))
    load = callers.closed("l", "", 1, 1, **WHAT)
    taken = await asyncio.to_thread(serve.turn, server.url, load)
    assert taken.others_share == 0.02
    assert taken.figures.tokens_per_s > 0


def test_own_work_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cores did is what this process did, here; then somebody else's too."""
    machine = serve.machine
    busy_s = [machine._own_s()]
    monkeypatch.setattr(machine, "_busy_s", lambda: busy_s[0])
    watch = machine.Watch()
    before = machine._own_s()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    busy_s[0] += machine._own_s() - before
    assert watch.others_share() < 0.1
    busy_s[0] += 100.0
    assert watch.others_share() > 1.0


def test_a_first_token_is_beside_that_of_vllms_server() -> None:
    first = FirstTokens([0.1, 0.1], [0.1, 0.1], [0.2, 0.4], [0.5, 0.5])
    rows = {row["name"]: row for row in first.rows()}
    assert rows["first_byte_asleep"]["added_s"] == pytest.approx(0.2)
    assert serve.missed([], rows.values()) == []
    slow = FirstTokens([0.1], [0.1], [0.36], [0.5])
    assert serve.missed([], slow.rows()) == ["first_byte_asleep"]


# ------------------------------------------------------------ for the soak

ANSWERS = {"m": [list(range(mixed.MAX_TOKENS))] * len(mixed.PROMPTS)}


async def seen(server: SimulatedServer, *manners: str) -> Seen:
    found = Seen()
    calls = [Call(0.0, "m", manner, 0, 8) for manner in manners]
    await Callers(server.url, ANSWERS, random.Random(3), found).run(calls)
    return found


async def test_right_answers_are_right(server: SimulatedServer) -> None:
    found = await seen(server, "whole", "stream", "cancel")
    assert found.wrong == []
    assert found.by_manner == Counter(whole=1, stream=1, cancel=1)
    assert 17 <= found.num_tokens <= 23
    assert len(found.answer_s) == 3


async def test_who_cancels_leaves_in_the_middle(server: SimulatedServer) -> None:
    found = await seen(server, "cancel", "cancel", "cancel")
    await asyncio.sleep(TOKEN_S * 20)
    assert found.wrong == []
    assert server.num_left == 3


@pytest.mark.parametrize(
    ("fault", "manner"),
    [
        ("token", "whole"),
        ("token", "stream"),
        ("model", "whole"),
        ("abort", "whole"),
        ("end", "stream"),
    ],
)
async def test_wrong_answers_are_found_out(
    server: SimulatedServer, fault: str, manner: str
) -> None:
    server.fault = fault
    assert len((await seen(server, manner)).wrong) == 1


async def test_refusals_are_counted(server: SimulatedServer) -> None:
    server.fault = "full"
    found = await seen(server, "whole", "stream")
    assert (found.num_refused, found.wrong) == (2, [])


async def test_bad_requests_must_be_answered_as_such(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "BAD", mixed.BAD[:3])
    assert (await seen(server, *["bad"] * 9)).wrong == []
    # What vLLM refuses and this server answers.
    monkeypatch.setattr(mixed, "BAD", (({"temperature": "hot"}, 400),))
    server.fault = "full"
    assert (await seen(server, "bad")).num_refused == 1


def test_the_trace_has_calls_of_every_kind_for_every_model() -> None:
    names = [f"m{number}" for number in range(8)]
    calls = mixed.trace(random.Random(0), names, 60.0)
    assert {call.model for call in calls} == set(names)
    assert {call.manner for call in calls} == set(mixed.MANNERS)
    assert [call.at_s for call in calls] == sorted(call.at_s for call in calls)
    rate = len(calls) / 60
    assert rate == pytest.approx(mixed.BURST_RATE + mixed.STEADY_RATE, rel=0.4)
