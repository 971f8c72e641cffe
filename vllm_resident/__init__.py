"""vllm-resident: many vLLM models on one pool of ranks whose processes never end."""

from vllm_resident.client import AsyncClient, Client
from vllm_resident.errors import (
    CommandRejected,
    PatchError,
    PoolUnreachable,
    ProtocolError,
    RankDiverged,
    RankFailure,
    RankLost,
    RankTimeout,
    ReleaseIncomplete,
    ResidentError,
)
from vllm_resident.messages import (
    CheckpointPrefetched,
    Completion,
    EngineMemory,
    EngineReport,
    EngineSpec,
    EngineStatus,
    PoolStatus,
    RankStatus,
    SwitchReport,
)

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "CheckpointPrefetched",
    "Client",
    "CommandRejected",
    "Completion",
    "EngineMemory",
    "EngineReport",
    "EngineSpec",
    "EngineStatus",
    "PatchError",
    "PoolStatus",
    "PoolUnreachable",
    "ProtocolError",
    "RankDiverged",
    "RankFailure",
    "RankLost",
    "RankStatus",
    "RankTimeout",
    "ReleaseIncomplete",
    "ResidentError",
    "SwitchReport",
]
