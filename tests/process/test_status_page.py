"""The status page in a headless Chromium, over the gateway's real app and a controller
with simulated ranks: what people see of what happens.

With STATUS_PAGE_SHOTS, a folder, each look at the page is kept there as a picture.
axe-core judges the page, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.members import standing_still
from tests.process import browser as chromium
from tests.process.browser import Browser, Page, running_browser
from tests.process.test_controller import PoolFixture, pool, wait_until  # noqa: F401
from vllm_resident import AsyncClient, Client, EngineSpec, RankFailure
from vllm_resident.client.connection import Connection
from vllm_resident.gateway.__main__ import Server
from vllm_resident.gateway.app import Gateway
from vllm_resident.gateway.asgi import Bodies, Keys
from vllm_resident.gateway.pool_routes import PoolRoutes
from vllm_resident.gateway.residents import Residents
from vllm_resident.messages import AwaitEngine, EngineAwake

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        chromium.PROGRAM is None, reason="no chromium: apt-get install chromium"
    ),
]

GIB = 2**30
PHONE, DESKTOP = 360, 1280
POOL_TOML = """
[models.declared-only]
model = "/m/declared-only"

[models.called]
model = "/m/called"
ranks = [2]
"""
SHOTS = os.environ.get("STATUS_PAGE_SHOTS")
AXE = importlib.resources.files("axe_core_python") / "axe.min.js"


# ------------------------------------------------------------ what is looked at


@contextmanager
def serving(endpoint: str, *, port: int = 0, keys: Sequence[str] = ()) -> Iterator[str]:
    """The gateway's app and its server, on a thread of their own; no model has one
    of vLLM's frontends here. Gives the page's address."""
    listener = socket.create_server(("127.0.0.1", port))
    started: list[Server] = []

    async def run() -> None:
        client = AsyncClient(endpoint, connect_timeout_s=5.0)
        bodies = Bodies()
        routes = PoolRoutes(client, Keys(keys), bodies, is_open=True)
        unused: Any = None
        there = Residents(unused, unused, unused, Path())
        app = Gateway(client, there, routes, Keys(keys), bodies)
        config = uvicorn.Config(app, ws="none", lifespan="off", log_level="critical")
        started.append(Server(config, routes.end_streams))
        await started[0].serve([listener])
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        wait_until("it listens", lambda: started and started[0].started)
        yield "http://{}:{}/".format(*listener.getsockname())
    finally:
        started[0].should_exit = True
        # The streams of events do not keep it.
        thread.join(20)
        assert not thread.is_alive()


def pids_of(client: Client, ranks: Sequence[int]) -> list[int]:
    return [rank.pid for rank in client.status().ranks if rank.rank in ranks]


def look(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}.png")


def put_rank(pool: PoolFixture, rank: int, world_size: int, *more: str) -> Any:  # noqa: F811
    used = (8 + 14 * rank) * GIB
    memory = ("--used-bytes", str(used), "--total-bytes", str(80 * GIB))
    return pool.rank(rank, world_size, *memory, *more)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    folder = Path(tempfile.mkdtemp(prefix="vr-"))
    try:
        with running_browser(folder) as browser:
            yield browser
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def busy() -> Iterator[tuple[Client, str]]:
    """A pool of four ranks with engines in all their states, and its page's address."""
    directory = Path(tempfile.mkdtemp(prefix="vr-"))
    pool = PoolFixture(directory)  # noqa: F811
    (directory / "pool.toml").write_text(POOL_TOML)
    try:
        pool.controller("--config", str(directory / "pool.toml"))
        for rank in range(4):
            put_rank(pool, rank, 4, *(("--take-s", "1.5") if rank == 2 else ()))
        peer = pool.client()
        pool.wait_ready(peer)
        with Client(pool.endpoint) as client, serving(pool.endpoint) as url:
            fill(client)
            peer.generate(
                "chat", stream=True, timeout_s=600.0, max_tokens=10_000, piece_s=0.5
            )
            yield client, url
    finally:
        pool.close()
        shutil.rmtree(directory)


def fill(client: Client) -> None:
    client.load("chat", "/m/chat", ranks=[0], take_s=0.2)
    client.load(
        "wide", "/m/wide", ranks=[0, 1], tensor_parallel_size=2, asleep=True, take_s=0.3
    )
    client.load("apart", "/m/apart", ranks=[1, 3], tensor_parallel_size=2, asleep=True)
    client.load("old", "/m/old", ranks=[1], take_s=0.1)
    client.switch("old", EngineSpec("new", "/m/new", [1], {"take_s": 0.3}))
    client.load("x" * 64, "/m/long", ranks=[3], pinned=True)
    with pytest.raises(RankFailure):
        client.load("broken", "/m/b", ranks=[2], fail="build", fail_rank=2)


