"""Every error the package raises, as one tree.

The class says whose fault it was and what state the pool is in afterwards:

    ResidentError
    ├── CommandRejected      the caller's: nothing was changed
    ├── PoolUnreachable      no controller answered within the deadline
    ├── ProtocolError        bytes that are not a message of this protocol version
    ├── PatchError           vLLM is not the version, or not patched as, the pool needs
    └── RankFailure          a rank failed: names rank, generation and phase
        ├── RankLost         its process or its host is gone
        ├── RankTimeout      it did not answer within the named deadline
        ├── RankDiverged     its outputs differ from its leader's
        └── ReleaseIncomplete  it still holds what it should have given back

Errors cross the wire as `ErrorInfo` and come out of the client as the same class.
"""

from __future__ import annotations

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error on the wire. `kind` is the class name; rank is a global rank."""

    kind: str
    message: str
    rank: int | None = None
    generation: int | None = None
    phase: str | None = None


class ResidentError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def to_info(self) -> ErrorInfo:
        return ErrorInfo(type(self).__name__, self.message)


class CommandRejected(ResidentError):
    """The command cannot be carried out as given; nothing was changed."""


class PoolUnreachable(ResidentError):
    """No controller answered at the endpoint within the deadline."""


class ProtocolError(ResidentError):
    """A frame that is not a message, is too large, or is of another version."""


class PatchError(ResidentError):
    """vLLM is not the version, or not patched as, this package needs."""


class RankFailure(ResidentError):
    """A rank failed while it worked on an engine.

    `rank` is the global rank, `generation` that of the engine's world (None when the
    rank held none), `phase` what it was doing.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        generation: int | None = None,
        phase: str | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.generation = generation
        self.phase = phase

    def to_info(self) -> ErrorInfo:
        return ErrorInfo(
            type(self).__name__, self.message, self.rank, self.generation, self.phase
        )


class RankLost(RankFailure):
    """The rank's process or its host is gone."""


class RankTimeout(RankFailure):
    """The rank did not answer within the named deadline."""


class RankDiverged(RankFailure):
    """The rank's outputs differ from its leader's: the engine must not serve on."""


class ReleaseIncomplete(RankFailure):
    """The rank still holds something it should have given back."""


_BY_NAME: dict[str, type[ResidentError]] = {
    cls.__name__: cls
    for cls in (
        ResidentError,
        CommandRejected,
        PoolUnreachable,
        ProtocolError,
        PatchError,
        RankFailure,
        RankLost,
        RankTimeout,
        RankDiverged,
        ReleaseIncomplete,
    )
}


def from_info(info: ErrorInfo) -> ResidentError:
    """The exception an `ErrorInfo` stands for; an unknown kind is a `ResidentError`."""
    cls = _BY_NAME.get(info.kind, ResidentError)
    if issubclass(cls, RankFailure):
        return cls(
            info.message, rank=info.rank, generation=info.generation, phase=info.phase
        )
    return cls(info.message)
