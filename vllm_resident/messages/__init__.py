"""Every message on the wire, by who speaks to whom, and the values they carry.

    client.py   between clients and the controller
    rank.py     between ranks and the controller
    engines.py, status.py, totals.py   values that they carry

Messages are msgspec Structs in tagged unions: the tag is the class name, the decoder of
a receiver accepts only that receiver's union. Imperatives are commands, past tense are
replies, facts are events. Nothing here knows of sockets, torch or vLLM. Everything is
imported from here (`from vllm_resident.messages import EngineSpec`), wherever it is
written.
"""

from __future__ import annotations

from vllm_resident.messages.client import (
    ApplyLayout,
    AttachFrontend,
    AwaitEngine,
    CallFailed,
    CancelGenerate,
    CheckpointPrefetched,
    ClientMessage,
    DetachFrontend,
    EndAwait,
    EndWatch,
    EngineAwake,
    EngineRefused,
    FromClient,
    FrontendAttached,
    FrontendDetached,
    Generate,
    GenerateOutput,
    GetStatus,
    GetTotals,
    LoadEngine,
    ModelCalls,
    PoolStopped,
    PrefetchCheckpoint,
    Progress,
    ReportCalls,
    ShutdownPool,
    SleepEngine,
    StatusReported,
    SwitchDone,
    SwitchEnded,
    SwitchEngines,
    SwitchMoved,
    ToClient,
    ToClientMessage,
    TotalsReported,
    UnloadEngine,
    WakeUpEngine,
    WatchPool,
)
from vllm_resident.messages.engines import (
    Completion,
    EngineMemory,
    EngineReport,
    EngineSpec,
    SwitchReport,
)
from vllm_resident.messages.rank import (
    AbortRequest,
    AddRequest,
    BuildEngine,
    CheckpointRead,
    CloseEngine,
    ConnectFrontend,
    DisconnectFrontend,
    DropCommunicators,
    DropEngine,
    EngineBuilt,
    EngineClosed,
    EngineFailed,
    EnginePrepared,
    EngineResumed,
    EngineSuspended,
    ExitRank,
    FromRank,
    FrontendConnected,
    FrontendRequests,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    PhaseStarted,
    PrepareEngine,
    RankGauges,
    RankMessage,
    ReadCheckpoint,
    RequestFailed,
    RequestOutput,
    RequestsAccepted,
    ResumeEngine,
    StepCount,
    SuspendEngine,
    ToRank,
    ToRankMessage,
    Welcome,
)
from vllm_resident.messages.status import (
    EngineStatus,
    MoveStatus,
    PhaseBegan,
    PoolStatus,
    RankStatus,
    SwitchStatus,
)
from vllm_resident.messages.totals import (
    ModelPhaseTotal,
    MoveTotal,
    PhaseTotal,
    PoolTotals,
    RankTotal,
    StepTotal,
    SwitchTotal,
)

PROTOCOL_VERSION = 5
MAX_MESSAGE_BYTES = 32 * 2**20

ToController = ClientMessage | RankMessage