@pytest.fixture
def shown(browser: Browser, busy: tuple[Client, str]) -> Iterator[Page]:
    page = browser.page(DESKTOP)
    page.open(busy[1])
    page.shows("went back", "#past")
    yield page
    assert page.violations == []
    page.close()


def columns(page: Page) -> list[dict[str, float]]:
    """Left and right of each rank's column."""
    return page.evaluate(
        "[...document.querySelectorAll('#board thead th')]"
        ".map(e => e.getBoundingClientRect()).map(({left, right}) => ({left, right}))"
    )


def boxes(page: Page) -> dict[str, list[dict[str, Any]]]:
    """By engine: where its boxes are on the board, and what they say."""
    found = page.evaluate(
        "[...document.querySelectorAll('#board .engine')].map(e => {"
        "const r = e.getBoundingClientRect();"
        "return {name: e.querySelector('bdi').textContent, left: r.left,"
        " right: r.right, top: r.top, bottom: r.bottom, text: e.innerText}})"
    )
    by_name: dict[str, list[dict[str, Any]]] = {}
    for box in found:
        by_name.setdefault(box.pop("name"), []).append(box)
    return by_name


def rows(page: Page) -> dict[str, list[str]]:
    """The table of models: by name, what the other cells say."""
    return {
        name: cells
        for name, *cells in page.evaluate(
            "[...document.querySelectorAll('#models tbody tr')].map(r =>"
            " [r.querySelector('bdi').textContent,"
            "  ...[...r.querySelectorAll('td')].map(c => c.textContent)])"
        )
    }


def is_as_wide_as_the_window(page: Page, width: int) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth") == width)


# ------------------------------------------------------------ what happens is shown


def test_a_pool_without_anything(browser: Browser, pool: PoolFixture) -> None:  # noqa: F811
    pool.controller()
    with serving(pool.endpoint) as url:
        page = browser.page(PHONE)
        page.open(url)
        page.shows("live", "#connection")
        page.shows("No rank has reported yet.")
        page.shows("No model is loaded or declared.")
        page.shows("Nothing is moving.")
        page.shows("There was none yet.")
        assert is_as_wide_as_the_window(page, PHONE)
        look(page, "empty-phone")
        put_rank(pool, 0, 1)
        page.shows("No engine is loaded.", "#board")
        page.shows("8.0 of 80.0 GiB", "#board")
        assert page.violations == []
        page.close()


def test_engines_stand_on_their_ranks(shown: Page) -> None:
    sides = columns(shown)
    assert len(sides) == 4
    placed = boxes(shown)
    spans = {
        name: [
            [
                rank
                for rank, side in enumerate(sides)
                if side["left"] < (box["right"] + box["left"]) / 2 < side["right"]
                or (
                    box["left"] < side["left"] + 20
                    and side["right"] < box["right"] + 20
                )
            ]
            for box in found
        ]
        for name, found in placed.items()
    }
    # One over two that are not neighbours is in both places.
    assert spans == {
        "chat": [[0]],
        "wide": [[0, 1]],
        "apart": [[1], [3]],
        "old": [[1]],
        "new": [[1]],
        "x" * 64: [[3]],
    }
    assert "awake · 1 running" in placed["chat"][0]["text"]
    assert "asleep, level 1" in placed["wide"][0]["text"]
    assert "pinned" in placed["x" * 64][0]["text"]
    flat = [box for found in placed.values() for box in found]
    for box in flat:
        for other in flat:
            is_apart = (
                box["right"] <= other["left"] or other["right"] <= box["left"]
                or box["bottom"] <= other["top"] or other["bottom"] <= box["top"]
            )  # fmt: skip
            assert box is other or is_apart
    look(shown, "desktop-light")
    shown.prefer(prefers_color_scheme="dark")
    look(shown, "desktop-dark")


def test_models_with_their_queues(shown: Page) -> None:
    there = rows(shown)
    assert there["chat"] == ["● awake", "0", "1"]
    assert there["declared-only"] == ["· not loaded", "0", "0"]
    assert there["wide"] == ["○ asleep, level 1", "0", "0"]


