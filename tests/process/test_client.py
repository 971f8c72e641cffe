"""Both clients over a real socket, against a controller that does as it is told.

What a real controller answers is the business of test_controller.py; here it is what
the client does with answers that are late, odd, or never come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from vllm_resident import (
    AsyncClient,
    Client,
    CommandRejected,
    Completion,
    PoolStatus,
    PoolUnreachable,
    ProtocolError,
    RankLost,
    SwitchReport,
)
from vllm_resident.client import connection
from vllm_resident.client.connection import somebody_listens
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    MAX_MESSAGE_BYTES,
    CallFailed,
    CancelGenerate,
    CheckpointPrefetched,
    ClientMessage,
    Generate,
    GenerateOutput,
    GetStatus,
    LoadEngine,
    PoolStopped,
    Progress,
    ShutdownPool,
    SleepEngine,
    StatusReported,
    SwitchDone,
    SwitchEngines,
    WakeUpEngine,
)
from vllm_resident.transport import GREETING, Decoder, encode

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

Answer = msgspec.Struct | list[bytes]
Script = Callable[[Any], list[Answer]]
STATUS = PoolStatus("default", "ready", 2, 1, 0.0, [], [])


class ScriptedController:
    """A ROUTER that answers each command by `script` and keeps what it received."""

    def __init__(self, endpoint: str, script: Script) -> None:
        self.endpoint = endpoint
        self.received: list[Any] = []
        self._script = script
        self._context = zmq.Context()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        assert self._ready.wait(5)

    def _serve(self) -> None:
        decoder = Decoder[Any](ClientMessage)
        with self._context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(self.endpoint)
            self._ready.set()
            while not self._stop.is_set():
                if not socket.poll(20):
                    continue
                peer, *frames = socket.recv_multipart()
                message = decoder.decode(frames)
                self.received.append(message)
                for answer in self._script(message):
                    out = answer if isinstance(answer, list) else encode(answer)
                    socket.send_multipart([peer, *out])

    def wait_for(self, kind: type, timeout_s: float = 20.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for message in self.received:
                if isinstance(message, kind):
                    return message
            time.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} in {self.received}")

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._context.term()


Serve = Callable[[Script], ScriptedController]


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/c.sock"


@pytest.fixture
def serve(endpoint: str) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(script: Script) -> ScriptedController:
            controller = ScriptedController(endpoint, script)
            stack.callback(controller.close)
            return controller

        yield start


@pytest.fixture
def client(endpoint: str) -> Iterator[Client]:
    with Client(endpoint, connect_timeout_s=5.0) as client:
        yield client


def piece(text: str, finish_reason: str | None = None) -> Completion:
    return Completion(0, 0, text, [1], finish_reason)


def test_load_reports_progress_then_the_switch(serve: Serve, client: Client) -> None:
    report = SwitchReport("load", 2.0, {"build": 2.0}, [])
    serve(
        lambda m: [
            Progress(call=m.call, engine="e", phase="build", elapsed_s=0.1),
            SwitchDone(call=m.call, report=report),
        ]
    )
    phases: list[str] = []
    got = client.load("e", "m", on_progress=lambda p: phases.append(p.phase))
    assert got == report
    assert phases == ["build"]


def test_what_is_switched_reports_progress_then_the_switch(
    serve: Serve, client: Client
) -> None:
    report = SwitchReport("x", 2.0, {}, [], path=["drain", "sleep"], unavailable_s=0.1)
    controller = serve(
        lambda m: [
            Progress(call=m.call, engine="e", phase="drain", elapsed_s=0.1),
            SwitchDone(call=m.call, report=report),
        ]
    )
    phases: list[str] = []

    def on_progress(progress: Progress) -> None:
        phases.append(progress.phase)

    assert client.sleep("e", 2, on_progress=on_progress) == report
    assert client.wake_up("e", on_progress=on_progress) == report
    assert client.switch("e", "f", on_progress=on_progress) == report
    assert phases == ["drain"] * 3
    kinds = [type(message) for message in controller.received]
    assert kinds == [SleepEngine, WakeUpEngine, SwitchEngines]


def test_a_prefetch_reports_progress_then_what_was_read(
    serve: Serve, client: Client
) -> None:
    serve(
        lambda m: [
            Progress(call=m.call, engine="", phase="prefetch", elapsed_s=0.0),
            CheckpointPrefetched(call=m.call, num_bytes=5, seconds=1.0, hosts=["h"]),
        ]
    )
    phases: list[str] = []
    done = client.prefetch("m", on_progress=lambda p: phases.append(p.phase))
    assert (done.num_bytes, done.seconds, done.hosts) == (5, 1.0, ["h"])
    assert phases == ["prefetch"]


def test_an_error_comes_out_as_its_class(serve: Serve, client: Client) -> None:
    error = ErrorInfo("RankLost", "rank 1 is gone", rank=1, generation=7, phase="build")
    serve(lambda m: [CallFailed(call=m.call, error=error)])
    with pytest.raises(RankLost, match="rank 1 is gone") as caught:
        client.load("e", "m")
    assert (caught.value.rank, caught.value.generation) == (1, 7)


def test_a_stream_comes_in_pieces_and_ends(serve: Serve, client: Client) -> None:
    def script(message: Any) -> list[Answer]:
        assert message.stream
        return [
            GenerateOutput(call=message.call, completions=[piece("a")], done=False),
            GenerateOutput(
                call=message.call, completions=[piece("b", "stop")], done=True
            ),
        ]

    controller = serve(script)
    assert [p.text for p in client.stream("e", "x")] == ["a", "b"]
    client_calls = controller.received
    assert not any(isinstance(m, CancelGenerate) for m in client_calls)


def never_ending(message: Any) -> list[Answer]:
    if isinstance(message, Generate):
        return [GenerateOutput(call=message.call, completions=[piece("a")], done=False)]
    return []


def test_leaving_a_stream_early_cancels_it(serve: Serve, client: Client) -> None:
    controller = serve(never_ending)
    for _ in client.stream("e", "x"):
        break
    cancel = controller.wait_for(CancelGenerate)
    assert cancel.call == controller.wait_for(Generate).call


async def test_leaving_an_async_stream_early_cancels_it(
    serve: Serve, endpoint: str
) -> None:
    controller = serve(never_ending)
    async with AsyncClient(endpoint) as client:
        async with contextlib.aclosing(client.stream("e", "x")) as pieces:
            async for _ in pieces:
                break
        await asyncio.to_thread(controller.wait_for, CancelGenerate)


async def test_cancelling_a_generate_task_cancels_the_call(
    serve: Serve, endpoint: str
) -> None:
    controller = serve(never_ending)
    async with AsyncClient(endpoint) as client:
        task = asyncio.create_task(client.generate("e", "x"))
        await asyncio.to_thread(controller.wait_for, Generate)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(controller.wait_for, CancelGenerate)


async def test_a_cancelled_load_is_not_cancelled_in_the_pool(
    serve: Serve, endpoint: str
) -> None:
    controller = serve(lambda m: [])
    async with AsyncClient(endpoint) as client:
        task = asyncio.create_task(client.load("e", "m"))
        await asyncio.to_thread(controller.wait_for, LoadEngine)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(controller.received) == 1


def test_ctrl_c_in_a_blocking_call_cancels_it(serve: Serve, endpoint: str) -> None:
    controller = serve(never_ending)
    code = f"""
        from vllm_resident import Client
        try:
            Client({endpoint!r}).generate("e", "x")
        except KeyboardInterrupt:
            print("interrupted")
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        controller.wait_for(Generate)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=10)
    assert out.strip() == "interrupted"
    assert process.returncode == 0
    controller.wait_for(CancelGenerate)


