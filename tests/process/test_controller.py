"""The real controller process, with simulated ranks in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket as network
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from vllm_resident.messages import (
    MAX_MESSAGE_BYTES,
    ApplyLayout,
    CallFailed,
    CancelGenerate,
    EngineSpec,
    FromClient,
    Generate,
    GenerateOutput,
    GetStatus,
    Heartbeat,
    LoadEngine,
    PoolStatus,
    PoolStopped,
    Progress,
    RankGauges,
    ShutdownPool,
    StatusReported,
    SwitchDone,
    ToClientMessage,
    UnloadEngine,
)
from vllm_resident.transport import GREETING, Decoder, encode, open_socket

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).parents[2]
START_S = 40.0
ANSWER_S = 30.0
GAUGES = RankGauges(0, 0, 0, 0, 0)


def wait_until(what: str, holds: Callable[[], Any], timeout_s: float = ANSWER_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := holds():
            return result
        time.sleep(0.02)
    raise AssertionError(f"within {timeout_s} s: {what}")


class Peer:
    """A client on the wire: sends what it is told, right or wrong."""

    def __init__(self, endpoint: str, identity: bytes | None = None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = open_socket(self.context, zmq.DEALER)
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)
        self.decoder: Decoder[ToClientMessage] = Decoder(ToClientMessage)
        self.calls = 0

    def send(self, kind: type[FromClient], **fields: Any) -> int:
        self.calls += 1
        self.socket.send_multipart(encode(kind(call=self.calls, **fields)))
        return self.calls

    def receive(self, timeout_s: float = ANSWER_S) -> ToClientMessage:
        if not self.socket.poll(int(timeout_s * 1000)):
            raise AssertionError(f"no answer within {timeout_s} s")
        return self.decoder.decode(self.socket.recv_multipart())

    def answer(self, call: int, timeout_s: float = ANSWER_S) -> ToClientMessage:
        """The next message for the call that is not progress."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.receive(max(0.0, deadline - time.monotonic()))
            if message.call == call and not isinstance(message, Progress):
                return message

    def done(self, kind: type[FromClient], **fields: Any) -> ToClientMessage:
        return self.answer(self.send(kind, **fields))

    def load(
        self, name: str, ranks: list[int], timeout_s: float = 20.0, **args: Any
    ) -> ToClientMessage:
        spec = EngineSpec(name, "/m", ranks, args)
        return self.done(LoadEngine, spec=spec, timeout_s=timeout_s)

    def generate(
        self,
        engine: str,
        stream: bool = False,
        timeout_s: float = 30.0,
        **params: Any,
    ) -> int:
        return self.send(
            Generate,
            engine=engine,
            prompts=["a", "b"],
            sampling_params=params,
            stream=stream,
            timeout_s=timeout_s,
        )

    def status(self) -> PoolStatus:
        message = self.done(GetStatus)
        assert isinstance(message, StatusReported)
        return message.status

    def phases(self) -> dict[str, str]:
        return {engine.name: engine.phase for engine in self.status().engines}

    def close(self) -> None:
        self.context.destroy(linger=0)


