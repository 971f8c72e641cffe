"""A leader's frontends over real ZMQ sockets, with a fake engine core on each rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from vllm_resident.errors import CommandRejected, RankDiverged

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

ANSWER_S = 20.0
ADAPTERS = {"one": "/adapters/one", "two": "/adapters/two"}


class FakeEngineCore:
    """One token a step for each running request, to whom it is of. Refuses requests
    called "bad"; remembers what else it was told."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=16)
        )
        self.clients: dict[str, int] = {}
        self.told: list[Any] = []
        self.num_steps = 0
        self.skew = 0

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        if request.request_id.startswith("bad"):
            raise ValueError("no such grammar")
        return request, 0

    def add_request(self, request: Any, wave: int) -> None:
        self.clients[request.request_id] = request.client_index

    def abort_requests(self, request_ids: list[str]) -> None:
        self.told.append(("abort", sorted(request_ids)))
        for name in request_ids:
            self.clients.pop(name, None)

    def step_fn(self) -> tuple[dict[int, Any], bool]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        self.num_steps += 1
        outputs: dict[int, Any] = {}
        for name, client in list(self.clients.items()):
            token = self.num_steps + (self.skew if client else 0)
            output = EngineCoreOutput(name, [token])
            if name.startswith("short"):
                output.finish_reason = FinishReason.STOP
                del self.clients[name]
            there = outputs.setdefault(client, EngineCoreOutputs())
            there.outputs = [*there.outputs, output]
        return outputs, bool(outputs)

    def post_step(self, *, model_executed: bool) -> None:
        pass

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def is_sleeping(self) -> bool:
        return False

    def reset_prefix_cache(self, *flags: bool) -> bool:
        self.told.append(("reset_prefix_cache", flags))
        return True

    def add_lora(self, adapter: Any) -> bool:
        self.told.append(("add_lora", adapter.lora_name, adapter.lora_path))
        return True

    def collective_rpc(self, *args: Any) -> None:
        raise AssertionError("called by a frontend")


class Peer:
    """A frontend's end of the wire, as `AsyncMPClient` has it."""

    def __init__(self, context: zmq.Context[Any], folder: Path, number: int) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.number = number
        self.addresses = [f"ipc://{folder}/{number}-{way}.sock" for way in ("i", "o")]
        self._router = context.socket(zmq.ROUTER)
        self._pull = context.socket(zmq.PULL)
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._identity = b""

    def listen(self) -> None:
        self._router.bind(self.addresses[0])
        self._pull.bind(self.addresses[1])

    def await_ready(self) -> bytes:
        assert self._router.poll(ANSWER_S * 1000), "no ready message"
        self._identity, payload = self._router.recv_multipart()
        return bytes(payload)

    def send(self, *frames: bytes) -> None:
        self._router.send_multipart([self._identity, *frames])

    def add(self, name: str, num_tokens: int = 4, **changes: Any) -> None:
        self.send(b"\x00", *self._encoder.encode(request(name, num_tokens, **changes)))

    def abort(self, *names: str) -> None:
        self.send(b"\x01", *self._encoder.encode(list(names)))

    def call(self, call_id: int, method: str, *args: Any) -> None:
        self.send(b"\x03", *self._encoder.encode((0, call_id, method, args)))

    def outputs(self) -> Any:
        assert self._pull.poll(ANSWER_S * 1000), "no outputs came"
        return self._decoder.decode(self._pull.recv_multipart())

    def ended(self) -> list[tuple[str, str]]:
        """The requests that the next outputs end, and how."""
        return [
            (o.request_id, o.finish_reason.name)
            for o in self.outputs().outputs
            if o.finish_reason is not None
        ]

    def is_quiet(self) -> bool:
        return not self._pull.poll(50)

    def close(self) -> None:
        self._router.close(linger=0)
        self._pull.close(linger=0)


def adapter(name: str, number: int, path: str = "") -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path or ADAPTERS[name])