def test_no_controller_is_unreachable_within_the_deadline(endpoint: str) -> None:
    began = time.monotonic()
    with (
        Client(endpoint, connect_timeout_s=0.2) as client,
        pytest.raises(PoolUnreachable, match="vllm-resident up") as caught,
    ):
        client.status()
    assert endpoint in str(caught.value)
    assert time.monotonic() - began < 5


def test_a_controller_that_falls_silent_is_unreachable(
    serve: Serve, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENCE_TIMEOUT_S", 0.3)
    serve(lambda m: [Progress(call=m.call, engine="e", phase="build", elapsed_s=0.1)])
    with pytest.raises(PoolUnreachable, match=r"within 0\.3 s"):
        client.load("e", "m")


@pytest.mark.parametrize(("max_step_s", "comes_meanwhile"), [(0.25, False), (60, True)])
async def test_a_client_that_stood_still_itself_listens_first(
    max_step_s: float,
    comes_meanwhile: bool,
    serve: Serve,
    endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the machine was paused: the answer comes when both go on, or was there
    before the client's last step was over."""
    monkeypatch.setattr(connection, "MAX_STEP_S", max_step_s)
    may_answer = threading.Event()

    def answer(message: Any) -> list[Answer]:
        assert may_answer.wait(20)
        return [StatusReported(call=message.call, status=STATUS)]

    controller = serve(answer)
    async with AsyncClient(endpoint, connect_timeout_s=5.0) as client:
        asking = asyncio.create_task(client.status())
        await asyncio.to_thread(controller.wait_for, GetStatus)
        if comes_meanwhile:
            may_answer.set()
        time.sleep(5.5)  # noqa: ASYNC251 (this loop stands still)
        may_answer.set()
        assert await asking == STATUS


def test_a_call_that_outlives_its_own_deadline_ends(
    serve: Serve, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNWIND_TIMEOUT_S", 0.1)
    serve(lambda m: [Progress(call=m.call, engine="e", phase="build", elapsed_s=0.1)])
    with pytest.raises(PoolUnreachable, match=r"did not end a call of 0\.2 s"):
        client.load("e", "m", timeout_s=0.2)


def test_a_message_too_large_is_refused_here(serve: Serve, client: Client) -> None:
    controller = serve(lambda m: [StatusReported(call=m.call, status=STATUS)])
    with pytest.raises(ProtocolError, match="over the limit"):
        client.generate("e", "x" * (MAX_MESSAGE_BYTES + 1))
    assert client.status() == STATUS
    assert [type(m) for m in controller.received] == [GetStatus]


@pytest.mark.parametrize("timeout_s", [0.0, -1e185, float("nan")])
def test_a_time_out_that_is_none_is_for_the_controller_to_reject(
    serve: Serve, client: Client, timeout_s: float
) -> None:
    error = CommandRejected("timeout_s is not one").to_info()
    serve(lambda m: [CallFailed(call=m.call, error=error)])
    with pytest.raises(CommandRejected, match="timeout_s"):
        client.wake_up("e", timeout_s=timeout_s)


def test_what_cannot_be_a_message_is_rejected_here(
    serve: Serve, client: Client
) -> None:
    serve(lambda m: [])
    with pytest.raises(CommandRejected, match="cannot be sent"):
        client.load("e", "m", dtype=object())


def test_a_peer_of_another_version_is_a_protocol_error(
    serve: Serve, client: Client
) -> None:
    serve(lambda m: [[b"vllm-resident/99", msgspec.msgpack.encode({"call": m.call})]])
    with pytest.raises(ProtocolError, match="vllm-resident/99"):
        client.status()


def test_bytes_that_are_no_message_are_survived(serve: Serve, client: Client) -> None:
    serve(
        lambda m: [
            [GREETING, msgspec.msgpack.encode({"type": "Late", "call": 12345})],
            StatusReported(call=m.call, status=STATUS),
        ]
    )
    assert client.status() == STATUS


def test_an_answer_of_the_wrong_kind_is_a_protocol_error(
    serve: Serve, client: Client
) -> None:
    serve(lambda m: [PoolStopped(call=m.call)])
    with pytest.raises(ProtocolError, match="expected StatusReported"):
        client.status()


def test_a_frame_the_controller_could_not_read_fails_what_waits(
    serve: Serve, client: Client
) -> None:
    error = ErrorInfo("ProtocolError", "unreadable")
    serve(lambda m: [CallFailed(call=-1, error=error)])
    with pytest.raises(ProtocolError, match="unreadable"):
        client.status()


def test_many_threads_share_one_client(serve: Serve, client: Client) -> None:
    def echo(message: Generate) -> list[Answer]:
        assert isinstance(message.prompts[0], str)
        done = piece(message.prompts[0], "stop")
        return [GenerateOutput(call=message.call, completions=[done], done=True)]

    serve(echo)
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = client.generate("e", str(number))[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == {i: str(i) for i in range(16)}


def test_closing_fails_the_calls_of_other_threads(serve: Serve, client: Client) -> None:
    controller = serve(never_ending)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            client.generate("e", "x")
        except PoolUnreachable as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    controller.wait_for(Generate)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])


def test_a_callback_may_not_call_its_own_client(serve: Serve, client: Client) -> None:
    serve(lambda m: [Progress(call=m.call, engine="e", phase="build", elapsed_s=0.1)])

    def ask_again(_: Progress) -> None:
        client.status()

    with pytest.raises(CommandRejected, match="callback"):
        client.load("e", "m", on_progress=ask_again)


def test_closing_leaves_no_thread_behind(serve: Serve, endpoint: str) -> None:
    serve(lambda m: [StatusReported(call=m.call, status=STATUS)])
    before = set(threading.enumerate())
    with Client(endpoint) as client:
        client.status()
        assert len(set(threading.enumerate()) - before) == 1
    assert not set(threading.enumerate()) - before


def test_a_client_nobody_closed_does_not_keep_the_process(endpoint: str) -> None:
    code = f"from vllm_resident import Client; c = Client({endpoint!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=15)


def test_wait_ready_sees_the_ranks_arrive(serve: Serve, client: Client) -> None:
    phases = iter(["starting", "starting", "ready"])
    serve(
        lambda m: [
            StatusReported(
                call=m.call, status=msgspec.structs.replace(STATUS, phase=next(phases))
            )
        ]
    )
    seen: list[str] = []
    status = client.wait_ready(10, on_status=lambda s: seen.append(s.phase))
    assert status.phase == "ready"
    assert seen == ["starting", "starting", "ready"]


def test_wait_ready_outlasts_a_controller_that_is_not_there_yet(
    serve: Serve, endpoint: str
) -> None:
    with Client(endpoint, connect_timeout_s=0.1) as client:
        timer = threading.Timer(
            0.4,
            serve,
            [lambda m: [StatusReported(call=m.call, status=STATUS)]],
        )
        timer.start()
        assert client.wait_ready(10).phase == "ready"
        timer.join()


def test_wait_ready_says_what_it_saw_last(serve: Serve, client: Client) -> None:
    starting = msgspec.structs.replace(STATUS, phase="starting")
    serve(lambda m: [StatusReported(call=m.call, status=starting)])
    with pytest.raises(PoolUnreachable, match=r"within 5 s .*0 of 2 ranks"):
        client.wait_ready(5)


def test_shutdown_ends_when_the_pool_has_stopped(serve: Serve, client: Client) -> None:
    controller = serve(lambda m: [PoolStopped(call=m.call)])
    client.shutdown(timeout_s=3)
    assert controller.received == [ShutdownPool(call=1, timeout_s=3)]


def test_somebody_listens(serve: Serve, endpoint: str) -> None:
    controller = serve(lambda m: [])
    assert somebody_listens(endpoint)
    controller.close()
    assert not somebody_listens(endpoint)
