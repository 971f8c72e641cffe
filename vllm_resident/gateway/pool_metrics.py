"""The pool's own figures as Prometheus metrics: its status and what was counted, turned
into families. Pure: asks nobody, keeps nothing.

The controller does the counting, so that a gateway that is started again, or a second
one, shows the same. Names of models are the only labels that users make up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric

from vllm_resident.messages import EngineStatus, PoolStatus, PoolTotals

PREFIX = "vllm_resident:"
STATES = ("awake", "asleep_1", "asleep_2", "moving", "lost", "failed", "declared")
PHASES = ("starting", "ready", "degraded", "stopping")

# By the field of RankStatus: the metric, and what it says.
_LEDGER = {
    "memory_used_bytes": ("memory_used_bytes", "Memory in use on the rank's device."),
    "memory_total_bytes": ("memory_total_bytes", "Memory of the rank's device."),
    "num_file_descriptors": ("file_descriptors", "File descriptors that it has open."),
    "num_threads": ("threads", "Threads of the rank."),
    "num_shm_segments": ("shm_segments", "The pool's shared segments that have names."),
    "num_sockets": ("sockets", "Sockets that the rank has open."),
    "num_process_groups": ("process_groups", "Process groups that the rank is in."),
    "num_engines": ("engines", "Engines that the rank holds, awake or asleep."),
    "num_kept_communicators": (
        "kept_communicators",
        "Communicators of closed worlds that it keeps for worlds to come.",
    ),
    "kept_communicator_bytes": (
        "kept_communicator_bytes",
        "Memory of the rank's device that these hold.",
    ),
    "num_suspended_communicators": (
        "suspended_communicators",
        "Communicators of sleeping engines whose memory is given back.",
    ),
    "heartbeat_age_s": (
        "heartbeat_age_seconds",
        "Time since the rank was last heard of.",
    ),
}


def state_of(engine: EngineStatus) -> str:
    """One of STATES."""
    if engine.phase == "ready":
        return "awake"
    if engine.phase == "asleep":
        return f"asleep_{engine.sleep_level}"
    return engine.phase if engine.phase in ("lost", "failed") else "moving"


def families(status: PoolStatus | None, totals: PoolTotals | None) -> Iterator[Metric]:
    """All of the pool's; without a status, that the controller does not answer."""
    yield _gauge("pool_up", "Whether the controller answers.", {(): status is not None})
    if status is not None:
        yield from _of_pool(status)
        yield from _of_ranks(status, totals or PoolTotals())
        yield from _of_engines(status)
    if totals is not None:
        yield from _of_switches(totals)
        yield from _of_phases(totals)
        yield from _of_steps(totals)


def _of_pool(status: PoolStatus) -> Iterator[Metric]:
    yield _gauge(
        "pool_phase",
        "1 for the phase that the pool is in.",
        {(phase,): phase == status.phase for phase in PHASES},
        "phase",
    )
    yield _gauge(
        "pool_uptime_seconds",
        "Time since the controller began.",
        {(): status.uptime_s},
    )
    for name, text, value in (
        ("host", "sleeping engines may keep of host memory", status.host_memory_bytes),
        ("device", "awake engines may take of a device", status.device_memory_bytes),
    ):
        if value is not None:
            title = f"What {text}."
            yield _gauge(f"{name}_memory_budget_bytes", title, {(): value})
    yield _counter(
        "stale_messages",
        "Messages of engines or ranks that were no more, dropped.",
        {(): status.num_stale_messages},
    )
    yield _counter(
        "protocol_errors",
        "Frames that were no messages, refused.",
        {(): status.num_protocol_errors},
    )
    under_way = Counter((switch.action,) for switch in status.switches)
    yield _gauge(
        "switches_in_progress", "Switches under way.", dict(under_way), "action"
    )


def _of_ranks(status: PoolStatus, totals: PoolTotals) -> Iterator[Metric]:
    ranks = {str(rank.rank): rank for rank in status.ranks}
    yield _gauge(
        "rank_up",
        "Whether the rank is there.",
        {(name, rank.host): rank.phase == "ready" for name, rank in ranks.items()},
        "rank",
        "host",
    )
    for field, (name, text) in _LEDGER.items():
        # Of a lost rank the last figures say nothing any more.
        values = {
            (number,): getattr(rank, field)
            for number, rank in ranks.items()
            if rank.phase == "ready"
        }
        yield _gauge(f"rank_{name}", text, values, "rank")
    counted = {str(each.rank): each for each in totals.ranks}
    losses = {(name,): 0 for name in ranks}
    restarts = dict(losses)
    losses |= {(name,): each.num_losses for name, each in counted.items()}
    restarts |= {(name,): each.num_restarts for name, each in counted.items()}
    yield _counter("rank_losses", "How often the rank was lost.", losses, "rank")
    text = "How often a new process took the rank's place."
    yield _counter("rank_restarts", text, restarts, "rank")


