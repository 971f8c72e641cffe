"""Import torch and vLLM once and put a rank's parts together.

Imported after the process is prepared; from here on the heap of the imports is frozen.
"""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import torch
import vllm
from vllm.platforms import current_platform

from vllm_resident import shm
from vllm_resident.config import frontend_arg_names
from vllm_resident.keys import PoolKey
from vllm_resident.messages import PROTOCOL_VERSION, Hello, RankGauges
from vllm_resident.rank import ledger, supervisor
from vllm_resident.rank.communicators import Budget, CommunicatorPool
from vllm_resident.rank.control import Control
from vllm_resident.rank.device import Device, messaging_context
from vllm_resident.rank.engine import engine_arg_names, warm_up
from vllm_resident.rank.groups import destroy
from vllm_resident.rank.lines import Lines
from vllm_resident.rank.loop import RankLoop
from vllm_resident.rank.parts import Parts
from vllm_resident.rank.rpc import SocketFolder
from vllm_resident.rank.world import connect_store
from vllm_resident.transport import host_id


def boot(
    rank: int,
    device: Device,
    endpoint: str,
    key: PoolKey | None,
    directory: Path,
    store_timeout_s: float,
    sockets: SocketFolder,
) -> tuple[RankLoop, Control]:
    """The rank's loop and its control thread, not started yet. Blocks for the store."""
    if current_platform.device_type != device.type:
        raise RuntimeError(
            f"this vLLM is built for {current_platform.device_type}, the machine has "
            f"{device.type}: install the extra that fits"
        )
    device.activate()
    warm_up(device)
    launcher_pid = supervisor.launcher_pid()
    owner = shm.owner_token(launcher_pid)
    world_size = int(os.environ["WORLD_SIZE"])
    incarnation = supervisor.incarnation()
    names, server_options = engine_arg_names(), sorted(frontend_arg_names())
    store = connect_store(store_timeout_s)
    # Until the controller says what may be kept.
    communicators = CommunicatorPool(Budget(), destroy)

    def gauges() -> RankGauges:
        return ledger.read(device, owner, communicators)

    def hello() -> Hello:
        return Hello(
            rank=rank,
            protocol_version=PROTOCOL_VERSION,
            world_size=world_size,
            local_rank=device.index,
            host=socket.gethostname(),
            host_id=host_id(),
            pid=os.getpid(),
            incarnation=incarnation,
            device=device.name,
            gauges=gauges(),
            vllm_version=vllm.__version__,
            torch_version=str(torch.__version__),
            engine_arg_names=names,
            generations=loop.generations(),
            frontend_arg_names=server_options,
            launcher_pid=launcher_pid,
        )

    control = Control(rank, incarnation, endpoint, hello, gauges, key)
    lines = Lines(messaging_context(), directory, endpoint, key)
    parts = Parts(rank, device, store, control, lines, owner, communicators, sockets)
    loop = RankLoop(parts)
    gc.collect()
    gc.freeze()
    return loop, control