def test_a_call_for_a_model_that_is_not_there(
    shown: Page, busy: tuple[Client, str]
) -> None:
    """It waits in the model's queue until the model, brought up for it, is there."""
    client, _ = busy
    assert rows(shown)["called"] == ["\u00b7 not loaded", "0", "0"]

    async def call() -> None:
        connection = Connection(client.endpoint, 30.0)
        command = AwaitEngine(call=connection.next_call(), engine="called")
        async with contextlib.aclosing(connection.replies(command, 20.0)) as replies:
            assert isinstance(await anext(replies), EngineAwake)
        await connection.close()

    caller = threading.Thread(target=lambda: asyncio.run(call()))
    with standing_still(*pids_of(client, [2])):
        caller.start()
        shown.shows("on demand: 1 waiting", "#now")
        shown.until(
            "[...document.querySelectorAll('#models tbody tr')].some(row =>"
            " row.querySelector('bdi').textContent === 'called'"
            " && row.querySelector('.number').textContent === '1')"
        )
    caller.join(30)
    shown.shows("load called", "#past > li:first-child")
    shown.shows("on demand: 1 waiting", "#past > li:first-child")
    awake = ["\u25cf awake", "0", "0"]
    wait_until("it is awake", lambda: rows(shown)["called"] == awake)
    client.unload("called")


def test_a_switch_is_followed_to_its_end(
    shown: Page, busy: tuple[Client, str], tmp_path: Path
) -> None:
    client, _ = busy
    arguments: dict[str, Any] = {"ranks": [2, 3], "tensor_parallel_size": 2}
    arguments |= {"take_s": 2.5, "until": str(tmp_path / "was-looked-at")}
    loading = threading.Thread(
        target=lambda: client.load("slow", "/m/s", asleep=True, **arguments)
    )
    loading.start()
    shown.shows("load slow", "#now")
    shown.shows("rank 3: slow load model for", "#now")
    with standing_still(*pids_of(client, [2, 3])):
        shown.shows("building: load model", "#board")
        assert "▸" in shown.evaluate("document.title")
        slices = "#now .track:last-child .slice"
        names = shown.evaluate(
            f"[...document.querySelectorAll('{slices}')].map(e => e.textContent)"
        )
        assert names[:4] == ["prepare", "build", "form world", "tokenizer"]
        # The page counts by itself: no rank says anything.
        line = "document.querySelector('#now .line').innerText"
        elapsed = f"/([\\d.]+) s/.exec({line})?.[1]"
        first = shown.until(elapsed)
        shown.until(f"{elapsed} > {first}")
        look(shown, "desktop-moving")
        shown.resize(PHONE)
        look(shown, "phone-moving")
        assert is_as_wide_as_the_window(shown, PHONE)
        shown.resize(DESKTOP)
    (tmp_path / "was-looked-at").touch()
    shown.shows("Nothing is moving.", "#now-none")
    loading.join()
    past = "#past > li:first-child"
    shown.shows("load slow", past)
    shown.shows("done", past)
    # Every phase of both ranks, in the picture and in the table beside it.
    for kind, least in ((".slice", 16), ("tbody tr", 16)):
        found = f"document.querySelectorAll('{past} {kind}').length"
        assert shown.evaluate(found) >= least
    shown.until(
        "document.querySelector('#news').textContent.includes('load slow done')"
    )
    client.unload("slow")
    shown.shows("unload slow", past)
    shown.until("!document.querySelector('#board').innerText.includes('slow')")


def test_what_was_switched_says_what_went_and_what_came(shown: Page) -> None:
    text = shown.text("#past")
    assert "switch old → new" in text
    assert "sleep \u203a load" in text
    assert "nothing served for" in text
    assert "load broken" in text
    assert "build fails, as asked" in text


def test_what_was_before_the_page_is_shown_once(
    browser: Browser, busy: tuple[Client, str]
) -> None:
    page = browser.page()
    page.open(busy[1])
    page.shows("load chat", "#past")
    page.evaluate("void listen()")  # the connection anew, as after a loss
    page.until("document.querySelector('#connection').innerText.includes('live')")
    time.sleep(1.5)
    titles = page.evaluate(
        "[...document.querySelectorAll('#past h3')].map(e => e.textContent)"
    )
    assert sum(title == "load chat" for title in titles) == 1
    page.close()


