"""What is said of engines and their outputs: specs, memory, reports of switches.

Values that the messages to and from clients and ranks carry; no messages themselves.
"""

from __future__ import annotations

from typing import Any

import msgspec


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
