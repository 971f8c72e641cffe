"""What the client makes of its arguments, without a socket."""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from vllm_resident import AsyncClient, Client, CommandRejected, Completion, EngineSpec
from vllm_resident.client.connection import resolve_endpoint, somebody_listens
from vllm_resident.messages import (
    ApplyLayout,
    CheckpointPrefetched,
    Generate,
    GenerateOutput,
    LoadEngine,
    PrefetchCheckpoint,
    SleepEngine,
    SwitchDone,
    SwitchEngines,
    SwitchReport,
    ToClientMessage,
    UnloadEngine,
    WakeUpEngine,
)


class Recorder:
    """Stands where the connection is: keeps commands, gives prepared replies."""

    def __init__(self, *answers: ToClientMessage) -> None:
        self.commands: list[Any] = []
        self.answers = answers
        self.left_early = False

    def next_call(self) -> int:
        return 7

    async def ask(self, command: Any, expected: Any, *_: Any) -> Any:
        self.commands.append(command)
        return self.answers[0]

    async def replies(self, command: Any, *_: Any) -> AsyncGenerator[ToClientMessage]:
        self.commands.append(command)
        self.left_early = True
        for answer in self.answers:
            yield answer
        self.left_early = False


def client_with(*answers: ToClientMessage) -> tuple[AsyncClient, Recorder]:
    client = AsyncClient("ipc:///nowhere")
    recorder = Recorder(*answers)
    client._connection = recorder  # type: ignore[assignment]
    return client, recorder


def switch_done() -> SwitchDone:
    return SwitchDone(call=7, report=SwitchReport("load", 1.0, {}, []))


def output(*completions: Completion, done: bool = True) -> GenerateOutput:
    return GenerateOutput(call=7, completions=list(completions), done=done)


@pytest.mark.parametrize(
    ("prompts", "batch"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        (((1,), "a"), [[1], "a"]),
    ],
)
async def test_prompts_are_one_or_many(prompts: Any, batch: list[Any]) -> None:
    client, recorder = client_with(output())
    await client.generate("e", prompts)
    assert recorder.commands[0].prompts == batch


@pytest.mark.parametrize("prompts", [None, 3, ["a", 3], [1, "a"], [True], [[1.5]]])
async def test_prompts_of_another_kind_are_rejected(prompts: Any) -> None:
    client, recorder = client_with()
    with pytest.raises(CommandRejected, match="prompt"):
        await client.generate("e", prompts)
    assert recorder.commands == []


async def test_no_prompts_are_no_call() -> None:
    client, recorder = client_with()
    assert await client.generate("e", []) == []
    assert recorder.commands == []


async def test_completions_are_sorted_by_prompt_then_index() -> None:
    second, first = Completion(1, 0, "c", [3]), Completion(0, 1, "b", [2])
    zeroth = Completion(0, 0, "a", [1])
    client, _ = client_with(output(second, done=False), output(first, zeroth))
    assert await client.generate("e", ["x", "y"], n=2) == [zeroth, first, second]


async def test_sampling_parameters_either_way() -> None:
    client, recorder = client_with(output())
    await client.generate("e", "x", {"n": 2}, temperature=0, timeout_s=5)
    assert recorder.commands == [
        Generate(
            call=7,
            engine="e",
            prompts=["x"],
            sampling_params={"n": 2, "temperature": 0},
            stream=False,
            timeout_s=5,
        )
    ]


async def test_a_sampling_parameter_given_twice_is_rejected() -> None:
    client, recorder = client_with()
    with pytest.raises(CommandRejected, match="'n' is given twice"):
        await client.generate("e", "x", {"n": 2}, n=3)
    assert recorder.commands == []


async def test_a_stream_left_early_leaves_its_replies() -> None:
    client, recorder = client_with(
        output(Completion(0, 0, "a", [1]), done=False), output()
    )
    pieces = client.stream("e", "x")
    assert (await anext(pieces)).text == "a"
    await pieces.aclose()
    assert recorder.left_early


async def test_a_stream_takes_one_prompt() -> None:
    client, _ = client_with()
    with pytest.raises(CommandRejected, match="one prompt"):
        await anext(client.stream("e", ["a", "b"]))  # type: ignore[arg-type]


async def test_load_passes_engine_arguments_on_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    client, recorder = client_with(switch_done())
    await client.load("e", "tiny", ranks=[0], tensor_parallel_size=1)
    await client.load("e", "org/model")
    assert recorder.commands == [
        LoadEngine(
            call=7,
            spec=EngineSpec(
                "e", str(tmp_path / "tiny"), [0], {"tensor_parallel_size": 1}
            ),
            timeout_s=600.0,
        ),
        LoadEngine(call=7, spec=EngineSpec("e", "org/model"), timeout_s=600.0),
    ]