def _of_engines(status: PoolStatus) -> Iterator[Metric]:
    there = {engine.name for engine in status.engines}
    declared = [name for name in status.models if name not in there]
    states = Counter(state_of(engine) for engine in status.engines)
    states["declared"] = len(declared)
    yield _gauge(
        "engines",
        "Engines by state; declared are models that are not loaded.",
        {(state,): states[state] for state in STATES},
        "state",
    )
    yield _gauge(
        "engine_state",
        "1 for the state that the engine is in.",
        {
            (engine.name, str(rank), state_of(engine)): 1
            for engine in status.engines
            for rank in engine.ranks
        },
        "model_name",
        "rank",
        "state",
    )
    memory: dict[tuple[str, ...], float] = {}
    for engine in status.engines:
        for rank, held in engine.memory.items():
            memory[engine.name, str(rank), "device"] = held.device_bytes
            memory[engine.name, str(rank), "host"] = held.host_bytes
    text = "What the engine has of the rank's device and of host memory."
    yield _gauge("engine_memory_bytes", text, memory, "model_name", "rank", "place")
    yield _gauge(
        "engine_requests",
        "Requests that are with the engine.",
        {(engine.name,): engine.num_requests for engine in status.engines},
        "model_name",
    )
    queues = {(name,): 0 for name in (*sorted(there), *declared)}
    queues |= {(name,): number for name, number in status.waiting.items()}
    text = "Calls that wait for the model to come up, of all gateways."
    yield _gauge("queue_length", text, queues, "model_name")


def _of_switches(totals: PoolTotals) -> Iterator[Metric]:
    labels = ("action", "path", "result")
    seconds = HistogramMetricFamily(
        f"{PREFIX}switch_seconds",
        "What switches took, whoever caused them.",
        labels=labels,
    )
    bounds = [*map(str, totals.bounds_s), "+Inf"]
    unavailable: dict[tuple[str, ...], float] = {}
    for each in totals.switches:
        key = (each.action, each.path, each.result)
        counts = [*each.buckets, each.num_switches]
        buckets = list(zip(bounds, map(float, counts), strict=True))
        seconds.add_metric(key, buckets, each.seconds)
        unavailable[key] = each.unavailable_s
    yield seconds
    text = "Time in which neither what went nor what came could serve."
    yield _counter("switch_unavailable_seconds", text, unavailable, *labels)


def _of_phases(totals: PoolTotals) -> Iterator[Metric]:
    by_path = SummaryMetricFamily(
        f"{PREFIX}switch_phase_seconds",
        "Phases of switches by their path, on the slowest rank.",
        labels=("action", "path", "move", "phase"),
    )
    for phase in totals.phases:
        key = (phase.action, phase.path, phase.move, phase.phase)
        by_path.add_metric(key, phase.num_times, phase.seconds)
    yield by_path
    by_model = SummaryMetricFamily(
        f"{PREFIX}move_phase_seconds",
        "Phases of a model's moves, on the slowest rank.",
        labels=("model_name", "move", "phase"),
    )
    for each in totals.model_phases:
        labels = (each.model, each.move, each.phase)
        by_model.add_metric(labels, each.num_times, each.seconds)
    yield by_model
    by_rank = SummaryMetricFamily(
        f"{PREFIX}move_seconds",
        "A model's moves (load, unload, sleep, wake_up) on each rank.",
        labels=("model_name", "rank", "move"),
    )
    for move in totals.moves:
        labels = (move.model, str(move.rank), move.move)
        by_rank.add_metric(labels, move.num_times, move.seconds)
    yield by_rank


def _of_steps(totals: PoolTotals) -> Iterator[Metric]:
    steps = SummaryMetricFamily(
        f"{PREFIX}lockstep_step_seconds",
        "Steps of the model's engines on each rank, leader and followers.",
        labels=("model_name", "rank"),
    )
    for each in totals.steps:
        steps.add_metric((each.model, str(each.rank)), each.num_steps, each.seconds)
    yield steps
    yield _counter(
        "divergences",
        "Steps in which the rank's outputs were not its leader's.",
        {(each.model, str(each.rank)): each.num_divergences for each in totals.steps},
        "model_name",
        "rank",
    )


_Values = dict[tuple[str, ...], float] | dict[tuple[str, ...], int]


def _gauge(name: str, text: str, values: _Values, *labels: str) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, values: _Values, *labels: str) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