def request(name: str, num_tokens: int, **changes: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    fields: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": list(range(num_tokens)),
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=8),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**{**fields, **changes})


class Engine:
    """A leader with its frontends and one follower, over fake cores."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_resident.rank import frontends, lockstep

        monkeypatch.setattr(frontends.Frontends, "_ready", lambda self: b"ready")
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self._lines = [self.context.socket(zmq.PAIR) for _ in range(2)]
        self._lines[0].bind(f"ipc://{folder}/plan.sock")
        self._lines[1].connect(f"ipc://{folder}/plan.sock")
        self.core, self.follower_core = FakeEngineCore(), FakeEngineCore()
        self.leader = lockstep.Leader(self.core, self._lines[:1])  # type: ignore[arg-type]
        self.follower = lockstep.Follower(self.follower_core, self._lines[1])  # type: ignore[arg-type]
        self.poller = zmq.Poller()
        self.counts: list[int] = []
        self.frontends = frontends.Frontends(
            self.core,  # type: ignore[arg-type]
            self.leader,
            self.context,
            self.poller,
            self.counts.append,
            ADAPTERS,
        )
        self.peers: list[Peer] = []

    def peer(self) -> Peer:
        """One more frontend, connected and ready."""
        peer = Peer(self.context, self.folder, len(self.peers) + 1)
        self.peers.append(peer)
        self.frontends.connect(peer.number, *peer.addresses)
        peer.listen()  # after the leader has connected: the order does not matter
        assert peer.await_ready() == b"ready"
        return peer

    def hear(self, *, hold: bool = False) -> None:
        """What the peers have sent, once something is there."""
        assert self.poller.poll(ANSWER_S * 1000), "nothing came"
        assert self.frontends.receive(hold=hold)

    def step(self) -> Any:
        """A step on both ranks; the pool's own outputs."""
        own = self.leader.get_output()
        self.frontends.send_outputs()
        assert self._lines[1].poll(ANSWER_S * 1000)
        self.follower.follow()
        return own

    def close(self) -> None:
        self.frontends.close()
        for peer in self.peers:
            peer.close()
        for line in self._lines:
            line.close(linger=0)
        self.context.destroy(linger=0)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    engine = Engine(tmp_path, monkeypatch)
    yield engine
    engine.close()


def test_each_gets_its_own_outputs_and_the_pool_its(engine: Engine) -> None:
    one, two = engine.peer(), engine.peer()
    one.add("one")
    engine.hear()
    two.add("two")
    engine.hear()
    engine.leader.add_request(request("own", 2))
    own = engine.step()
    assert [o.request_id for o in own.outputs] == ["own"]
    assert [o.request_id for o in one.outputs().outputs] == ["one"]
    assert [o.request_id for o in two.outputs().outputs] == ["two"]
    assert engine.core.clients == {"one": 1, "two": 2, "own": 0}
    assert engine.follower_core.clients == engine.core.clients
    assert one.is_quiet()


def test_a_follower_that_differs_for_a_frontend_diverges(engine: Engine) -> None:
    peer = engine.peer()
    peer.add("a")
    engine.hear()
    engine.follower_core.skew = 1
    engine.step()
    with pytest.raises(RankDiverged):
        engine.step()


def test_aborts_reach_both_and_only_ones_own(engine: Engine) -> None:
    one, two = engine.peer(), engine.peer()
    one.add("a")
    engine.hear()
    engine.step()
    two.abort("a")
    engine.hear()
    engine.step()
    assert engine.core.clients == {"a": 1}
    one.abort("a", "never")
    engine.hear()
    engine.step()
    assert engine.core.told == engine.follower_core.told == [("abort", ["a"])]
    assert engine.frontends.num_requests == 0


def test_counts_are_told_when_there_are_some_and_none(engine: Engine) -> None:
    peer = engine.peer()
    peer.add("short-a")
    engine.hear()
    engine.step()
    assert peer.ended() == [("short-a", "STOP")]
    assert engine.counts == [1, 0]


