"""Between clients (the command line, Python, gateways) and the controller.

Down come commands and calls, each with a number of the client's; up go progress and
results under the same number. A receiver's decoder takes its own union alone.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vllm_resident.errors import ErrorInfo
from vllm_resident.messages.engines import Completion, EngineSpec, SwitchReport
from vllm_resident.messages.status import PoolStatus, SwitchStatus
from vllm_resident.messages.totals import PoolTotals

# ---------------------------------------------------------------- client -> controller


class FromClient(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """`call` numbers the client's calls; every reply carries it."""

    call: int


class LoadEngine(FromClient, frozen=True, kw_only=True):
    spec: EngineSpec
    timeout_s: float


class UnloadEngine(FromClient, frozen=True, kw_only=True):
    """Requests in flight may go on for `drain_s` seconds, then they are aborted; so in
    every command that has it."""

    name: str
    timeout_s: float
    drain_s: float = 0.0


class ApplyLayout(FromClient, frozen=True, kw_only=True):
    engines: list[EngineSpec]
    timeout_s: float
    drain_s: float = 0.0


class SleepEngine(FromClient, frozen=True, kw_only=True):
    """Level 1 keeps the weights in host memory, level 2 drops them; an engine asleep at
    level 1 may be put to level 2."""

    name: str
    level: int
    timeout_s: float
    drain_s: float


class WakeUpEngine(FromClient, frozen=True, kw_only=True):
    """What is awake on its ranks and leaves no room for it is put to sleep."""

    name: str
    timeout_s: float
    drain_s: float


class SwitchEngines(FromClient, frozen=True, kw_only=True):
    """Put `old` aside and bring `new` up in its place, or change nothing.

    `new` is an engine that sleeps, by its name, or one to be loaded (on the ranks of
    `old` where it names none). `strategy`: "sleep" puts `old` to level 1 first;
    "unload" gives up its memory first, and builds it anew if the switch fails; "stage"
    builds `new` asleep while `old` goes on serving, then exchanges them.
    """

    old: str
    new: EngineSpec
    timeout_s: float
    drain_s: float
    strategy: Literal["sleep", "unload", "stage"] = "sleep"


class PrefetchCheckpoint(FromClient, frozen=True, kw_only=True):
    """Read a checkpoint's files into the page cache of every machine of the pool.
    `model` is a folder, or the name of a model that pool.toml declares."""

    model: str
    timeout_s: float


class Generate(FromClient, frozen=True, kw_only=True):
    """Prompts are text or token ids; sampling parameters are vLLM's by name."""

    engine: str
    prompts: list[str | list[int]]
    sampling_params: dict[str, Any]
    stream: bool
    timeout_s: float


class CancelGenerate(FromClient, frozen=True, kw_only=True):
    """Abort the generate call of the same number; answered by that call's end."""


class AttachFrontend(FromClient, frozen=True, kw_only=True):
    """Let an engine's leader serve a frontend of vLLM's that listens at these two
    addresses (ROUTER and PULL, as `AsyncLLM` binds them).

    Answered by `FrontendAttached`; then `Progress` with the engine's phase, each second
    and whenever it changes, until `FrontendDetached` or `CallFailed`. The frontend
    stays attached while its engine sleeps.
    """

    engine: str
    input_address: str
    output_address: str
    timeout_s: float


class DetachFrontend(FromClient, frozen=True, kw_only=True):
    """End the attachment of the same number; answered by that call's end."""


class AwaitEngine(FromClient, frozen=True, kw_only=True):
    """A call that came for a model that is not awake: bring it up, by the policy.

    Answered by `EngineAwake`, or `EngineRefused`; `Progress` until then. It is open
    until `EndAwait`: so long it counts as one of the model's requests. `waited_s` is
    what it has waited already, in an earlier call. One that `is_held` is with the
    leader of its engine, which sleeps, and in the leader's own count.
    """

    engine: str
    waited_s: float = 0.0
    is_held: bool = False


class EndAwait(FromClient, frozen=True, kw_only=True):
    """Of the `AwaitEngine` of the same number: its caller was served, or has gone. Not
    answered."""


class ModelCalls(msgspec.Struct, frozen=True):
    """Calls of one model since the last report: those that came and found it awake,
    those that ended (however they came) and what these took together."""

    num_begun: int = 0
    num_ended: int = 0
    service_s: float = 0.0