async def test_load_without_a_model_is_of_a_declared_one() -> None:
    client, recorder = client_with(switch_done())
    await client.load("e", asleep=True, pinned=True)
    spec = EngineSpec("e", asleep=True, pinned=True)
    assert recorder.commands == [LoadEngine(call=7, spec=spec, timeout_s=600.0)]


async def test_what_sleeps_wakes_and_goes_says_how_long_it_drains() -> None:
    client, recorder = client_with(switch_done())
    await client.sleep("e")
    await client.sleep("e", 2, drain_s=0, timeout_s=5)
    await client.wake_up("e", drain_s=1)
    await client.unload("e")
    await client.unload("e", drain_s=2)
    await client.apply([], drain_s=3)
    assert recorder.commands == [
        SleepEngine(call=7, name="e", level=1, timeout_s=600.0, drain_s=30.0),
        SleepEngine(call=7, name="e", level=2, timeout_s=5, drain_s=0),
        WakeUpEngine(call=7, name="e", timeout_s=600.0, drain_s=1),
        UnloadEngine(call=7, name="e", timeout_s=600.0, drain_s=0.0),
        UnloadEngine(call=7, name="e", timeout_s=600.0, drain_s=2),
        ApplyLayout(call=7, engines=[], timeout_s=600.0, drain_s=3),
    ]


@pytest.mark.parametrize(
    ("new", "spec"),
    [
        ("b", EngineSpec("b")),
        (EngineSpec("b", "m", 1), EngineSpec("b", "m", 1)),
        (
            {"name": "b", "model": "m", "seed": 3},
            EngineSpec("b", "m", None, {"seed": 3}),
        ),
    ],
)
async def test_a_switch_is_to_a_name_or_to_what_is_to_be_loaded(
    new: Any, spec: EngineSpec
) -> None:
    client, recorder = client_with(switch_done())
    await client.switch("a", new, strategy="stage", drain_s=1)
    assert recorder.commands == [
        SwitchEngines(
            call=7, old="a", new=spec, timeout_s=600.0, drain_s=1, strategy="stage"
        )
    ]


async def test_a_strategy_that_is_none_is_rejected() -> None:
    client, recorder = client_with(switch_done())
    with pytest.raises(CommandRejected, match=r"'wake'.*sleep, unload, stage"):
        await client.switch("a", "b", strategy="wake")  # type: ignore[arg-type]
    assert recorder.commands == []


async def test_prefetch_names_a_folder_here_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    done = CheckpointPrefetched(call=7, num_bytes=1, seconds=1.0, hosts=["here"])
    client, recorder = client_with(done)
    assert await client.prefetch("tiny") == done
    await client.prefetch("declared", timeout_s=5)
    assert recorder.commands == [
        PrefetchCheckpoint(call=7, model=str(tmp_path / "tiny"), timeout_s=600.0),
        PrefetchCheckpoint(call=7, model="declared", timeout_s=5),
    ]


async def test_apply_takes_specs_tables_and_files(tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text('[engines.a]\nmodel = "m"\nranks = 1\n')
    spec = EngineSpec("a", "m", 1)
    client, recorder = client_with(switch_done())
    await client.apply([spec])
    await client.apply([{"name": "a", "model": "m", "ranks": 1}])
    await client.apply(layout)
    await client.apply(str(layout))
    expected = ApplyLayout(call=7, engines=[spec], timeout_s=600.0)
    assert recorder.commands == [expected] * 4


def test_endpoint_from_argument_environment_or_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_RESIDENT_DIR", str(tmp_path))
    monkeypatch.delenv("VLLM_RESIDENT_CONTROLLER", raising=False)
    assert resolve_endpoint(None, "p") == f"ipc://{tmp_path}/p/controller.sock"
    monkeypatch.setenv("VLLM_RESIDENT_CONTROLLER", "tcp://127.0.0.1:1")
    assert resolve_endpoint(None, "p") == "tcp://127.0.0.1:1"
    assert resolve_endpoint("ipc:///x", "p") == "ipc:///x"


def test_nobody_listens_at_a_socket_that_is_not_there(tmp_path: Path) -> None:
    assert not somebody_listens(f"ipc://{tmp_path}/none.sock")


def test_close_is_idempotent_and_final() -> None:
    client = Client("ipc:///nowhere")
    client.close()
    client.close()
    with pytest.raises(CommandRejected, match="closed"):
        client.status()


def test_the_sync_client_has_every_method_of_the_async_one() -> None:
    names = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert names == {name for name in vars(Client) if not name.startswith("_")}
    for name in names - {"endpoint", "close"}:
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__