def test_reading_calls_are_answered_at_once(engine: Engine) -> None:
    peer = engine.peer()
    for hold in (False, True):
        peer.call(7, "get_supported_tasks")
        engine.hear(hold=hold)
        answer = peer.outputs().utility_output
        assert (answer.call_id, answer.failure_message) == (7, None)
        assert list(answer.result.result) == ["generate"]


def test_calls_that_change_something_are_made_on_every_rank(engine: Engine) -> None:
    peer = engine.peer()
    peer.call(9, "reset_prefix_cache", False, True)
    engine.hear()
    assert engine.leader.has_pending
    engine.step()
    answer = peer.outputs().utility_output
    assert (answer.call_id, answer.result.result) == (9, True)
    told = [("reset_prefix_cache", (False, True))]
    assert engine.core.told == engine.follower_core.told == told


def test_adapters_of_the_engine_are_loaded_on_every_rank(engine: Engine) -> None:
    peer = engine.peer()
    peer.call(9, "add_lora", adapter("two", 2))
    engine.hear()
    engine.step()
    answer = peer.outputs().utility_output
    assert (answer.call_id, answer.result.result) == (9, True)
    told = [("add_lora", "two", "/adapters/two")]
    assert engine.core.told == engine.follower_core.told == told
    peer.add("a", lora_request=adapter("two", 2))
    engine.hear()
    engine.step()
    assert engine.follower_core.clients == {"a": 1}


@pytest.mark.parametrize(
    ("name", "number", "path"),
    [
        ("one", 1, "/etc"),  # no file but those that it was loaded with
        ("three", 3, "/adapters/one"),
        ("two", 1, "/adapters/two"),  # the number that another has
    ],
)
def test_other_adapters_are_refused(
    engine: Engine, name: str, number: int, path: str
) -> None:
    peer = engine.peer()
    peer.call(9, "add_lora", adapter(name, number, path))
    engine.hear()
    assert "when it is loaded" in peer.outputs().utility_output.failure_message
    peer.add("a", lora_request=adapter(name, number, path))
    engine.hear()
    assert peer.ended() == [("a", "ERROR")]
    assert not engine.leader.has_pending


@pytest.mark.parametrize(
    ("method", "args", "hold"),
    [
        ("collective_rpc", ("save", None, (), {}), False),
        ("sleep", (1, "abort"), False),
        ("add_lora", ({"path": "/etc"},), False),
        ("__class__", (), False),
        ("reset_prefix_cache", ("not a flag",), False),
        ("reset_prefix_cache", (), True),
        ("is_sleeping", (1,), False),
        (["list"], (), False),
    ],
)
def test_other_calls_are_refused_and_answered(
    engine: Engine, method: Any, args: Any, hold: bool
) -> None:
    peer = engine.peer()
    peer.call(3, method, *args)
    engine.hear(hold=hold)
    answer = peer.outputs().utility_output
    assert answer.call_id == 3
    assert answer.failure_message
    assert engine.core.told == []


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\x09", b"\x90"],
        [b"\x00"],
        [b"\x00", b"\xc1"],
        [b"\x00", msgspec.msgpack.encode([7])],
        [b"\x01", msgspec.msgpack.encode("not a list")],
        [b"\x03", msgspec.msgpack.encode({"a": 1})],
        [b"\x02", b""],
        [b"\x00" * 5000, b"\x00"],
    ],
)
def test_bad_frames_are_survived(engine: Engine, frames: list[bytes]) -> None:
    peer = engine.peer()
    peer.send(*frames)
    engine.hear()
    peer.add("short-after")
    engine.hear()
    engine.step()
    assert ("short-after", "STOP") in peer.ended()


def test_who_sent_a_request_that_cannot_be_read_hears_of_it(engine: Engine) -> None:
    peer = engine.peer()
    peer.send(b"\x00", msgspec.msgpack.encode(["name", "no tokens"]))
    engine.hear()
    assert peer.ended() == [("name", "ERROR")]
    peer.send(b"\x03", msgspec.msgpack.encode([0, 42]))
    engine.hear()
    answer = peer.outputs().utility_output
    assert answer.call_id == 42
    assert answer.failure_message