def test_a_lost_rank_and_its_return(browser: Browser, pool: PoolFixture) -> None:  # noqa: F811
    pool.controller()
    ranks = [put_rank(pool, rank, 2) for rank in range(2)]
    peer = pool.client()
    pool.wait_ready(peer)
    assert peer.load("both", [0, 1], tensor_parallel_size=2)
    with serving(pool.endpoint) as url:
        page = browser.page(PHONE)
        page.open(url)
        page.shows("both", "#board")
        ranks[1].kill()
        page.shows("degraded", "#phase")
        page.shows("lost", "#board thead")
        page.shows("is lost", "#models .error")
        page.until(
            "document.querySelector('#news').textContent.includes('Rank 1 is lost')"
        )
        assert is_as_wide_as_the_window(page, PHONE)
        look(page, "lost-phone")
        put_rank(pool, 1, 2, "--incarnation", "1")
        page.shows("restore both", "#past")
        page.shows("a rank came back", "#past")
        page.shows("ready", "#phase")
        wait_until("it is awake", lambda: rows(page)["both"][0] == "● awake")
        assert page.violations == []
        page.close()


# ------------------------------------------------------------ the connection


def test_a_connection_that_is_lost_and_comes_back(
    browser: Browser,
    pool: PoolFixture,  # noqa: F811
) -> None:
    _peer, _ = pool.up(1)
    page = browser.page()
    with serving(pool.endpoint) as url:
        page.open(url)
        page.shows("simulated", "#board")
    page.shows("not connected", "#connection")
    page.shows("What is shown is from", "#trouble")
    page.shows("simulated", "#board")  # it stays
    look(page, "not-connected")
    port = int(url.rstrip("/").rpartition(":")[2])
    with serving(pool.endpoint, port=port):
        page.shows("live", "#connection", timeout_s=20)
        page.until("document.querySelector('#trouble').hidden")
        page.until(
            "document.querySelector('#news').textContent.includes('Connected again')"
        )
    assert page.violations == []
    page.close()


def test_a_controller_that_is_gone(browser: Browser, pool: PoolFixture) -> None:  # noqa: F811
    pool.up(1)
    with serving(pool.endpoint) as url:
        page = browser.page()
        page.open(url)
        page.shows("simulated", "#board")
        pool.processes[0].kill()
        page.shows("The controller does not answer", "#trouble")
        page.close()


def test_a_key_is_asked_for_and_kept_in_the_tab(
    browser: Browser, busy: tuple[Client, str]
) -> None:
    client, _ = busy
    with serving(client.endpoint, keys=["s3cret"]) as url:
        page = browser.page(PHONE)
        page.open(url)
        page.until("document.querySelector('#ask')?.hidden === false")
        page.until("document.activeElement.id === 'operator-key'")
        look(page, "key-phone")
        assert "chat" not in page.text()
        page.write("wrong")
        page.press("Enter")
        page.shows("That key is not one", "#trouble")
        page.until("document.activeElement.id === 'operator-key'")
        page.write("s3cret")
        page.press("Enter")
        page.shows("chat", "#board")
        assert page.evaluate("document.querySelector('#ask').hidden")
        assert page.evaluate("Object.values(sessionStorage)") == ["s3cret"]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert "s3cret" not in page.evaluate("location.href + document.body.innerHTML")
        page.evaluate("document.querySelector('#forget').click()")
        page.until("document.querySelector('#ask')?.hidden === false")
        assert page.evaluate("sessionStorage.length") == 0
        assert page.violations == []
        page.close()


# ------------------------------------------------------------ for everybody


def test_a_phone_shows_all_of_it(shown: Page) -> None:
    shown.resize(PHONE)
    assert is_as_wide_as_the_window(shown, PHONE)
    look(shown, "phone")
    # Nothing is cut off: what is wider than the page is in a region that scrolls.
    cut = shown.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility()"
        " && !e.closest('.scroll, .track, .hidden')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    assert cut == []
    assert rows(shown)["x" * 64][0] == "● awake"


def test_it_is_all_there_for_a_screen_reader(shown: Page) -> None:
    told = shown.accessibility()
    roles = {role for role, _ in told}
    assert {"banner", "main", "contentinfo", "status", "table", "list"} <= roles
    headings = [name for role, name in told if role == "heading"]
    assert headings[0].startswith("vllm-resident")
    for title in ("Under way", "Ranks", "Models", "Last switches"):
        assert title in headings
        assert ("region", title) in told
    heads = [name for role, name in told if role == "columnheader"]
    assert any(name.startswith("rank 3") and "ready" in name for name in heads)
    assert {"Model", "State", "Waiting", "Running"} <= set(heads)
    cells = [name for role, name in told if role in ("cell", "gridcell")]
    assert any("wide" in n and "asleep" in n and "ranks 0\u20131" in n for n in cells)
    assert any(role == "rowheader" and "chat" in name for role, name in told)
    assert all(name for role, name in told if role in ("button", "textbox", "link"))
    # What goes with the pictures is said in words: signs alone are not.
    assert not any(name in ("●", "○", "✕", "▸") for _, name in told)


