"""Every message on the wire, split by who receives it, and the results they carry.

Messages are msgspec Structs in tagged unions: the tag is the class name, the decoder of
a receiver accepts only that receiver's union. Imperatives are commands, past tense are
replies, facts are events. This module knows nothing of sockets, torch or vLLM.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from vllm_resident.errors import ErrorInfo

PROTOCOL_VERSION = 5
MAX_MESSAGE_BYTES = 32 * 2**20


class EngineSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a caller asks for: one engine by name.

    `ranks` is the list of global ranks, or how many the planner shall pick; without it,
    as many as the parallel sizes multiply to. `engine_args` are vLLM's `EngineArgs` by
    their own names; options of its server (`FrontendArgs`) may stand among them, as for
    `vllm serve`: the controller puts them into `frontend_args`. Without `model` it is
    the one that pool.toml declares under the name. `asleep` leaves it at sleep level 1
    once built; a `pinned` engine is never put to sleep, demoted or unloaded to make
    room for another.
    """

    name: str
    model: str = ""
    ranks: list[int] | int | None = None
    engine_args: dict[str, Any] = {}
    asleep: bool = False
    pinned: bool = False
    frontend_args: dict[str, Any] = {}


class EngineMemory(msgspec.Struct, frozen=True):
    """What one engine has on one rank, in bytes: on the device (weights and KV cache,
    while awake) and of host memory (weights, at sleep level 1). `weight_bytes` is the
    size of its weights, wherever they are."""

    device_bytes: int = 0
    host_bytes: int = 0
    weight_bytes: int = 0


class EngineReport(msgspec.Struct, frozen=True):
    """What one engine's part of a switch took. `action`: "load", "unload", "sleep",
    "wake_up" (of an engine woken because the switch failed, too).

    `phases` maps phase to seconds on the slowest rank, in order of execution,
    `rank_phases` the same for each rank; `began_s` is the start of it, in seconds after
    the switch's. Memory is bytes per global rank as the device counts it (resident
    memory on CPU), `moved_bytes` what was copied between host and device on all ranks,
    in `moved_s` seconds on the slowest, over links that could do `link_bytes_per_s`
    together when the ranks started; 0 where nothing was timed or measured.
    """

    name: str
    action: str
    generation: int
    ranks: list[int]
    seconds: float
    phases: dict[str, float]
    memory_before_bytes: dict[int, int]
    memory_after_bytes: dict[int, int]
    rank_phases: dict[int, dict[str, float]] = {}
    began_s: float = 0.0
    moved_bytes: int = 0
    sleep_level: int = 0
    moved_s: float = 0.0
    link_bytes_per_s: float = 0.0


class SwitchReport(msgspec.Struct, frozen=True):
    """What a command that moves engines did; seconds on the controller's clock.

    `phases` sums the engines' phases, unloads prefixed by their own names; `kept` names
    the engines an `apply` left untouched. `path` says how it was done, in order: such
    as ["drain", "sleep", "wake_up"]. `unavailable_s` is the time in which neither what
    goes nor what comes could serve. `error` is set where the pool went back.
    """

    action: str
    seconds: float
    phases: dict[str, float]
    engines: list[EngineReport]
    kept: list[str] = []
    path: list[str] = []
    unavailable_s: float = 0.0
    error: str = ""


class PhaseBegan(msgspec.Struct, frozen=True):
    """A rank reached a phase of its work, `began_s` after the switch had begun."""

    phase: str
    began_s: float


class MoveStatus(msgspec.Struct, frozen=True):
    """What a switch under way does to one engine.

    `before` and `after` are sleep levels (0: awake), None is for not being there.
    `phase` is the engine's; `rank_phases` are those that each rank has begun in this
    switch, in order: the last one runs while the rank is among `waiting`.
    """

    name: str
    generation: int
    ranks: list[int]
    before: int | None
    after: int | None
    phase: str
    waiting: list[int] = []
    rank_phases: dict[int, list[PhaseBegan]] = {}


