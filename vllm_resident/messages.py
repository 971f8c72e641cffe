"""Every message on the wire, split by who receives it, and the results they carry.

Messages are msgspec Structs in tagged unions: the tag is the class name, the decoder of
a receiver accepts only that receiver's union. Imperatives are commands, past tense are
replies, facts are events. This module knows nothing of sockets, torch or vLLM.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_resident.errors import ErrorInfo

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 32 * 2**20


class EngineSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a caller asks for: one engine by name.

    `ranks` is the list of global ranks, or how many the planner shall pick; without it,
    as many as the parallel sizes multiply to. `engine_args` are vLLM's `EngineArgs` by
    their own names.
    """

    name: str
    model: str
    ranks: list[int] | int | None = None
    engine_args: dict[str, Any] = {}


class EngineReport(msgspec.Struct, frozen=True):
    """What one engine's load or unload took.

    `phases` maps phase to seconds on the slowest rank, in order of execution; memory is
    bytes per global rank as the device counts it (resident memory on CPU).
    """

    name: str
    action: str
    generation: int
    ranks: list[int]
    seconds: float
    phases: dict[str, float]
    memory_before_bytes: dict[int, int]
    memory_after_bytes: dict[int, int]


class SwitchReport(msgspec.Struct, frozen=True):
    """What a `load`, `unload` or `apply` did; seconds on the controller's clock.

    `phases` sums the engines' phases, unloads prefixed by their own names; `kept` names
    the engines an `apply` left untouched.
    """

    action: str
    seconds: float
    phases: dict[str, float]
    engines: list[EngineReport]
    kept: list[str] = []


class Completion(msgspec.Struct, frozen=True):
    """One generated sequence.

    `prompt_index` counts the prompts of the call, `index` the sequences of a prompt
    (sampling parameter `n`). In a stream, `text` and `token_ids` are what is new and
    `finish_reason` is None until the last piece: "stop", "length" or "abort".
    """

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None


class RankStatus(msgspec.Struct, frozen=True):
    """One rank as the controller sees it. `phase`: "ready" | "lost" | "expected"."""

    rank: int
    phase: str
    pid: int
    host: str
    device: str
    incarnation: int
    engines: list[str]
    memory_used_bytes: int
    memory_total_bytes: int
    heartbeat_age_s: float
    num_file_descriptors: int
    num_threads: int
    num_shm_segments: int


class EngineStatus(msgspec.Struct, frozen=True):
    """One engine as the controller sees it. `ranks[0]` is its leader."""

    name: str
    model: str
    phase: str
    generation: int
    ranks: list[int]
    engine_args: dict[str, Any]
    num_requests: int
    progress: str = ""
    error: str = ""


class PoolStatus(msgspec.Struct, frozen=True):
    """The whole pool at one moment."""

    pool: str
    phase: str
    world_size: int
    controller_pid: int
    uptime_s: float
    ranks: list[RankStatus]
    engines: list[EngineStatus]
    num_stale_messages: int = 0
    num_protocol_errors: int = 0


# ----------------------------------------------------------- client -> controller


