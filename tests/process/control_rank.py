"""A rank's control thread in a process of its own, with a main thread that is stuck.

Run as `python -m tests.process.control_rank ENDPOINT [[has=]GENERATION ...]`:
the main thread blocks for ever in a way that no signal handler written in Python can
interrupt, as it would inside a collective, at work on these generations, each within
the one before; one that it "has" it may hold something of. Only the control thread can
end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

from vllm_resident.messages import PROTOCOL_VERSION, Hello, RankGauges
from vllm_resident.rank import control as controls

GAUGES = RankGauges(1, 2, 3, 4, 5)
MUTEX_BYTES = 64


def hello() -> Hello:
    return Hello(
        rank=0,
        protocol_version=PROTOCOL_VERSION,
        world_size=1,
        local_rank=0,
        host="here",
        host_id="here",
        pid=1,
        incarnation=0,
        device="cpu",
        gauges=GAUGES,
        vllm_version="0",
        torch_version="0",
        engine_arg_names=[],
        generations=[],
    )


def main() -> None:
    controls.HEARTBEAT_S = 0.1
    controls.EXIT_GRACE_S = 0.5
    control = controls.Control(0, 0, sys.argv[1], hello, lambda: GAUGES)
    signal.set_wakeup_fd(control.signal_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    work = contextlib.ExitStack()
    for argument in sys.argv[2:]:
        generation = int(argument.removeprefix("has="))
        assert control.begin(generation)
        if "=" not in argument:
            work.enter_context(control.at_work_on(generation))
    control.start()
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(MUTEX_BYTES)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


if __name__ == "__main__":
    main()
