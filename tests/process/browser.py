"""A headless Chromium, driven over its own DevTools protocol.

Only what the tests of the status page need: pages, scripts in them, keys, the
accessibility tree, screenshots. Every wait has a deadline.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

START_S = 90.0
WAIT_S = 60.0
PROGRAM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
KEYS = {"Tab": 9, "Enter": 13, " ": 32}


class BrowserError(AssertionError):
    """The browser could not do it, as while a page is being replaced."""


class Page:
    """One tab. `violations` are what its console and its policy complained of."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.violations: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params}
        self._connection.send(json.dumps(command))
        deadline = time.monotonic() + WAIT_S
        while True:
            text = self._connection.recv(max(0.0, deadline - time.monotonic()))
            message = json.loads(text)
            if message.get("id") == number:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.violations.append(json.dumps(event["params"]["exceptionDetails"]))
            case "Log.entryAdded":
                entry = event["params"]["entry"]
                # That a server does not answer is no fault of the page's.
                if entry["level"] == "error" and entry["source"] != "network":
                    self.violations.append(entry["text"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        there = f"location.href === {json.dumps(url)}"
        self.until(f"{there} && document.readyState === 'complete'")

    def close(self) -> None:
        self.call("Page.close")
        self._connection.close()

    def resize(self, width: int, height: int = 800) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def prefer(self, **features: str) -> None:
        """Media features, such as `prefers_color_scheme="dark"`."""
        listed = [
            {"name": name.replace("_", "-"), "value": value}
            for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def evaluate(self, expression: str) -> Any:
        answer = self.call(
            "Runtime.evaluate",
            expression=expression, returnByValue=True, awaitPromise=True,
        )  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, timeout_s: float = WAIT_S) -> Any:
        """Wait until the expression is true of the page; returns its value."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(BrowserError):
                if value := self.evaluate(expression):
                    return value
            time.sleep(0.03)
        raise AssertionError(f"not within {timeout_s} s: {expression}\n{self.text()}")

    def text(self, selector: str = "body") -> str:
        found = f"document.querySelector({json.dumps(selector)})"
        return str(self.evaluate(f"({found}?.innerText ?? '')"))

    def shows(
        self, text: str, selector: str = "body", timeout_s: float = WAIT_S
    ) -> None:
        """Wait until the text is to be seen there."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.until(
            f"({found}?.innerText ?? '').includes({json.dumps(text)})", timeout_s
        )

    def press(self, key: str) -> None:
        code = KEYS[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code="Space" if key == " " else key,
                windowsVirtualKeyCode=code, text=text if kind == "keyDown" else "",
            )  # fmt: skip

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def accessibility(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader gets, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]

    def screenshot(self, file: Path) -> None:
        """All of the page, not only what is in view."""
        answer = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    def __init__(self, port: int) -> None:
        self._port = port
        self._connections = ExitStack()

    def page(self, width: int = 1280) -> Page:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT"
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            target = json.load(answer)
        address = target["webSocketDebuggerUrl"]
        page = Page(
            self._connections.enter_context(
                connect(address, max_size=2**26, open_timeout=WAIT_S)
            )
        )
        page.resize(width)
        return page

    def close(self) -> None:
        self._connections.close()


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """Its profile is a fresh one in `folder`; it is killed at the end."""
    assert PROGRAM is not None
    profile = folder / "profile"
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=log,
            stderr=log,
        )
    try:
        browser = Browser(_port(process, profile / "DevToolsActivePort"))
        yield browser
        browser.close()
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], file: Path) -> int:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the browser ended"
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise AssertionError(f"no browser within {START_S} s")
