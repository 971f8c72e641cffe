"""Leader and follower over real ZMQ PAIR sockets, each with a fake engine core."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from vllm_resident.errors import ProtocolError, RankDiverged, RankFailure, RankTimeout

pytestmark = [pytest.mark.process, pytest.mark.timeout(110)]

ANSWER_S = 20.0


class FakeEngineCore:
    """Answers each running request with one token a step; remembers what it was told.

    `skew` is added to every token: a core that computes something else.
    """

    def __init__(self, skew: int = 0) -> None:
        self.skew = skew
        self.told: list[tuple[int, str, Any]] = []
        self.running: list[str] = []
        self.num_steps = 0

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        return request, 0

    def add_request(self, request: Any, wave: int) -> None:
        self.told.append((self.num_steps, "add", request.request_id))
        self.running.append(request.request_id)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.told.append((self.num_steps, "abort", list(request_ids)))
        self.running = [name for name in self.running if name not in request_ids]

    def step_fn(self) -> tuple[dict[int, Any] | None, bool]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        self.num_steps += 1
        if not self.running:
            return None, False  # as a step that only fills the batch queue
        outputs = [
            EngineCoreOutput(name, [self.num_steps + self.skew])
            for name in self.running
        ]
        return {0: EngineCoreOutputs(outputs=outputs)}, True

    def post_step(self, *, model_executed: bool) -> None:
        pass


class FakeStore:
    """What the world's store is for connecting: a dictionary, for one thread."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        return self._values[key]

    def wait(self, keys: list[str]) -> None:
        assert self._values.keys() >= set(keys)


def connect(folder: Path, context: zmq.Context[Any]) -> tuple[Any, Any]:
    """(the leader's line, the follower's), connected as a rank does it."""
    from vllm_resident.rank.lines import Lines

    store = FakeStore()
    address = f"ipc://{folder}/plan-7-1.sock"
    store.set("plan/1", address)
    lines = Lines(context, folder)
    following = lines.follow(1, store)
    (leading,) = lines.lead(7, store, 1)
    return leading, following