class SwitchStatus(msgspec.Struct, frozen=True):
    """A switch under way, and how far it is: `stage` by stage (ARCHITECTURE, the life
    of a switch). `expected_s` is what the same moves took before, 0 where they were
    never made."""

    number: int
    action: str
    cause: str
    stage: str
    elapsed_s: float
    expected_s: float
    path: list[str]
    moves: list[MoveStatus]
    error: str = ""


class SwitchTotal(msgspec.Struct, frozen=True):
    """Switches of one kind since the controller began. `result`: "done", "went_back",
    or "refused" (nothing was changed). `buckets` counts those that took no longer than
    each of `PoolTotals.bounds_s`."""

    action: str
    path: str
    result: str
    num_switches: int
    seconds: float
    unavailable_s: float
    buckets: list[int]


class PhaseTotal(msgspec.Struct, frozen=True):
    """One phase of one kind of move, in switches of one kind, on the slowest rank."""

    action: str
    path: str
    move: str
    phase: str
    num_times: int
    seconds: float


class ModelPhaseTotal(msgspec.Struct, frozen=True):
    """One phase of one kind of move of one model, on the slowest rank."""

    model: str
    move: str
    phase: str
    num_times: int
    seconds: float


class MoveTotal(msgspec.Struct, frozen=True):
    """One kind of move of one model on one rank: what the rank itself did."""

    model: str
    rank: int
    move: str
    num_times: int
    seconds: float


class StepTotal(msgspec.Struct, frozen=True):
    """Steps of one model on one rank, its failed ones among `num_divergences` where it
    differed from its leader."""

    model: str
    rank: int
    num_steps: int
    seconds: float
    num_divergences: int = 0


class RankTotal(msgspec.Struct, frozen=True):
    """How often a rank was lost, and a new process took its place."""

    rank: int
    num_losses: int
    num_restarts: int


class PoolTotals(msgspec.Struct, frozen=True):
    """All that was counted since the controller began. Of more models than the
    controller keeps apart, the rest is called "(other)"."""

    bounds_s: list[float] = []
    switches: list[SwitchTotal] = []
    phases: list[PhaseTotal] = []
    model_phases: list[ModelPhaseTotal] = []
    moves: list[MoveTotal] = []
    steps: list[StepTotal] = []
    ranks: list[RankTotal] = []


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
    num_sockets: int = 0
    num_process_groups: int = 0
    num_engines: int = 0
    num_kept_communicators: int = 0
    kept_communicator_bytes: int = 0
    num_suspended_communicators: int = 0


class EngineStatus(msgspec.Struct, frozen=True):
    """One engine as the controller sees it. `ranks[0]` is its leader; `sleep_level` is
    0 while it is awake; `memory` is by global rank; `idle_s` is the time since a
    request of it ended or it was woken."""

    name: str
    model: str
    phase: str
    generation: int
    ranks: list[int]
    engine_args: dict[str, Any]
    num_requests: int
    progress: str = ""
    error: str = ""
    sleep_level: int = 0
    pinned: bool = False
    idle_s: float = 0.0
    memory: dict[int, EngineMemory] = {}


class PoolStatus(msgspec.Struct, frozen=True):
    """The whole pool at one moment. `models` are the names that pool.toml declares,
    `adapters` the engines and declared models by the LoRA adapters they serve, too;
    `waiting` says how many calls wait for a model to come up, by name; `switches` are
    those under way."""

    pool: str
    phase: str
    world_size: int
    controller_pid: int
    uptime_s: float
    ranks: list[RankStatus]
    engines: list[EngineStatus]
    num_stale_messages: int = 0
    num_protocol_errors: int = 0
    host_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    models: list[str] = []
    waiting: dict[str, int] = {}
    switches: list[SwitchStatus] = []
    adapters: dict[str, str] = {}
    max_communicators: int | None = None
    max_communicator_bytes: int | None = None