class PoolFixture:
    """Starts controllers, ranks and clients; ends every one however the test ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.peers: list[Peer] = []
        self.environment = os.environ | {"VLLM_RESIDENT_DIR": str(directory)}

    @property
    def endpoint(self) -> str:
        return str(self.pool_file()["endpoint"])

    def pool_file(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            (self.directory / "default" / "pool.json").read_text()
        )
        return content

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=self.environment,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def controller(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = self.start("-m", "vllm_resident.controller", *arguments)

        def listens() -> bool:
            assert process.poll() is None, self.log()
            try:
                return self.pool_file()["pid"] == process.pid
            except FileNotFoundError:
                return False

        wait_until("the controller listens", listens, START_S)
        return process

    def rank(
        self, rank: int, world_size: int, *arguments: str
    ) -> subprocess.Popen[bytes]:
        return self.start(
            "-m", "tests.process.simulated_rank",
            "--endpoint", self.endpoint, "--rank", str(rank),
            "--world-size", str(world_size), "--parent", str(os.getpid()),
            "--record", str(self.record_file(rank)), *arguments,
        )  # fmt: skip

    def record_file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.jsonl"

    def received(self, rank: int, kind: str) -> list[dict[str, Any]]:
        """What the rank was sent of this kind."""
        try:
            lines = self.record_file(rank).read_text().splitlines()
        except FileNotFoundError:
            return []
        messages = [json.loads(line) for line in lines]
        return [message for message in messages if message["message"] == kind]

    def client(self, identity: bytes | None = None) -> Peer:
        self.peers.append(Peer(self.endpoint, identity))
        return self.peers[-1]

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def up(
        self, world_size: int, *arguments: str
    ) -> tuple[Peer, list[subprocess.Popen[bytes]]]:
        """A controller, its ranks, and a client, when all are ready."""
        self.controller(*arguments)
        ranks = [self.rank(rank, world_size) for rank in range(world_size)]
        client = self.client()
        self.wait_ready(client)
        return client, ranks

    def wait_ready(self, client: Peer) -> None:
        wait_until("ready", lambda: client.status().phase == "ready", START_S)

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(10)


@pytest.fixture
def pool() -> Iterator[PoolFixture]:
    # Not tmp_path: a socket's path may have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="vr-"))
    fixture = PoolFixture(directory)
    try:
        yield fixture
    finally:
        fixture.close()
        shutil.rmtree(directory)


def output(message: ToClientMessage) -> GenerateOutput:
    assert isinstance(message, GenerateOutput), message
    return message


def error(message: ToClientMessage) -> Any:
    assert isinstance(message, CallFailed), message
    return message.error


def is_done(message: ToClientMessage) -> bool:
    assert isinstance(message, SwitchDone), message
    return True


# ------------------------------------------------------------ commands


def test_life_of_a_pool(pool):
    client, ranks = pool.up(2)
    status = client.status()
    assert [rank.pid for rank in status.ranks] == [process.pid for process in ranks]

    call = client.send(
        LoadEngine, spec=EngineSpec("a", "/m", [0, 1], {}), timeout_s=20.0
    )
    messages = [client.receive()]
    while isinstance(messages[-1], Progress):
        messages.append(client.receive())
    assert {message.call for message in messages} == {call}
    phases = [m.phase for m in messages if isinstance(m, Progress)]
    # One that takes longer is said again.
    assert list(dict.fromkeys(phases)) == ["prepare", "build"]
    report = messages[-1].report.engines[0]
    assert report.seconds == pytest.approx(sum(report.phases.values()))

    batch = output(client.answer(client.generate("a", max_tokens=4)))
    assert [(c.prompt_index, c.text) for c in batch.completions] == [
        (0, "xxxx"),
        (1, "xxxx"),
    ]
    stream = client.generate("a", stream=True, max_tokens=3)
    pieces = [output(client.answer(stream)) for _ in range(3)]
    assert [piece.done for piece in pieces] == [False, False, True]

    wanted = [EngineSpec("b", "/m", [0]), EngineSpec("c", "/m", [1])]
    applied = client.done(ApplyLayout, engines=wanted, timeout_s=20.0)
    assert is_done(applied)
    assert client.phases() == {"b": "ready", "c": "ready"}
    assert is_done(client.done(UnloadEngine, name="b", timeout_s=20.0))
    assert client.phases() == {"c": "ready"}

    stopped = client.done(ShutdownPool, timeout_s=10.0)
    assert isinstance(stopped, PoolStopped)
    for process in (pool.processes[0], *ranks):
        assert process.wait(10) == 0
    left = {path.name for path in (pool.directory / "default").iterdir()}
    assert left == {"controller.lock", "transitions.jsonl"}
    assert "event=engine_phase engine=a ranks=0,1 generation=1" in pool.log()
    assert "Traceback" not in pool.log()


def test_load_that_fails_on_one_rank_frees_them_all(pool):
    client, _ = pool.up(2)
    rejected = error(client.load("a", [0, 1], fail="prepare", fail_rank=1))
    assert rejected.kind == "CommandRejected"
    broken = error(client.load("a", [0, 1], fail="build", fail_rank=1))
    assert (broken.kind, broken.rank, broken.phase) == ("RankFailure", 1, "build")
    assert client.phases() == {}
    assert is_done(client.load("b", [1, 0]))


def test_load_past_its_deadline(pool):
    client, _ = pool.up(1)
    late = error(client.load("a", [0], timeout_s=0.5, hang="build", fail_rank=0))
    assert late.kind == "RankTimeout"
    assert is_done(client.load("b", [0]))


def test_cancelled_stream_ends_with_abort(pool):
    client, _ = pool.up(1)
    client.load("a", [0])
    call = client.generate("a", stream=True, max_tokens=10_000, piece_s=0.05)
    output(client.answer(call))
    client.socket.send_multipart(encode(CancelGenerate(call=call)))
    last = output(client.answer(call))
    while not last.done:
        last = output(client.answer(call))
    assert {c.finish_reason for c in last.completions} == {"abort"}


VANISHING_CLIENT = """
import sys, zmq
from vllm_resident.messages import Generate
from vllm_resident.transport import encode, open_socket
socket = open_socket(zmq.Context(), zmq.DEALER)
socket.connect(sys.argv[1])
socket.send_multipart(encode(Generate(
    call=1, engine="a", prompts=["x"], stream=sys.argv[2] == "stream", timeout_s=60.0,
    sampling_params={"max_tokens": 10**6, "piece_s": 0.05})))
