"""What the gateway shows of the pool: its metrics, the feed of events, the page."""

from __future__ import annotations

import asyncio
import html.parser
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.test_gateway import FakePool, call, serving
from vllm_resident import EngineMemory, EngineStatus, PoolStatus, PoolUnreachable
from vllm_resident.controller import tally
from vllm_resident.controller.tally import Tally
from vllm_resident.gateway import feed as feeds
from vllm_resident.gateway import metrics, pool_metrics, pool_routes, status_page
from vllm_resident.gateway.feed import Event, Feed, Listener
from vllm_resident.messages import (
    EngineReport,
    PoolTotals,
    RankStatus,
    StepCount,
    SwitchEnded,
    SwitchMoved,
    SwitchReport,
    SwitchStatus,
)

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "vllm-resident.json"
# A label's value may be anything: a path, a quote, a line's end.
ODD = 'a "quoted\\path"\nand more'


def rank(number: int, phase: str = "ready") -> RankStatus:
    return RankStatus(
        number, phase, 7, ODD, "cpu", 0, ["chat"], 100 + number, 1000, 0.5, 11, 12, 13,
        14, 15, 16,
    )  # fmt: skip


def engine(name: str, phase: str, level: int = 0, **more: Any) -> EngineStatus:
    return EngineStatus(name, "/m", phase, 1, [0, 1], {}, 3, sleep_level=level, **more)


STATUS = PoolStatus(
    "p", "degraded", 2, 1, 60.0, [rank(0), rank(1, "lost")],
    [
        engine("chat", "ready", memory={0: EngineMemory(5, 6), 1: EngineMemory(7, 8)}),
        engine("one", "asleep", 1),
        engine("two", "asleep", 2),
        engine("coming", "building"),
        engine("ended", "failed", error="no"),
    ],
    num_stale_messages=2, num_protocol_errors=3, host_memory_bytes=2**30,
    models=["chat", "later"], waiting={"later": 4},
    switches=[SwitchStatus(1, "load", "c", "bringing_up", 1.0, 0.0, [], [])],
)  # fmt: skip


def counted() -> PoolTotals:
    counts = Tally()
    engine = EngineReport(
        "chat", "wake_up", 1, [0, 1], 0.3, {"read_weights": 0.2}, {}, {},
        rank_phases={0: {"read_weights": 0.2}, 1: {"read_weights": 0.1}},
    )  # fmt: skip
    for seconds in (0.3, 3.0):
        done = SwitchReport("wake_up", seconds, {}, [engine], path=["sleep", "wake_up"])
        tally.note_switch(counts, msgspec.structs.replace(done, unavailable_s=0.1))
    tally.note_steps(counts, 0, {"chat": StepCount(10, 0.5)})
    tally.note_divergence(counts, "chat", 1)
    tally.note_loss(counts, 1)
    tally.note_process(counts, 1, is_first=False)
    return tally.totals(counts)


def page_of(status: PoolStatus | None, totals: PoolTotals | None) -> dict[Any, float]:
    """The page as Prometheus reads it: values by name and labels."""
    page, _ = metrics.page({"chat": (1, 2)}, status, totals)
    seen: dict[Any, float] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in seen
            seen[key] = sample.value
    return seen


def value(page: dict[Any, float], name: str, **labels: str) -> float | None:
    return page.get((f"vllm_resident:{name}", frozenset(labels.items())))


# ------------------------------------------------------------ metrics


def test_the_pools_figures_are_metrics() -> None:
    page = page_of(STATUS, counted())
    assert value(page, "pool_up") == 1
    assert value(page, "pool_phase", phase="degraded") == 1
    assert value(page, "pool_phase", phase="ready") == 0
    assert value(page, "stale_messages_total") == 2
    assert value(page, "host_memory_budget_bytes") == 2**30
    assert value(page, "device_memory_budget_bytes") is None
    assert value(page, "rank_up", rank="0", host=ODD) == 1
    assert value(page, "rank_up", rank="1", host=ODD) == 0
    assert value(page, "queue_length", model_name="later") == 4
    assert value(page, "queue_length", model_name="chat") == 0
    assert value(page, "engine_requests", model_name="chat") == 3
    assert value(page, "switches_in_progress", action="load") == 1
    assert value(page, "gateway_requests_waiting", model_name="chat") == 1


def test_the_ledger_is_of_ranks_that_are_there() -> None:
    page = page_of(STATUS, counted())
    figures = {
        "rank_memory_used_bytes": 100,
        "rank_memory_total_bytes": 1000,
        "rank_file_descriptors": 11,
        "rank_threads": 12,
        "rank_shm_segments": 13,
        "rank_sockets": 14,
        "rank_process_groups": 15,
        "rank_engines": 16,
        "rank_heartbeat_age_seconds": 0.5,
    }
    for name, figure in figures.items():
        assert value(page, name, rank="0") == figure
        assert value(page, name, rank="1") is None
    assert value(page, "rank_losses_total", rank="1") == 1
    assert value(page, "rank_losses_total", rank="0") == 0
    assert value(page, "rank_restarts_total", rank="1") == 1