class FromClient(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """`call` numbers the client's calls; every reply carries it."""

    call: int


class LoadEngine(FromClient, frozen=True, kw_only=True):
    spec: EngineSpec
    timeout_s: float


class UnloadEngine(FromClient, frozen=True, kw_only=True):
    name: str
    timeout_s: float


class ApplyLayout(FromClient, frozen=True, kw_only=True):
    engines: list[EngineSpec]
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


class GetStatus(FromClient, frozen=True, kw_only=True):
    pass


class ShutdownPool(FromClient, frozen=True, kw_only=True):
    timeout_s: float


# ----------------------------------------------------------- controller -> client


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


class GenerateOutput(ToClient, frozen=True, kw_only=True):
    """Pieces of a stream, or all of a batch (`done` tells the last)."""

    completions: list[Completion]
    done: bool


class StatusReported(ToClient, frozen=True, kw_only=True):
    status: PoolStatus


class PoolStopped(ToClient, frozen=True, kw_only=True):
    pass


class CallFailed(ToClient, frozen=True, kw_only=True):
    """`call` is -1 where the frame that failed could not be read."""

    error: ErrorInfo


# ------------------------------------------------------------- rank -> controller


class FromRank(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    rank: int


class RankGauges(msgspec.Struct, frozen=True):
    """What a rank holds right now; memory in bytes as the device counts it."""

    memory_used_bytes: int
    memory_total_bytes: int
    num_file_descriptors: int
    num_threads: int
    num_shm_segments: int


class Hello(FromRank, frozen=True, kw_only=True):
    """A rank introduces itself, once per process and after a controller restart.

    `incarnation` counts the launcher's restarts; `host_id` is equal on ranks that share
    a kernel and pid namespace; `engine_arg_names` are the fields of vLLM's EngineArgs,
    so that the controller can refuse an unknown one without importing vLLM.
    """

    protocol_version: int
    world_size: int
    local_rank: int
    host: str
    host_id: str
    pid: int
    incarnation: int
    device: str
    gauges: RankGauges
    vllm_version: str
    torch_version: str
    engine_arg_names: list[str]
    generations: list[int]


class Heartbeat(FromRank, frozen=True, kw_only=True):
    incarnation: int
    gauges: RankGauges


class PhaseStarted(FromRank, frozen=True, kw_only=True):
    generation: int
    phase: str


class EnginePrepared(FromRank, frozen=True, kw_only=True):
    generation: int
    seconds: float


class EngineBuilt(FromRank, frozen=True, kw_only=True):
    generation: int
    phases: dict[str, float]
    memory_before_bytes: int
    memory_after_bytes: int


class EngineClosed(FromRank, frozen=True, kw_only=True):
    generation: int
    phases: dict[str, float]
    memory_before_bytes: int
    memory_after_bytes: int


class EngineFailed(FromRank, frozen=True, kw_only=True):
    """Prepare, build, step or close failed; the rank holds nothing of it any more,
    unless `phase` is "step" (then the rank waits for `DropEngine`)."""

    generation: int
    error: ErrorInfo


class RequestsAccepted(FromRank, frozen=True, kw_only=True):
    generation: int
    request: int


class RequestOutput(FromRank, frozen=True, kw_only=True):
    """New output of one request (a generate call), from the engine's leader."""

    generation: int
    request: int
    completions: list[Completion]
    done: bool


class RequestFailed(FromRank, frozen=True, kw_only=True):
    generation: int
    request: int
    error: ErrorInfo


# ------------------------------------------------------------- controller -> rank


class ToRank(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    pass


class Welcome(ToRank, frozen=True, kw_only=True):
    """The rank is taken in. `session` names this life of the controller; it prefixes
    every world's identity, so that generations of two lives never meet."""

    session: str
    pool: str


class HeartbeatAck(ToRank, frozen=True, kw_only=True):
    pass


class HelloAgain(ToRank, frozen=True, kw_only=True):
    """The controller does not know the sender of a heartbeat: say `Hello`."""


class PrepareEngine(ToRank, frozen=True, kw_only=True):
    """Validate an engine's arguments and keep its configuration; build nothing."""

    generation: int
    name: str
    model: str
    engine_args: dict[str, Any]
    ranks: list[int]


class BuildEngine(ToRank, frozen=True, kw_only=True):
    """Form the world and build the engine that was prepared."""

    generation: int
    timeout_s: float


class CloseEngine(ToRank, frozen=True, kw_only=True):
    """Stop the engine at the same step on every rank and give everything back."""

    generation: int
    timeout_s: float


class DropEngine(ToRank, frozen=True, kw_only=True):
    """Give up whatever exists of the generation, without the other ranks' help.

    Also cancels a prepare or a build under way. Answered by `EngineClosed`, also when
    there was nothing. A rank still stuck after `timeout_s` ends its own process.
    """

    generation: int
    reason: str
    timeout_s: float


class AddRequest(ToRank, frozen=True, kw_only=True):
    """To the leader: run one generate call; answered by `RequestsAccepted`, then
    `RequestOutput`s, or `RequestFailed`."""

    generation: int
    request: int
    prompts: list[str | list[int]]
    sampling_params: dict[str, Any]
    stream: bool


class AbortRequest(ToRank, frozen=True, kw_only=True):
    """To the leader: end a request; its sequences finish with reason "abort"."""

    generation: int
    request: int


class ExitRank(ToRank, frozen=True, kw_only=True):
    """End the process with exit status 0 (or, with `failed`, 1)."""

    reason: str
    failed: bool = False


ClientMessage = (
    LoadEngine
    | UnloadEngine
    | ApplyLayout
    | Generate
    | CancelGenerate
    | GetStatus
    | ShutdownPool
)
RankMessage = (
    Hello
    | Heartbeat
    | PhaseStarted
    | EnginePrepared
    | EngineBuilt
    | EngineClosed
    | EngineFailed
    | RequestsAccepted
    | RequestOutput
    | RequestFailed
)
ToController = ClientMessage | RankMessage
ToClientMessage = (
    Progress | SwitchDone | GenerateOutput | StatusReported | PoolStopped | CallFailed
)
ToRankMessage = (
    Welcome
    | HeartbeatAck
    | HelloAgain
    | PrepareEngine
    | BuildEngine
    | CloseEngine
    | DropEngine
    | AddRequest
    | AbortRequest
    | ExitRank
)
