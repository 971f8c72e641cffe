"""The pool as it is at one moment: its ranks, its engines, the switches under way.

Values that the controller makes of its state for clients; no messages themselves.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_resident.messages.engines import EngineMemory


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