def test_no_figure_of_the_ledger_is_left_out() -> None:
    told_otherwise = {
        "rank",
        "phase",
        "pid",
        "host",
        "device",
        "incarnation",
        "engines",
    }
    figures = set(RankStatus.__struct_fields__) - told_otherwise
    assert set(pool_metrics._LEDGER) == figures


def test_engines_are_counted_by_state() -> None:
    page = page_of(STATUS, counted())
    states = {s: value(page, "engines", state=s) for s in pool_metrics.STATES}
    assert states == {
        "awake": 1, "asleep_1": 1, "asleep_2": 1, "moving": 1, "lost": 0, "failed": 1,
        "declared": 1,
    }  # fmt: skip
    for number in "01":
        labels = {"model_name": "two", "rank": number, "state": "asleep_2"}
        assert value(page, "engine_state", **labels) == 1
    labels = {"model_name": "chat", "rank": "1"}
    assert value(page, "engine_memory_bytes", **labels, place="host") == 8
    assert value(page, "engine_memory_bytes", **labels, place="device") == 7


def test_switches_steps_and_divergences_are_what_was_counted() -> None:
    page = page_of(STATUS, counted())
    kind = {"action": "wake_up", "path": "sleep>wake_up"}
    assert value(page, "switch_seconds_count", **kind, result="done") == 2
    assert value(page, "switch_seconds_sum", **kind, result="done") == 3.3
    buckets = {
        le: value(page, "switch_seconds_bucket", **kind, result="done", le=le)
        for le in ("0.25", "0.5", "5.0", "+Inf")
    }
    assert buckets == {"0.25": 0, "0.5": 1, "5.0": 2, "+Inf": 2}
    seconds = value(page, "switch_unavailable_seconds_total", **kind, result="done")
    assert seconds == pytest.approx(0.2)
    phase = {"move": "wake_up", "phase": "read_weights"}
    assert value(page, "switch_phase_seconds_sum", **kind, **phase) == 0.4
    on_rank = {"model_name": "chat", "rank": "1"}
    assert value(page, "move_seconds_sum", **on_rank, move="wake_up") == 0.2
    assert value(page, "move_seconds_count", **on_rank, move="wake_up") == 2
    seconds = value(page, "move_phase_seconds_sum", model_name="chat", **phase)
    assert seconds == 0.4
    steps = {"model_name": "chat", "rank": "0"}
    assert value(page, "lockstep_step_seconds_count", **steps) == 10
    assert value(page, "lockstep_step_seconds_sum", **steps) == 0.5
    assert value(page, "divergences_total", **on_rank) == 1


def test_a_pool_that_does_not_answer_is_a_metric_too() -> None:
    page = page_of(None, None)
    assert value(page, "pool_up") == 0
    assert value(page, "queue_length", model_name="later") is None
    assert value(page, "gateway_requests_in_flight", model_name="chat") == 2


