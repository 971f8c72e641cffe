"""What goes wrong with a request, as HTTP tells it: status, headers, OpenAI's form.

Pure: knows neither sockets nor vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from vllm_resident.errors import (
    CommandRejected,
    PoolUnreachable,
    ProtocolError,
    RankFailure,
    ResidentError,
)
from vllm_resident.messages import EngineRefused

# After so long it may be asked again, where nobody knows better.
RETRY_AFTER_S = 5
# OpenAI's names for what is wrong.
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    411: "BadRequestError",
    413: "RequestTooLargeError",
    415: "BadRequestError",
    431: "BadRequestError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class Problem(Exception):
    """A request that gets an error for an answer. `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.details = details or {}
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As vLLM's server and OpenAI's write it."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "InternalServerError"),
                "param": self.param,
                "code": self.status,
                **self.details,
            }
        }


def unknown_model(name: str, known: Iterable[str]) -> Problem:
    there = sorted(known)
    listing = f"there are {there}" if there else "the pool has none"
    return Problem(404, f"no model {name!r}: {listing}", param="model")


def unavailable(why: str, retry_after_s: float = RETRY_AFTER_S) -> Problem:
    """The model exists and cannot answer now."""
    seconds = max(1, math.ceil(retry_after_s))
    return Problem(503, why, headers={"Retry-After": str(seconds)})


def of_refusal(refused: EngineRefused) -> Problem:
    """Why the pool does not bring a model up for a request."""
    if refused.is_unknown:
        return Problem(404, refused.reason, param="model")
    return unavailable(refused.reason, refused.retry_after_s)


def of_model(name: str, error: ResidentError) -> Problem:
    """Why a model could not be brought up for a request: never the caller's fault."""
    return unavailable(f"model {name!r} cannot serve now: {error.message}")


def of_command(error: ResidentError) -> Problem:
    """What the pool answered to an operator's command; the class is told as the
    client would raise it, a failed rank with what is known of it."""
    details: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, RankFailure):
        place = {
            "rank": error.rank,
            "generation": error.generation,
            "phase": error.phase,
        }
        return Problem(500, error.message, details={**details, **place})
    if isinstance(error, PoolUnreachable):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return Problem(503, error.message, details=details, headers=headers)
    if isinstance(error, CommandRejected):
        return Problem(409, error.message, details=details)
    if isinstance(error, ProtocolError):
        return Problem(400, error.message, details=details)
    return Problem(500, error.message, details=details)