while True:
    socket.recv_multipart()
"""


@pytest.mark.parametrize("how", ["stream", "batch"])
def test_requests_of_a_client_that_is_killed_are_aborted(pool, how):
    client, _ = pool.up(2)
    client.load("a", [0, 1])
    vanishing = pool.start("-c", VANISHING_CLIENT, pool.endpoint, how)
    wait_until("the request runs", lambda: pool.received(0, "AddRequest"))
    vanishing.kill()
    vanishing.wait(5)
    wait_until("the abort", lambda: pool.received(0, "AbortRequest"))
    assert pool.received(1, "AbortRequest") == []
    assert client.status().engines[0].num_requests == 0


# ------------------------------------------------------------ ranks that die


def test_killed_rank_fails_its_requests_spares_others_and_is_restored(pool):
    client, ranks = pool.up(3)
    client.load("a", [0, 1])
    client.load("b", [2])
    call = client.generate("a", stream=True, max_tokens=10**6, piece_s=0.05)
    output(client.answer(call))
    ranks[1].kill()
    began = time.monotonic()
    answered = client.answer(call)
    while isinstance(answered, GenerateOutput):
        answered = client.answer(call)
    # Not by its silence, which would be noticed later.
    assert time.monotonic() - began < 25
    assert error(answered).kind == "RankLost"
    assert error(answered).rank == 1
    assert re.search("its (process|connection) ended", error(answered).message)
    assert f"pid {ranks[1].pid}" in error(answered).message
    # A zombie is dead for the kernel, and so for the controller.
    assert client.phases() == {"a": "lost", "b": "ready"}
    assert output(client.answer(client.generate("b"))).done
    assert error(client.answer(client.generate("a"))).kind == "RankLost"

    pool.rank(1, 3, "--incarnation", "1")
    wait_until("restored", lambda: client.phases().get("a") == "ready")
    assert output(client.answer(client.generate("a"))).done
    assert client.status().num_protocol_errors == 0


def test_silent_rank_of_another_host_is_lost_within_five_seconds(pool):
    pool.controller()
    ranks = [pool.rank(rank, 2, "--host-id", f"other:{rank}") for rank in range(2)]
    client = pool.client()
    pool.wait_ready(client)
    client.load("a", [0, 1])
    call = client.generate("a", max_tokens=10**6, piece_s=0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        lost = error(client.answer(call))
    finally:
        ranks[1].send_signal(signal.SIGCONT)
    assert lost.kind == "RankLost"
    # By its own count, which does not run while the controller stands still.
    silent_s = re.search(r"no heartbeat for ([\d.]+) s", lost.message)
    assert silent_s is not None
    assert 4 <= float(silent_s[1]) <= 5
    # Taken back as it is, after it gave up what it held.
    wait_until("restored", lambda: client.phases().get("a") == "ready")


def test_rank_of_another_world_or_version_is_sent_away(pool):
    client, _ = pool.up(1)
    for arguments in (("0", "2"), ("5", "1")):
        assert pool.rank(*map(int, arguments)).wait(START_S) == 1
    assert pool.rank(0, 1, "--protocol-version", "99").wait(START_S) == 1
    wait_until("ready", lambda: client.status().phase == "ready")


# ------------------------------------------------------------ what is not a message


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([b"garbage"], "expected 2 frames"),
        ([GREETING, b"\xc1\x00"], "not a message"),
        ([b"vllm-resident/999", b"\x80"], "vllm-resident/999"),
        ([GREETING, bytes(MAX_MESSAGE_BYTES + 1)], "over the limit"),
    ],
)
def test_frames_that_are_not_a_message(pool, frames, says):
    client, _ = pool.up(1)
    client.load("a", [0])
    other = pool.client()
    other.socket.send_multipart(frames)
    refused = other.receive()
    assert refused.call == -1
    assert error(refused).kind == "ProtocolError"
    assert says in error(refused).message
    assert client.status().num_protocol_errors == 1
    assert output(client.answer(client.generate("a"))).done
    # The peer itself may go on with a good one.
    assert other.status().phase == "ready"


def test_message_with_a_bad_field_is_answered_by_its_number(pool):
    client, _ = pool.up(1)
    document = {"type": "UnloadEngine", "call": 77, "name": 3, "timeout_s": 1}
    client.socket.send_multipart([GREETING, msgspec.msgpack.encode(document)])
    refused = client.receive()
    assert refused.call == 77
    assert "name" in error(refused).message


def test_far_too_large_frame_costs_its_sender_the_connection_only(pool):
    client, _ = pool.up(1)
    other = pool.client()
    other.socket.send_multipart([GREETING, bytes(4 * MAX_MESSAGE_BYTES + 1)])
    assert other.socket.poll(1000) == 0
    assert client.status().phase == "ready"


def test_client_cannot_speak_for_a_rank(pool):
    client, _ = pool.up(1)
    client.load("a", [0])
    client.socket.send_multipart(
        encode(Heartbeat(rank=0, incarnation=0, gauges=GAUGES))
    )
    refused = client.receive()
    assert error(refused).kind == "ProtocolError"
    rank = pool.client(identity=b"rank-9")
    rank.send(GetStatus)
    wait_until("refused", lambda: client.status().num_protocol_errors == 2)


# ------------------------------------------------------------ controllers


def test_second_controller_of_a_pool_is_refused(pool):
    first = pool.controller()
    second = pool.start("-m", "vllm_resident.controller")
    assert second.wait(START_S) == 3
    assert f"pid {first.pid}" in pool.log()
    assert pool.pool_file()["pid"] == first.pid
    other = pool.start("-m", "vllm_resident.controller", "--pool", "other")
    wait_until("the other pool", (pool.directory / "other" / "pool.json").exists)
    assert other.poll() is None


def test_wrong_arguments_say_so(pool):
    for arguments in (
        ("--bind", "tcp://0.0.0.0:1"),
        ("--pool", "no/name"),
        ("--heartbeat-timeout", "nan"),
        ("--owner-pid", "4194304"),
    ):
        process = pool.start("-m", "vllm_resident.controller", *arguments)
        assert process.wait(START_S) == 2
    assert "Traceback" not in pool.log()


def test_socket_somebody_listens_on_is_not_taken_away(pool):
    path = pool.directory / "other.sock"
    with network.socket(network.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = pool.start(
            "-m", "vllm_resident.controller", "--bind", f"ipc://{path}"
        )
        assert process.wait(START_S) == 3
        assert path.exists()


def test_controller_on_tcp_says_its_port(pool):
    pool.controller("--bind", "tcp://127.0.0.1:*")
    assert pool.endpoint.startswith("tcp://127.0.0.1:")
    assert pool.client().status().phase == "starting"


def test_controller_ends_with_its_owner_and_takes_the_ranks_along(pool):
    owner = pool.start("-c", "import time; time.sleep(60)")
    _, ranks = pool.up(2, "--owner-pid", str(owner.pid))
    owner.kill()
    controller = pool.processes[1]
    assert controller.wait(10) == 0
    for process in ranks:
        assert process.wait(10) == 0


def test_controller_waits_for_its_owner_when_every_rank_ended(pool):
    owner = pool.start("-c", "import time; time.sleep(60)")
    client, ranks = pool.up(1, "--owner-pid", str(owner.pid))
    client.load("a", [0])
    ranks[0].kill()
    wait_until("lost", lambda: client.status().phase == "degraded")
    pool.rank(0, 1, "--incarnation", "1")
    wait_until("restored", lambda: client.phases() == {"a": "ready"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_pool_in_order(pool, number):
    _, ranks = pool.up(2)
    pool.processes[0].send_signal(number)
    for process in (pool.processes[0], *ranks):
        assert process.wait(15) == 0
    assert not (pool.directory / "default" / "pool.json").exists()


def test_controller_that_was_killed_can_be_started_again(pool):
    client, ranks = pool.up(2)
    client.load("a", [0, 1])
    session = pool.pool_file()["session"]
    pool.processes[0].kill()
    pool.processes[0].wait(5)
    pool.controller()
    assert pool.pool_file()["session"] != session
    client = pool.client()
    # The ranks are still the same; what they held under the old one is gone.
    pool.wait_ready(client)
    assert [rank.pid for rank in client.status().ranks] == [p.pid for p in ranks]
    assert [drop["generation"] for drop in pool.received(0, "DropEngine")] == [1]
    assert is_done(client.load("b", [0, 1]))


def test_folder_is_for_this_user_only(pool):
    pool.controller()
    assert (pool.directory / "default").stat().st_mode & 0o077 == 0


# ------------------------------------------------------------ imports


@pytest.mark.parametrize("module", ["controller.__main__", "client", "cli"])
def test_neither_torch_nor_vllm_is_imported(module):
    program = (
        f"import sys, vllm_resident.{module}\n"
        "found = {'torch', 'vllm', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=30
    )