def test_names_are_as_prometheus_would_have_them() -> None:
    """https://prometheus.io/docs/practices/naming: base units, counters in _total."""
    families = list(pool_metrics.families(STATUS, counted()))
    assert len({family.name for family in families}) == len(families) > 25
    for family in families:
        assert re.fullmatch(r"vllm_resident:[a-z][a-z_]*[a-z]", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(s|ms|mb|num)(_|$)|_total$", family.name)


async def test_metrics_are_served_also_while_the_pool_is_silent(tmp_path: Path) -> None:
    pool = FakePool(a="ready")
    async with serving(pool, tmp_path, keys=("secret",)) as app:
        pages = []
        for pool.error in (None, PoolUnreachable("gone")):
            pages.append(await text_of(app, "/metrics"))
        assert "vllm_resident:pool_up 1.0" in pages[0]
        assert "vllm_resident:pool_up 0.0" in pages[1]


async def text_of(app: Any, path: str, method: str = "GET") -> str:
    return (await answer_of(app, path, method))[1]


async def answer_of(
    app: Any, path: str, method: str = "GET"
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of a request without a key."""
    sent: list[Any] = []
    headers = [(b"host", b"127.0.0.1:8000")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    text = b"".join(part.get("body", b"") for part in sent[1:]).decode()
    fields = {name.decode(): each.decode() for name, each in sent[0]["headers"]}
    return sent[0]["status"], text, fields


# ------------------------------------------------------------ the dashboard


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads(DASHBOARD.read_text())
    expressions = [
        target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    ]
    expressions += [
        each["query"]["query"] if isinstance(each["query"], dict) else each["query"]
        for each in board["templating"]["list"]
        if each["type"] == "query"
    ]
    asked = set(re.findall(r"vllm_resident:\w+", " ".join(expressions)))
    status = msgspec.structs.replace(STATUS, device_memory_bytes=2**34)
    there = {name for name, _ in page_of(status, counted())}
    assert asked <= there
    # And for all families there are, so that none is forgotten.
    shown = {name.removesuffix("_total") for name in asked}
    for family in pool_metrics.families(status, counted()):
        assert any(name.startswith(family.name) for name in shown), family.name


def test_the_dashboard_is_sane() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == "vllm-resident"
    assert board["title"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            assert expression.count("{") == expression.count("}")


# ------------------------------------------------------------ the feed


MOVED = SwitchMoved(call=1, switch=STATUS.switches[0])


def ended(sequence: int, session: str = "s") -> SwitchEnded:
    return SwitchEnded(
        call=1, session=session, sequence=sequence, number=sequence, age_s=1.0,
        cause="c", engines=["a"], report=SwitchReport("load", 1.0, {}, []),
    )  # fmt: skip


class WatchedPool:
    """A client whose watch gives what is put into `queue`; an error in it is raised."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.num_watches = 0
        self.num_asked = 0

    async def status(self) -> PoolStatus:
        self.num_asked += 1
        return STATUS

    async def watch(self) -> AsyncIterator[Any]:
        self.num_watches += 1
        try:
            while True:
                message = await self.queue.get()
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.num_watches -= 1


async def kinds_of(listener: Listener) -> list[str]:
    await listener.wait(2.0)
    return [event.id or event.kind for event in listener.take()]


async def test_all_listeners_share_one_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "STATUS_INTERVAL_S", 60.0)
    pool = WatchedPool()
    feed = Feed(pool)  # type: ignore[arg-type]
    pool.queue.put_nowait(ended(1))
    with feed.listening() as first:
        await asyncio.sleep(0.05)
        assert await kinds_of(first) == ["status", "s.1"]
        with feed.listening() as second:
            assert await kinds_of(second) == ["status", "s.1"]  # what it has missed
            pool.queue.put_nowait(ended(2))
            assert await kinds_of(first) == ["s.2"]
            assert await kinds_of(second) == ["s.2"]
            assert (pool.num_watches, pool.num_asked) == (1, 1)
        with feed.listening("s.1") as third:
            assert await kinds_of(third) == ["status", "s.2"]
    await asyncio.sleep(0.05)
    assert pool.num_watches == 0  # nobody listens


async def test_a_watch_that_broke_is_taken_up_without_telling_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "STATUS_INTERVAL_S", 60.0)
    monkeypatch.setattr(feeds, "RETRY_S", 0.01)
    pool = WatchedPool()
    with Feed(pool).listening() as listener:  # type: ignore[arg-type]
        for message in (ended(1), PoolUnreachable("gone"), ended(1), ended(2)):
            pool.queue.put_nowait(message)
        seen: list[str] = []
        while "s.2" not in seen:
            seen += await kinds_of(listener)
        assert seen == ["status", "s.1", "s.2"]
        # Another life of the controller counts anew.
        pool.queue.put_nowait(ended(1, "t"))
        assert await kinds_of(listener) == ["t.1"]


def test_a_listener_that_does_not_read_is_not_kept_more_and_more_for() -> None:
    async def fill() -> list[Event]:
        listener = Listener()
        for sequence in range(1000):
            switch = msgspec.structs.replace(MOVED.switch, elapsed_s=float(sequence))
            listener.put(Event("status", STATUS))
            listener.put(Event("progress", switch))
            listener.put(feeds._event(ended(sequence + 2)))
        return listener.take()

    events = asyncio.run(fill())
    assert [event.kind for event in events[:2]] == ["status", "progress"]
    newest = events[1].data
    assert isinstance(newest, SwitchStatus)
    assert newest.elapsed_s == 999
    assert len(events) == 2 + feeds.MAX_ENDED
    assert events[-1].id == "s.1001"


def test_a_switch_that_has_ended_is_not_told_to_be_under_way() -> None:
    async def fill() -> list[str]:
        listener = Listener()
        listener.put(Event("progress", MOVED.switch))
        listener.put(feeds._event(ended(MOVED.switch.number)))
        return [event.kind for event in listener.take()]

    assert asyncio.run(fill()) == ["switch"]


# ------------------------------------------------------------ events over HTTP


