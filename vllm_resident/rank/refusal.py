"""What vLLM says when it refuses an engine or its options, as a person needs it."""

from __future__ import annotations

import logging

from pydantic import ValidationError

# Characters; the rest is in the rank's log.
MAX_LENGTH = 1000

log = logging.getLogger("vllm_resident.rank")


def in_words(error: Exception) -> str:
    """Without what pydantic repeats of the arguments, and not every architecture that
    vLLM names where it does not know one."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False, include_input=False)
        text = "; ".join(_said(each["loc"], each["msg"]) for each in found)
    else:
        text = f"{type(error).__name__}: {error}"
    if len(text) <= MAX_LENGTH:
        return text
    log.info("event=refused error=%r", text)
    return f"{text[:MAX_LENGTH]} ..."


def _said(place: tuple[int | str, ...], message: str) -> str:
    return ": ".join([*map(str, place), message.removeprefix("Value error, ")])