# ----------------------------------------------------------- client -> controller


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
    what it has waited already, in an earlier call.
    """

    engine: str
    waited_s: float = 0.0


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


# ------------------------------------------------------------- rank -> controller


class FromRank(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    rank: int


class StepCount(msgspec.Struct, frozen=True):
    """Steps of one engine on one rank since its process began, and their seconds."""

    num_steps: int = 0
    seconds: float = 0.0


class RankGauges(msgspec.Struct, frozen=True):
    """What a rank holds right now; memory in bytes as the device counts it. Process
    groups are those of living worlds; communicators that are kept of closed ones count
    apart, and so do those of sleeping engines whose memory is given back. `steps` is
    what it has done, by engine."""

    memory_used_bytes: int
    memory_total_bytes: int
    num_file_descriptors: int
    num_threads: int
    num_shm_segments: int
    num_sockets: int = 0
    num_process_groups: int = 0
    num_engines: int = 0
    steps: dict[str, StepCount] = {}
    num_kept_communicators: int = 0
    kept_communicator_bytes: int = 0
    num_suspended_communicators: int = 0


class Hello(FromRank, frozen=True, kw_only=True):
    """A rank introduces itself, once per process and after a controller restart.

    `incarnation` counts its restarts; `host_id` is equal on ranks that share
    a kernel and pid namespace; `engine_arg_names` are the fields of vLLM's EngineArgs,
    `frontend_arg_names` those of its server's options, so that the controller can tell
    them apart and refuse an unknown one without importing vLLM.
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
    frontend_arg_names: list[str] = []


class Heartbeat(FromRank, frozen=True, kw_only=True):
    incarnation: int
    gauges: RankGauges


class PhaseStarted(FromRank, frozen=True, kw_only=True):
    generation: int
    phase: str


class EnginePrepared(FromRank, frozen=True, kw_only=True):
    """`memory` is what it will need here, as far as files and arguments tell."""

    generation: int
    seconds: float
    memory: EngineMemory = EngineMemory()


class EngineBuilt(FromRank, frozen=True, kw_only=True):
    generation: int
    phases: dict[str, float]
    memory_before_bytes: int
    memory_after_bytes: int
    memory: EngineMemory = EngineMemory()


class EngineSuspended(FromRank, frozen=True, kw_only=True):
    """It sleeps here at `level`; `memory` is what it still has, `moved_bytes` what was
    copied to the host in `moved_s` seconds, over a link that could do
    `link_bytes_per_s` when the rank started (0: not measured)."""

    generation: int
    level: int
    phases: dict[str, float]
    memory_before_bytes: int
    memory_after_bytes: int
    memory: EngineMemory
    moved_bytes: int = 0
    moved_s: float = 0.0
    link_bytes_per_s: float = 0.0


class EngineResumed(FromRank, frozen=True, kw_only=True):
    """It is awake here; the last three are as in `EngineSuspended`, the other way."""

    generation: int
    phases: dict[str, float]
    memory_before_bytes: int
    memory_after_bytes: int
    memory: EngineMemory
    moved_bytes: int = 0
    moved_s: float = 0.0
    link_bytes_per_s: float = 0.0


class EngineClosed(FromRank, frozen=True, kw_only=True):
    generation: int
    phases: dict[str, float]
    memory_before_bytes: int
    memory_after_bytes: int


class EngineFailed(FromRank, frozen=True, kw_only=True):
    """Prepare, build, step, suspend, resume or close failed; the rank holds nothing of
    it any more, unless it was built (then the rank waits for `DropEngine`)."""

    generation: int
    error: ErrorInfo


class CheckpointRead(FromRank, frozen=True, kw_only=True):
    """The answer to `ReadCheckpoint` of the same `read`."""

    read: int
    num_bytes: int
    error: ErrorInfo | None = None


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