def test_requests_that_would_hurt_the_scheduler_are_refused(engine: Engine) -> None:
    peer = engine.peer()
    peer.add("a")
    engine.hear()
    for name, num_tokens, changes in (
        ("a", 4, {}),
        ("long", 17, {}),
        ("pieces", 4, {"resumable": True}),
    ):
        peer.add(name, num_tokens, **changes)
        engine.hear()
        assert peer.ended() == [(name, "ERROR")]
    engine.step()
    assert engine.core.clients == {"a": 1}


def test_what_vllm_refuses_ends_the_request_not_the_engine(engine: Engine) -> None:
    peer = engine.peer()
    peer.add("bad-grammar")
    engine.hear()
    engine.leader.add_request(request("bad-own", 2))
    own = engine.step()
    assert peer.ended() == [("bad-grammar", "ERROR")]
    assert [o.request_id for o in own.outputs] == ["bad-own"]
    assert not engine.leader.has_pending
    assert engine.counts == [1, 0]
    engine.step()  # the follower refused them too: no divergence


def test_a_sleeping_engine_holds_what_comes(engine: Engine) -> None:
    peer = engine.peer()
    for name in ("a", "b", "c"):
        peer.add(name)
    while engine.frontends.num_requests < 3:
        engine.hear(hold=True)
    peer.abort("b")
    engine.hear(hold=True)
    assert not engine.leader.has_pending
    assert engine.frontends.num_requests == 2
    engine.frontends.admit_held()
    engine.step()
    assert engine.core.clients == {"a": 1, "c": 1}


def test_what_runs_when_it_falls_asleep_ends_as_aborted(engine: Engine) -> None:
    from vllm.v1.engine import FinishReason

    peer = engine.peer()
    peer.add("a")
    engine.hear()
    engine.step()
    peer.outputs()
    engine.frontends.end_requests(FinishReason.ABORT)
    assert peer.ended() == [("a", "ABORT")]
    engine.step()
    assert engine.follower_core.told == [("abort", ["a"])]
    assert engine.counts == [1, 0]


def test_a_frontend_that_leaves_takes_its_requests_along(engine: Engine) -> None:
    one, two = engine.peer(), engine.peer()
    one.add("a")
    engine.hear()
    two.add("b")
    engine.hear()
    engine.step()
    engine.frontends.disconnect(1)
    engine.frontends.disconnect(1)
    engine.step()
    assert engine.core.clients == engine.follower_core.clients == {"b": 2}


def test_a_released_engine_fails_what_it_had(engine: Engine) -> None:
    peer = engine.peer()
    peer.add("a")
    engine.hear()
    engine.frontends.close()
    assert peer.ended() == [("a", "ERROR")]
    assert engine.frontends.num_requests == 0
    assert not engine.poller.poll(0)


def test_no_two_have_one_number_and_addresses_are_checked(engine: Engine) -> None:
    peer = engine.peer()
    with pytest.raises(CommandRejected, match="taken"):
        engine.frontends.connect(peer.number, *peer.addresses)
    with pytest.raises(CommandRejected, match="taken"):
        engine.frontends.connect(0, *peer.addresses)
    with pytest.raises(CommandRejected, match="cannot connect"):
        engine.frontends.connect(8, "nowhere", "at all")


def test_one_that_sends_without_end_leaves_room_for_steps(engine: Engine) -> None:
    from vllm_resident.rank import frontends

    peer = engine.peer()
    for number in range(500):
        peer.add(f"r{number}")
    time.sleep(0.2)
    assert engine.poller.poll(ANSWER_S * 1000)
    assert engine.frontends.receive(hold=False)
    assert 0 < engine.frontends.num_requests <= frontends.MESSAGES_PER_ROUND
