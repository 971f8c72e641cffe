"""What the values of options may be: text in, the value out.

Each raises `argparse.ArgumentTypeError`, whose message is shown with the usage.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import time

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def num_ranks(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1, or auto")
    return int(text)


def rank_list(text: str) -> list[int]:
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r}: ranks are 0,1 or 0-3")
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    return ranks


def seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: seconds above 0")
    return seconds


def seconds_or_none(text: str) -> float:
    return 0.0 if text == "0" else seconds(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1")
    return int(text)


def moment(text: str) -> float:
    """Seconds since 1970 of so long ago, or of a date and time."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return time.time() - float(match[1]) * _UNIT_SECONDS[match[2]]
    try:
        # One without a zone is of this machine's.
        return dt.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: 90s, 10m, 2h, 1d, or a time such as 2026-01-31T08:30"
        ) from None
