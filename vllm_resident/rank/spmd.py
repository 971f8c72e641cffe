"""Library mode: resident engines in a plain SPMD script under torchrun.

The same worlds and engines as in a pool, with no controller: every rank runs the same
script and calls the same functions in the same order, so no step plans are needed.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_resident import shm
from vllm_resident.errors import CommandRejected
from vllm_resident.messages import Completion
from vllm_resident.rank import device as devices
from vllm_resident.rank.communicators import CommunicatorPool
from vllm_resident.rank.prepare import prepare_process

if TYPE_CHECKING:
    from vllm_resident.rank.engine import Engine
    from vllm_resident.rank.world import Store, World

# A collective stuck for longer means a rank has left the script.
WORLD_TIMEOUT_S = 600.0

_num_worlds: Counter[tuple[int, ...]] = Counter()


class SpmdEngine:
    """An engine of this script; the same calls must be made on each of its ranks."""

    def __init__(self, engine: Engine, ranks: Sequence[int]) -> None:
        from vllm_resident.rank.lockstep import Leader
        from vllm_resident.rank.requests import Requests

        self.ranks = list(ranks)
        self._engine = engine
        self._num_calls = 0
        leader = Leader(engine.core, [])
        engine.llm.engine_core = leader
        self._leader = leader
        self._requests = Requests(engine.llm, leader)

    @property
    def llm(self) -> Any:
        """vLLM's own `LLMEngine`, for what this class does not offer."""
        return self._engine.llm

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        sampling_params: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Run the prompts to their ends; blocks; the same result on every rank.

        Prompts are texts or lists of token ids, sampling parameters vLLM's by name.
        Returns completions sorted by (prompt_index, index). Raises `CommandRejected`
        (nothing has run then) where vLLM refuses a prompt or a parameter, or while the
        engine sleeps.
        """
        self._check_held()
        if self.sleep_level:
            raise CommandRejected("the engine is asleep: wake it up first")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        number = self._num_calls
        self._num_calls += 1
        self._requests.add(
            number, texts, {**(sampling_params or {}), **sampling}, False
        )
        completions: list[Completion] = []
        while self._engine.has_work or self._leader.has_pending:
            for _, fresh, _ in self._requests.collect(self._engine.step()):
                completions.extend(fresh)
        return sorted(completions, key=lambda each: (each.prompt_index, each.index))

    @property
    def sleep_level(self) -> int:
        """0 while it is awake; 1 or 2 while it sleeps."""
        return self._engine.sleep_level

    def sleep(self, level: int = 1) -> None:
        """Give the engine's memory back: its KV cache, and at level 2 its weights,
        which `wake_up` then reads again. At level 1 they are kept in host memory.

        What an interrupted `generate` left is aborted. No-op at the level it has; from
        1 it may go on to 2. Raises `CommandRejected` (nothing is changed then) for
        other levels, `ReleaseIncomplete` if memory was not given back.
        """
        self._check_held()
        self._engine.check_sleep(level)
        for number in self._requests.numbers:
            self._requests.abort(number)
        while self._engine.has_work or self._leader.has_pending:
            self._engine.step()
        self._engine.sleep(level, on_phase=lambda _: None)

    def wake_up(self) -> None:
        """Have the memory again and generate as before; blocks while weights are
        read. No-op for an engine that is awake."""
        self._check_held()
        self._engine.wake_up(on_phase=lambda _: None)

    def _check_held(self) -> None:
        if self._engine.released:
            raise CommandRejected("the engine was given back where its block ended")

    def _let_go(self) -> None:
        """Of vLLM's parts: whoever still has this object must not keep them."""
        del self._leader, self._requests


@contextmanager
def engine(
    model: str, *, ranks: Sequence[int] | None = None, **engine_args: Any
) -> Iterator[SpmdEngine]:
    """A resident engine over `ranks` (all by default), given back at the end.

    Called by exactly those ranks, each the same way; other ranks may have engines of
    their own meanwhile, and each rank several at once. `engine_args` are vLLM's by
    name; with no parallel size given, `tensor_parallel_size` is the number of ranks.
    Blocks while it builds. Raises `CommandRejected` for arguments vLLM refuses,
    `RankTimeout` for ranks that do not come, `ReleaseIncomplete` if something is still
    held at the end.
    """
    _, device, _, rank, world_size, _ = _process()
    members = list(ranks) if ranks is not None else list(range(world_size))
    if rank not in members or len(set(members)) != len(members):
        raise CommandRejected(
            f"rank {rank} cannot build an engine over ranks {members}"
        )
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    if not any(size in engine_args for size in sizes):
        engine_args["tensor_parallel_size"] = len(members)

    from vllm_resident.rank.engine import Engine, abandon, configure

    prepared = configure(model, engine_args)
    size = prepared.config.parallel_config.world_size
    if size != len(members):
        raise CommandRejected(
            f"the parallel sizes multiply to {size}, but {len(members)} ranks are given"
        )
    world = _form_world(members)
    try:
        built = Engine.build(prepared, world, device, on_phase=lambda _: None)
    # Given back and raised again, Ctrl-C too.
    except BaseException as error:
        abandon(error, world, device)
        raise
    orderly = False
    try:
        resident = SpmdEngine(built, members)
        try:
            yield resident
        finally:
            resident._let_go()
        orderly = True
    finally:
        built.release(orderly=orderly)


def _form_world(members: list[int]) -> World:
    """A world of these ranks of the script, of which this is one."""
    from vllm_resident.rank.world import World

    store, device, owner, rank, _, communicators = _process()
    # Members have formed the same worlds in the same order, so they count alike.
    _num_worlds[tuple(members)] += 1
    # The launcher's store outlives a restart of its ranks.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"spmd-{life}-{'.'.join(map(str, members))}-{_num_worlds[tuple(members)]}"
    return World.form(
        identity=name,
        rank=members.index(rank),
        size=len(members),
        local_rank=device.index,
        owner=owner,
        store=store,
        backend=device.backend,
        timeout_s=WORLD_TIMEOUT_S,
        device=device.bound(),
        members=members,
        communicators=communicators,
        memory_used=lambda: device.memory()[0],
    )


@cache
def _process() -> tuple[Store, devices.Device, str, int, int, CommunicatorPool]:
    """Prepare this process once: (store, device, owner token, rank, world size, what
    is kept of worlds that are closed).

    RANK and WORLD_SIZE are read here, before a world puts its own numbers there.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = prepare_process(
        int(os.environ["LOCAL_RANK"]),
        int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )
    from vllm_resident.rank.engine import warm_up
    from vllm_resident.rank.groups import destroy
    from vllm_resident.rank.world import connect_store

    # What `release` froze would be reported as leaked by the extensions' own checks.
    atexit.register(gc.unfreeze)

    device.activate()
    warm_up(device)
    gc.collect()
    gc.freeze()
    store = connect_store(WORLD_TIMEOUT_S)
    kept = CommunicatorPool(device.communicator_budget, destroy)
    return store, device, shm.owner_token(os.getppid()), rank, world_size, kept
