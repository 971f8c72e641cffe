"""Between ranks and the controller.

Up come greetings, heartbeats, answers and outputs; down go commands about engines of a
generation, and requests. A receiver's decoder takes its own union alone.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_resident.errors import ErrorInfo
from vllm_resident.messages.engines import Completion, EngineMemory

# ------------------------------------------------------------------ rank -> controller


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
    launcher_pid: int = 0  # of what started the rank on its machine; 0: not said


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


# ------------------------------------------------------------------ controller -> rank


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
    """End the process with exit status 0 (or, with `failed`, 1); with a `pid`, only the
    one it is meant for: another may answer to the rank's name by now."""

    reason: str
    failed: bool = False
    pid: int = 0


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
