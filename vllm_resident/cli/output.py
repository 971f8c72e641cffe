"""Where output goes: results to standard output, everything else to standard error.

With `--json` a command writes one JSON document (or JSON lines) and nothing else to
standard output, an error included.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.console import Console, RenderableType

from vllm_resident.cli.display import PhaseDisplay, describe_error
from vllm_resident.errors import ResidentError

# Tables for a file or a pipe are not cut to the 80 columns of no terminal.
_WIDTH_WITHOUT_TERMINAL = 200


class Output:
    """One command's output, for people or (`json`) for programs."""

    def __init__(self, json: bool) -> None:
        self.json = json
        self.stdout = _console(stderr=False)
        self.stderr = _console(stderr=True)
        self._written = False

    def result(self, document: Any, for_people: RenderableType | None = None) -> None:
        """The command's result: `document` as JSON, or what people get instead."""
        if self.json:
            self.line(msgspec.json.encode(document).decode())
        elif for_people is not None:
            self.stdout.print(for_people, highlight=False)

    def line(self, text: str, end: str = "\n") -> None:
        """Text as it is, at once: no markup, no wrapping."""
        self._written = True
        sys.stdout.write(text + end)
        sys.stdout.flush()

    def message(self, text: RenderableType) -> None:
        """What is said to people beside the result."""
        self.stderr.print(text, highlight=False)

    def error(self, error: ResidentError) -> None:
        """One line for people; a document as well unless the result is already out."""
        if self.json and not self._written:
            self.result({"error": error.to_info()})
        self.stderr.print(
            describe_error(error),
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,  # one line for whoever reads lines
        )

    def phases(self) -> PhaseDisplay:
        return PhaseDisplay(self.stderr)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console = Console(stderr=stderr, width=_WIDTH_WITHOUT_TERMINAL)
    return console