class FrontendConnected(FromRank, frozen=True, kw_only=True):
    """The answer to `ConnectFrontend`; with `error` the leader has no such frontend."""

    generation: int
    frontend: int
    error: ErrorInfo | None = None


class FrontendRequests(FromRank, frozen=True, kw_only=True):
    """How many requests of frontends the leader has, running or held while the engine
    sleeps. Said at once when there are none any more, or some again."""

    generation: int
    num_requests: int


# ------------------------------------------------------------- controller -> rank


class ToRank(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    pass


class Welcome(ToRank, frozen=True, kw_only=True):
    """The rank is taken in. `session` names this life of the controller; it prefixes
    every world's identity, so that generations of two lives never meet. Of worlds that
    are closed it keeps `max_communicators`, and no more than `max_communicator_bytes`
    of the device's memory with them (None: as fits the device)."""

    session: str
    pool: str
    max_communicators: int | None = None
    max_communicator_bytes: int | None = None


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
    frontend_args: dict[str, Any] = {}


class BuildEngine(ToRank, frozen=True, kw_only=True):
    """Form the world and build the engine that was prepared; its ranks are on several
    machines if it `spans_machines`.

    `turn` numbers what the controller has told ranks to form, in the order in which it
    told them: every rank forms its worlds in this order, so that no two wait for each
    other.
    """

    generation: int
    timeout_s: float
    spans_machines: bool = False
    turn: int = 0


class CloseEngine(ToRank, frozen=True, kw_only=True):
    """Stop the engine at the same step on every rank and give everything back."""

    generation: int
    timeout_s: float


class SuspendEngine(ToRank, frozen=True, kw_only=True):
    """Stop the engine at the same step on every rank and put it to sleep; what it still
    has to do may go on for `finish_s` seconds (a request that came when it was thought
    to be idle), then it is aborted. Of an engine asleep at level 1: to level 2.
    Answered by `EngineSuspended`."""

    generation: int
    level: int
    timeout_s: float
    finish_s: float = 0.0


class ResumeEngine(ToRank, frozen=True, kw_only=True):
    """Wake the engine up; answered by `EngineResumed`."""

    generation: int
    timeout_s: float


class ReadCheckpoint(ToRank, frozen=True, kw_only=True):
    """Read a checkpoint's files into this machine's page cache, beside all else."""

    read: int
    model: str


class DropCommunicators(ToRank, frozen=True, kw_only=True):
    """A rank's process is gone: give up what is kept of worlds that it was in. Not
    answered."""

    lost_rank: int


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


class ConnectFrontend(ToRank, frozen=True, kw_only=True):
    """To the leader: serve a frontend of vLLM's at these addresses, under this number,
    which no other of the generation ever has; answered by `FrontendConnected`."""

    generation: int
    frontend: int
    input_address: str
    output_address: str


class DisconnectFrontend(ToRank, frozen=True, kw_only=True):
    """To the leader: the frontend is gone; its requests are aborted. Not answered."""

    generation: int
    frontend: int


class ExitRank(ToRank, frozen=True, kw_only=True):
    """End the process with exit status 0 (or, with `failed`, 1)."""

    reason: str
    failed: bool = False


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
RankMessage = (
    Hello
    | Heartbeat
    | PhaseStarted
    | EnginePrepared
    | EngineBuilt
    | EngineSuspended
    | EngineResumed
    | EngineClosed
    | EngineFailed
    | CheckpointRead
    | RequestsAccepted
    | RequestOutput
    | RequestFailed
    | FrontendConnected
    | FrontendRequests
)
ToController = ClientMessage | RankMessage
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
ToRankMessage = (
    Welcome
    | HeartbeatAck
    | HelloAgain
    | PrepareEngine
    | BuildEngine
    | SuspendEngine
    | ResumeEngine
    | ReadCheckpoint
    | CloseEngine
    | DropCommunicators
    | DropEngine
    | AddRequest
    | AbortRequest
    | ConnectFrontend
    | DisconnectFrontend
    | ExitRank
)
