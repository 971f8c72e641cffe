"""The wire's messages: each comes back as it went, and only to whom it is meant."""

from __future__ import annotations

import typing

import msgspec
import pytest

from vllm_resident import messages
from vllm_resident.errors import ErrorInfo
from vllm_resident.messages import (
    ClientMessage,
    Completion,
    EngineMemory,
    EngineReport,
    EngineSpec,
    ModelCalls,
    ModelPhaseTotal,
    MoveStatus,
    MoveTotal,
    PhaseBegan,
    PhaseTotal,
    PoolStatus,
    PoolTotals,
    RankGauges,
    RankMessage,
    RankTotal,
    StepCount,
    StepTotal,
    SwitchReport,
    SwitchStatus,
    SwitchTotal,
    ToClientMessage,
    ToController,
    ToRankMessage,
)

SWITCH = SwitchStatus(
    1, "load", "load by a client", "bringing_up", 1.5, 2.0, ["load"],
    [MoveStatus("a", 3, [0], None, 0, "building", [0], {0: [PhaseBegan("x", 0.5)]})],
)  # fmt: skip

SAMPLES: dict[object, object] = {
    int: 7,
    float: 1.5,
    str: "é",
    bool: True,
    int | None: None,
    list[int]: [1, 2],
    list[str]: ["a"],
    dict[str, float]: {"build": 1.0},
    dict[str, typing.Any]: {"x": [1, None, "y"]},
    list[str | list[int]]: ["text", [1, 2]],
    EngineSpec: EngineSpec("a", "/m", [0, 1], {"dtype": "half"}),
    list[EngineSpec]: [EngineSpec("a", "/m", 2), EngineSpec("b", "/n")],
    list[Completion]: [Completion(0, 0, "x", [1], "stop", 2, -0.5)],
    RankGauges: RankGauges(1, 2, 3, 4, 5, steps={"a": StepCount(3, 0.5)}),
    EngineMemory: EngineMemory(1, 2),
    dict[str, ModelCalls]: {"a": ModelCalls(3, 2, 1.5)},
    typing.Literal["sleep", "unload", "stage"]: "stage",
    ErrorInfo: ErrorInfo("RankLost", "gone", 1, 2, "build"),
    ErrorInfo | None: ErrorInfo("CommandRejected", "not there"),
    SwitchReport: SwitchReport(
        "load", 1.0, {"a": 1.0},
        [EngineReport("a", "load", 1, [0], 1.0, {}, {0: 1}, {0: 2})],
    ),
    PoolStatus: PoolStatus("p", "ready", 1, 2, 3.0, [], [], switches=[SWITCH]),
    SwitchStatus: SWITCH,
    PoolTotals: PoolTotals(
        [1.0],
        [SwitchTotal("load", "load", "done", 1, 0.5, 0.0, [1])],
        [PhaseTotal("load", "load", "load", "build", 1, 0.5)],
        [ModelPhaseTotal("a", "load", "build", 1, 0.5)],
        [MoveTotal("a", 0, "load", 1, 0.5)],
        [StepTotal("a", 0, 3, 0.5, 1)],
        [RankTotal(0, 1, 1)],
    ),
}  # fmt: skip


def every(union: object) -> list[type[msgspec.Struct]]:
    return list(typing.get_args(union))


def sample(kind: type[msgspec.Struct]) -> msgspec.Struct:
    types = typing.get_type_hints(kind)
    return kind(**{field: SAMPLES[types[field]] for field in kind.__struct_fields__})


RECEIVERS = [ToController, ToClientMessage, ToRankMessage]
CASES = [(union, kind) for union in RECEIVERS for kind in every(union)]


@pytest.mark.parametrize(("union", "kind"), CASES)
def test_message_survives_the_wire(union, kind):
    message = sample(kind)
    frames = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(frames, type=union) == message


@pytest.mark.parametrize(("union", "kind"), CASES)
def test_message_is_refused_by_other_receivers(union, kind):
    document = msgspec.msgpack.encode(sample(kind))
    for other in RECEIVERS:
        if other is not union:
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(document, type=other)


@pytest.mark.parametrize(("union", "kind"), CASES)
def test_missing_and_mistyped_fields_are_refused(union, kind):
    document = msgspec.to_builtins(sample(kind))
    for field in set(document) - {"type"}:
        is_required = kind.__struct_defaults__ == ()
        for broken in (
            {k: v for k, v in document.items() if k != field} if is_required else None,
            document | {field: object.__name__.encode()},
        ):
            if broken is None:
                continue
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(msgspec.msgpack.encode(broken), type=union)


def test_every_message_is_in_the_union_of_its_receiver():
    bases = {
        messages.FromClient: ClientMessage,
        messages.FromRank: RankMessage,
        messages.ToClient: ToClientMessage,
        messages.ToRank: ToRankMessage,
    }
    for base, union in bases.items():
        assert set(base.__subclasses__()) == set(every(union))


def test_messages_are_frozen():
    for _, kind in CASES:
        assert kind.__struct_config__.frozen