class Stream:
    """One request for the events: what was sent, and how the caller leaves."""

    def __init__(self, app: Any, **headers: str) -> None:
        self.parts: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = asyncio.Event()
        fields = {"host": "127.0.0.1", **headers}
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/pool/events",
            "headers": [
                (k.replace("_", "-").encode(), v.encode()) for k, v in fields.items()
            ],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self.parts.put))

    async def _receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def next(self) -> Any:
        return await asyncio.wait_for(self.parts.get(), 5)

    async def text(self) -> str:
        return str((await self.next())["body"].decode())


class SeenPool(FakePool, WatchedPool):  # type: ignore[misc]
    def __init__(self) -> None:
        FakePool.__init__(self, a="ready")
        WatchedPool.__init__(self)


async def test_events_are_as_the_standard_has_them(tmp_path: Path) -> None:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    pool = SeenPool()
    pool.queue.put_nowait(ended(7))
    async with serving(pool, tmp_path) as app:
        stream = Stream(app)
        begun = await stream.next()
        headers = dict(begun["headers"])
        assert begun["status"] == 200
        assert headers[b"content-type"] == b"text/event-stream"
        assert headers[b"cache-control"] == b"no-store"
        assert await stream.text() == "retry: 2000\n\n"
        text = ""
        while "s.7" not in text:
            text += await stream.text()
        blocks = [each for each in text.split("\n\n") if not each.startswith(":")]
        (switch,) = [each for each in blocks if "s.7" in each]
        number, kind, data = switch.splitlines()
        assert (number, kind) == ("id: s.7", "event: switch")
        document = json.loads(data.removeprefix("data: "))
        assert document["engines"] == ["a"]
        assert document["report"]["action"] == "load"
        assert any(each.startswith("event: status\ndata: {") for each in blocks)
        stream.gone.set()
        await asyncio.wait_for(stream.task, 5)
        assert app._pool_routes._feed.num_listeners == 0


async def test_a_stream_without_news_is_kept_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "STATUS_INTERVAL_S", 60.0)
    monkeypatch.setattr(pool_routes, "KEEP_ALIVE_S", 0.05)
    async with serving(SeenPool(), tmp_path) as app:
        stream = Stream(app)
        await stream.next()
        texts = [await stream.text() for _ in range(6)]
        assert texts[-2:] == [": alive\n\n"] * 2
        stream.gone.set()
        await stream.task


async def test_listeners_are_bounded_and_end_with_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_routes, "MAX_LISTENERS", 2)
    async with serving(SeenPool(), tmp_path) as app:
        streams = [Stream(app), Stream(app)]
        for stream in streams:
            await stream.next()
        status, answer, headers = await call(app, "GET", "/pool/events")
        assert status == 503
        assert "2 listeners" in answer["error"]["message"]
        assert "retry-after" in headers
        app._pool_routes.end_streams()
        for stream in streams:
            await asyncio.wait_for(stream.task, 5)
        late = Stream(app)
        await asyncio.wait_for(late.task, 5)


async def test_who_comes_again_says_what_it_knows(tmp_path: Path) -> None:
    pool = SeenPool()
    for sequence in (1, 2, 3):
        pool.queue.put_nowait(ended(sequence))
    async with serving(pool, tmp_path) as app:
        stream = Stream(app, last_event_id="s.2")
        text = ""
        while "s.3" not in text:
            text += (await stream.next()).get("body", b"").decode()
        assert "s.1" not in text
        assert "s.2" not in text
        stream.gone.set()
        await stream.task


# ------------------------------------------------------------ the page


class _Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


async def test_the_page_needs_no_key_and_allows_only_itself(tmp_path: Path) -> None:
    async with serving(FakePool(), tmp_path, keys=("a",), operator=("b",)) as app:
        status, page, headers = await answer_of(app, "/")
        assert status == 200
        assert headers["content-type"] == "text/html; charset=utf-8"
        policy = headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert "connect-src 'self'" in policy
        assert "unsafe" not in headers["content-security-policy"]
        assert "<title>vllm-resident</title>" in page
        status, text, same = await answer_of(app, "/", "HEAD")
        assert (status, text) == (200, "")
        assert same["content-security-policy"] == headers["content-security-policy"]
        # What it shows is the operators'.
        assert (await answer_of(app, "/pool/events"))[0] == 401
        assert (await answer_of(app, "/", "POST"))[0] == 401


def test_the_page_asks_nobody_else_for_anything() -> None:
    page = status_page.FILE.read_text()
    elements = _Elements()
    elements.feed(page)
    for tag, attributes in elements.found:
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert [tag for tag, _ in elements.found].count("script") == 1
    addresses = set(re.findall(r"https?://[^'\"\s)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "eval(",
        "document.write",
    ):
        assert word not in page


def test_every_part_of_the_page_has_a_name() -> None:
    elements = _Elements()
    elements.feed(status_page.FILE.read_text())
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements.found:
        for reference in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) in (None, *ids)
    assert ("html", {"lang": "en"}) in elements.found