def test_it_can_be_used_with_the_keyboard(shown: Page) -> None:
    shown.resize(PHONE)
    shown.evaluate("document.body.focus()")
    seen = []
    for _ in range(4):
        shown.press("Tab")
        seen.append(
            shown.evaluate(
                "(e => [e.id || e.tagName, getComputedStyle(e).outlineStyle])"
                "(document.activeElement)"
            )
        )
    assert [each[0] for each in seen[:2]] == ["board", "SUMMARY"]
    assert {each[1] for each in seen} == {"solid"}
    closed = "document.querySelectorAll('details[open]').length"
    assert shown.evaluate(closed) == 0
    shown.press("Enter")
    assert shown.evaluate(closed) == 1
    time.sleep(1.2)  # another status: what has the focus stays, and stays open
    assert shown.evaluate(closed) == 1
    assert shown.evaluate("document.activeElement.tagName") == "SUMMARY"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(shown: Page, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 for all text."""
    shown.prefer(prefers_color_scheme=scheme)
    shown.evaluate("heard('status', {...known.status, phase: 'degraded'})")
    shown.evaluate("trouble('Something is wrong'), draw()")
    found = shown.evaluate(CONTRASTS)
    assert len(found) > 60
    assert [each for each in found if each[0] < 4.5] == []


CONTRASTS = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility()) continue;
    if (e.closest('script, .hidden')) continue;
    const pair = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    found.push([ratio, walker.currentNode.data, e.className]);
  }
  return found;
})()"""


def test_nothing_moves_for_who_wants_no_motion(shown: Page) -> None:
    running = json.dumps(
        {
            "number": 9000, "action": "load", "cause": "", "stage": "bringing_up",
            "elapsed_s": 1.0, "expected_s": 0.0, "path": [], "error": "",
            "moves": [{
                "name": "n", "generation": 1, "ranks": [0], "before": None, "after": 0,
                "phase": "building", "waiting": [0],
                "rank_phases": {"0": [{"phase": "load_model", "began_s": 0.1}]},
            }],
        }
    )  # fmt: skip
    # At one go: a real status would replace it.
    name = (
        f"heard('progress', {running}), draw(),"
        "getComputedStyle(document.querySelector('.slice.now')).animationName"
    )
    assert shown.evaluate(name) == "pulse"
    shown.prefer(prefers_reduced_motion="reduce")
    assert shown.evaluate(name) == "none"


ODD = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\u202etxet\n'\""


def test_whatever_things_are_called_it_is_text(shown: Page) -> None:
    """The pool's own checks keep most of this out; the page must not rely on it."""
    shown.evaluate(
        "window.before = document.querySelectorAll('*').length, window.odd = "
        + json.dumps(ODD)
    )
    texts = shown.evaluate(
        "(s => heard('status', {...s, pool: odd, models: [odd], waiting: {[odd]: 1},"
        " engines: s.engines.map(e => ({...e, name: odd + e.name, error: odd,"
        "   progress: odd, phase: odd})),"
        " ranks: s.ranks.map(r => ({...r, host: odd, device: odd, phase: odd}))}))"
        "(known.status), draw(),"
        " ['#models', '#board'].map(e => document.querySelector(e).textContent)"
    )
    assert [ODD in text for text in texts] == [True, True]
    assert shown.evaluate("document.querySelectorAll('img, main script').length") == 0
    look(shown, "odd-names")
    assert shown.violations == []


def test_nothing_but_its_own_script_runs(shown: Page) -> None:
    shown.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'window.wasRun = true'}))"
    )
    shown.evaluate("fetch('https://example.invalid/').catch(() => 0)")
    assert shown.evaluate("window.wasRun") is None
    said, shown.violations = shown.violations, []
    assert any("Executing inline script violates" in each for each in said)
    assert any("Refused to connect" in each for each in said)
    assert all("Content Security Policy" in each for each in said)


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(shown: Page, width: int, scheme: str) -> None:
    shown.resize(width)
    shown.prefer(prefers_color_scheme=scheme)
    shown.evaluate(AXE.read_text() + "; 0")
    found = shown.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
    )
    assert found == []
