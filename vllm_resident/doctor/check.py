"""What one check of the doctor says."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """One thing looked at. `remedy` is empty where nothing needs mending."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