class Pair:
    """A leader and its one follower, both here, over real sockets."""

    def __init__(self, folder: Path) -> None:
        from vllm_resident.rank import lockstep

        self.context: zmq.Context[Any] = zmq.Context()
        self.sending, self.receiving = connect(folder, self.context)
        self.cores = FakeEngineCore(), FakeEngineCore()
        self.leader = lockstep.Leader(self.cores[0], [self.sending])
        self.follower = lockstep.Follower(self.cores[1], self.receiving)

    def follow(self) -> bool:
        """The follower's next turn, once its plan has arrived."""
        assert self.receiving.poll(ANSWER_S * 1000), "no plan came"
        return self.follower.follow()

    def step(self) -> None:
        self.leader.get_output()
        self.follow()

    def take(self) -> list[bytes]:
        """The next plan off the wire, before the follower sees it."""
        assert self.receiving.poll(ANSWER_S * 1000), "no plan came"
        return self.receiving.recv_multipart()

    def forge(self, frames: list[bytes]) -> None:
        """Send frames that are not the leader's doing."""
        self.sending.send_multipart(frames)

    def close(self) -> None:
        # Plans nobody took are no reason to wait.
        for line in (self.sending, self.receiving):
            line.close(linger=0)
        self.context.term()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def request(name: str, num_tokens: int = 4) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(range(num_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_plans_are_applied_in_order_at_the_same_step(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.leader.add_request(request("b"))
    pair.step()
    pair.step()
    pair.leader.abort_requests(["a"])
    pair.leader.add_request(request("c"))
    pair.step()
    leader, follower = pair.cores
    assert leader.told == follower.told
    assert follower.told == [
        (0, "add", "a"),
        (0, "add", "b"),
        (2, "abort", ["a"]),
        (2, "add", "c"),
    ]
    assert leader.running == follower.running == ["b", "c"]
    assert leader.num_steps == follower.num_steps == 3


def test_a_follower_without_a_plan_does_nothing(pair: Pair) -> None:
    assert not pair.follower.follow()
    assert pair.cores[1].num_steps == 0


def test_a_request_arrives_whole(pair: Pair) -> None:
    sent = request("a", num_tokens=3)
    received: list[Any] = []
    core = pair.cores[1]
    core.add_request = lambda request, wave: received.append(request)  # type: ignore[method-assign]
    pair.leader.add_request(sent)
    pair.step()
    assert received[0].prompt_token_ids == [0, 1, 2]
    assert received[0].sampling_params.max_tokens == 8


def test_a_withdrawn_request_reaches_nobody(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.leader.add_request(request("b"))
    pair.leader.withdraw(["a"])
    pair.step()
    assert [core.running for core in pair.cores] == [["b"], ["b"]]


def test_steps_without_output_keep_the_digest(pair: Pair) -> None:
    pair.step()
    pair.leader.add_request(request("a"))
    pair.step()
    pair.leader.abort_requests(["a"])
    pair.step()
    pair.step()
    assert [core.num_steps for core in pair.cores] == [4, 4]


def test_divergence_is_found_before_the_plan_is_applied(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.cores[1].skew = 1
    pair.step()
    pair.leader.add_request(request("b"))
    pair.leader.get_output()
    with pytest.raises(RankDiverged, match="differ from its leader's"):
        pair.follow()
    assert pair.cores[1].told == [(0, "add", "a")]
    assert pair.cores[1].num_steps == 1


def test_settling_shows_a_divergence_of_the_last_step(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.cores[1].skew = 1
    pair.step()
    pair.leader.settle()
    with pytest.raises(RankDiverged):
        pair.follow()


def test_settling_takes_no_step(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.step()
    pair.leader.settle()
    assert pair.follow()
    assert [core.num_steps for core in pair.cores] == [1, 1]


def test_a_lost_plan_is_a_protocol_error(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.leader.get_output()
    pair.take()
    pair.leader.get_output()
    with pytest.raises(ProtocolError, match="plan 1 came, 0 was due"):
        pair.follow()
    assert pair.cores[1].told == []


def test_a_duplicated_plan_is_a_protocol_error(pair: Pair) -> None:
    pair.leader.get_output()
    plan = pair.take()
    pair.forge(plan)
    pair.forge(plan)
    pair.follow()
    with pytest.raises(ProtocolError, match="plan 0 came, 1 was due"):
        pair.follow()
    assert pair.cores[1].num_steps == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: [b"\xc1"],
        lambda plan: [msgspec.msgpack.encode([0, 0])],
        lambda plan: plan[:-1],
        lambda plan: [*plan, b""],
        lambda plan: [*plan[:-1], b"\xc1"],
        lambda plan: [plan[0].replace(b"\xc4\x01\x00", b"\xc4\x01\x07"), *plan[1:]],
    ],
    ids=["header", "fields", "missing", "extra", "payload", "kind"],
)
def test_a_malformed_plan_is_a_protocol_error(pair: Pair, damage: Any) -> None:
    """Also where only its second action is: the first is not applied either."""
    pair.leader.add_request(request("a"))
    pair.leader.add_request(request("b"))
    pair.leader.get_output()
    pair.forge(damage(pair.take()))
    with pytest.raises(ProtocolError):
        pair.follow()
    assert pair.cores[1].told == []


def test_the_stop_plan_ends_with_the_last_aborts(pair: Pair) -> None:
    pair.leader.add_request(request("a"))
    pair.step()
    pair.leader.abort_requests(["a"])
    pair.leader.stop()
    assert not pair.follower.stopped
    pair.follow()
    assert pair.follower.stopped
    assert pair.cores[1].running == []
    assert pair.cores[1].num_steps == 1


def test_a_follower_that_left_fails_the_leader_at_once(pair: Pair) -> None:
    """Sending to nobody would block for ever, and with it the leader's commands."""
    pair.step()
    pair.follower.close()
    deadline = time.monotonic() + ANSWER_S
    with pytest.raises(RankFailure, match="follower 1 has left"):
        lead_until(pair.leader, deadline)


def lead_until(leader: Any, deadline: float) -> None:
    while time.monotonic() < deadline:
        leader.get_output()
        time.sleep(0.01)


def test_lead_and_follow_connect(tmp_path: Path) -> None:
    with zmq.Context() as context:
        leading, following = connect(tmp_path, context)
        leading.send(b"plan")
        assert following.recv() == b"plan"
        assert not list(tmp_path.glob("*.sock"))
        leading.close()
        following.close()


def test_a_plan_sent_right_before_the_end_still_arrives(tmp_path: Path) -> None:
    """The stop plan behind others that the follower has not come round to read."""
    from vllm_resident.rank import lockstep
    from vllm_resident.rank.lines import Lines

    store = FakeStore()
    store.set("plan/1/sent", b"1")
    with zmq.Context() as context:
        following = context.socket(zmq.PAIR)
        following.setsockopt(zmq.RCVHWM, 1)
        following.connect(f"ipc://{tmp_path}/plan-7-1.sock")
        following.send(b"here")
        (leading,) = Lines(context, tmp_path).lead(7, store, 1)
        leader = lockstep.Leader(FakeEngineCore(), [leading])
        follower = lockstep.Follower(FakeEngineCore(), following)
        for number in range(50):
            leader.add_request(request(str(number), num_tokens=50_000))
            leader.get_output()
        leader.stop()
        leader.close()
        time.sleep(0.2)
        while not follower.stopped:
            assert following.poll(ANSWER_S * 1000), "the stop plan was lost"
            follower.follow()
        follower.close()


def test_a_follower_that_never_connects_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_resident.rank import lines

    monkeypatch.setattr(lines, "CONNECT_TIMEOUT_S", 0.1)
    store = FakeStore()
    store.set("plan/1/sent", b"1")
    with (
        zmq.Context() as context,
        pytest.raises(RankTimeout, match="follower 1 of generation 7"),
    ):
        lines.Lines(context, tmp_path).lead(7, store, 1)
    assert not list(tmp_path.glob("*.sock"))


def test_a_follower_asks_to_be_held_and_is_told_at_which_step(pair: Pair) -> None:
    from vllm_resident.rank import lockstep

    def wishes() -> list[Any]:
        assert pair.sending.poll(ANSWER_S * 1000), "no wish came"
        return pair.leader.take_wishes()

    pair.step()
    pair.follower.ask_to_hold(9)
    pair.follower.ask_to_hold(9)
    assert wishes() == [(1, lockstep.Wish(9, done=False))]
    assert pair.leader.take_wishes() == []
    # A step that was planned before is taken before.
    pair.leader.get_output()
    pair.leader.hold(9)
    pair.follow()
    assert not pair.follower.held
    pair.follow()
    assert list(pair.follower.held) == [9]
    assert pair.cores[1].num_steps == pair.cores[0].num_steps == 2
    pair.follower.end_hold(9)
    pair.follower.end_hold(9)
    assert wishes() == [(1, lockstep.Wish(9, done=True))]
    pair.step()
    assert pair.cores[1].num_steps == pair.cores[0].num_steps == 3


def test_a_leader_may_hold_before_a_follower_asks(pair: Pair) -> None:
    """It forms the same world, or another follower has asked: it says so once."""
    pair.leader.hold(9)
    pair.follow()
    pair.follower.ask_to_hold(9)
    assert 9 in pair.follower.held
    pair.step()


def test_a_wish_that_is_none_is_refused(pair: Pair) -> None:
    pair.receiving.send(b"\xc1")
    assert pair.sending.poll(ANSWER_S * 1000)
    with pytest.raises(ProtocolError, match="not a follower's wish"):
        pair.leader.take_wishes()