class ReportCalls(FromClient, frozen=True, kw_only=True):
    """What a gateway served without asking, by model. Not answered."""

    models: dict[str, ModelCalls]


class GetStatus(FromClient, frozen=True, kw_only=True):
    pass


class GetTotals(FromClient, frozen=True, kw_only=True):
    """Answered by `TotalsReported`."""


class WatchPool(FromClient, frozen=True, kw_only=True):
    """Tell of every switch, whoever caused it, until `EndWatch`.

    Answered by a `SwitchEnded` for each of the last switches, then by `SwitchMoved`
    whenever one under way gets on, and `SwitchEnded` when it is over; `Progress` each
    second.
    """


class EndWatch(FromClient, frozen=True, kw_only=True):
    """Of the `WatchPool` of the same number. Not answered."""


class ShutdownPool(FromClient, frozen=True, kw_only=True):
    timeout_s: float


# ---------------------------------------------------------------- controller -> client


class ToClient(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    call: int


class Progress(ToClient, frozen=True, kw_only=True):
    """A phase of a long command began; `rank` None means the whole engine.

    Also sent about once a second while a call runs, so that a vanished client shows.
    """

    engine: str
    phase: str
    rank: int | None = None
    elapsed_s: float


class SwitchDone(ToClient, frozen=True, kw_only=True):
    report: SwitchReport


class CheckpointPrefetched(ToClient, frozen=True, kw_only=True):
    """`num_bytes` are the checkpoint's, `hosts` the machines that read it."""

    num_bytes: int
    seconds: float
    hosts: list[str]


class GenerateOutput(ToClient, frozen=True, kw_only=True):
    """Pieces of a stream, or all of a batch (`done` tells the last)."""

    completions: list[Completion]
    done: bool


class FrontendAttached(ToClient, frozen=True, kw_only=True):
    """The leader has connected. `spec` is what the engine was built of; `phase` is the
    engine's, as in `EngineStatus`."""

    generation: int
    spec: EngineSpec
    phase: str


class FrontendDetached(ToClient, frozen=True, kw_only=True):
    """As asked for, or because the engine is gone: then `reason` says why."""

    reason: str


class EngineAwake(ToClient, frozen=True, kw_only=True):
    """The model is up, as this generation."""

    generation: int


class EngineRefused(ToClient, frozen=True, kw_only=True):
    """The model does not come up for this call: it is not worth asking again before
    `retry_after_s`, or (`is_unknown`) there is no such model."""

    reason: str
    retry_after_s: float = 0.0
    is_unknown: bool = False


class StatusReported(ToClient, frozen=True, kw_only=True):
    status: PoolStatus


class TotalsReported(ToClient, frozen=True, kw_only=True):
    totals: PoolTotals


class SwitchMoved(ToClient, frozen=True, kw_only=True):
    switch: SwitchStatus


class SwitchEnded(ToClient, frozen=True, kw_only=True):
    """A switch is over. `sequence` counts the ends, without gaps, in the life of the
    controller that `session` names; `age_s` is how long ago it began, `number` what
    `SwitchStatus` called it; `engines` are all that it was about, also where the report
    has nothing of them."""

    session: str
    sequence: int
    number: int
    age_s: float
    cause: str
    engines: list[str]
    report: SwitchReport


class PoolStopped(ToClient, frozen=True, kw_only=True):
    pass


class CallFailed(ToClient, frozen=True, kw_only=True):
    """`call` is -1 where the frame that failed could not be read."""

    error: ErrorInfo


ClientMessage = (
    LoadEngine
    | UnloadEngine
    | ApplyLayout
    | SleepEngine
    | WakeUpEngine
    | SwitchEngines
    | PrefetchCheckpoint
    | Generate
    | CancelGenerate
    | AttachFrontend
    | DetachFrontend
    | AwaitEngine
    | EndAwait
    | ReportCalls
    | GetStatus
    | GetTotals
    | WatchPool
    | EndWatch
    | ShutdownPool
)


ToClientMessage = (
    Progress
    | SwitchDone
    | CheckpointPrefetched
    | GenerateOutput
    | FrontendAttached
    | FrontendDetached
    | EngineAwake
    | EngineRefused
    | StatusReported
    | TotalsReported
    | SwitchMoved
    | SwitchEnded
    | PoolStopped
    | CallFailed
)
