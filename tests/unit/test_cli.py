"""The command line: its grammar, what it prints where, and its exit codes."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from vllm_resident import (
    CheckpointPrefetched,
    CommandRejected,
    Completion,
    EngineMemory,
    EngineReport,
    EngineSpec,
    EngineStatus,
    PoolStatus,
    PoolUnreachable,
    ProtocolError,
    RankLost,
    RankStatus,
    SwitchReport,
)
from vllm_resident.cli import commands, display, main
from vllm_resident.cli.arguments import parse_value
from vllm_resident.cli.parser import parse
from vllm_resident.launch import default_num_ranks, num_gpus, torchrun_command
from vllm_resident.messages import Progress

REPORT = SwitchReport(
    "load",
    2.0,
    {"build": 2.0},
    [EngineReport("chat", "load", 7, [0, 1], 2.0, {"build": 2.0}, {}, {})],
)
RANK = RankStatus(
    0, "ready", 42, "here", "cpu", 0, ["chat"], 2**30, 2**33, 0.1, 16, 4, 0
)
ENGINE = EngineStatus("chat", "m", "ready", 7, [0], {"dtype": "float32"}, 2)
STATUS = PoolStatus("default", "ready", 1, 41, 65.0, [RANK], [ENGINE])


class FakeClient:
    """Answers every call with what it was given, or raises it; keeps the calls."""

    endpoint = "ipc:///nowhere"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("on_progress", None)
            self.calls.append((name, args, kwargs))
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

        return call

    def __enter__(self) -> "FakeClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def prepare(what: Any) -> FakeClient:
        client = FakeClient(what)
        monkeypatch.setattr(commands, "connect", lambda _: client)
        return client

    return prepare


# ---------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--tensor-parallel-size 2", {"tensor_parallel_size": 2}),
        ("--tensor-parallel-size=2", {"tensor_parallel_size": 2}),
        ("--tensor_parallel_size 2", {"tensor_parallel_size": 2}),
        ("--enforce-eager", {"enforce_eager": True}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--enforce-eager --seed -1", {"enforce_eager": True, "seed": -1}),
        ("--dtype float32", {"dtype": "float32"}),
        ("--gpu-memory-utilization 0.5", {"gpu_memory_utilization": 0.5}),
        ('--hf-overrides {"a":{"b":1}}', {"hf_overrides": {"a": {"b": 1}}}),
        ("--dtype=", {"dtype": ""}),
        ("--ranks 0 --seed 3", {"seed": 3}),
        ("--json --seed 3", {"seed": 3}),
    ],
)
def test_unknown_options_are_vllms(words: str, options: dict[str, Any]) -> None:
    arguments = parse(["load", "chat", "./m", *words.split()])
    assert arguments.vllm == options
    assert (arguments.name, arguments.model) == ("chat", "./m")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("1e-3", 0.001),
        ("true", True),
        ("False", False),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('"123"', "123"),
        ("NaN", "NaN"),
        ("v1.0", "v1.0"),
        ("[not json", "[not json"),
    ],
)
def test_values_read_as_json_or_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_known_options_stand_anywhere() -> None:
    for words in (
        "--pool p --json load chat m --ranks 0-2,5 --seed 3",
        "load --pool p --ranks 0-2,5 --json chat m --seed 3",
        "load chat m --seed 3 --pool=p --ranks 0-2,5 --json",
    ):
        arguments = parse(words.split())
        assert (arguments.pool, arguments.json) == ("p", True)
        assert arguments.ranks == [0, 1, 2, 5]
        assert arguments.vllm == {"seed": 3}


def test_a_pool_may_be_called_like_a_command() -> None:
    arguments = parse(["--pool", "load", "load", "a", "m", "--seed", "3"])
    assert (arguments.pool, arguments.name, arguments.vllm) == (
        "load",
        "a",
        {"seed": 3},
    )


def test_after_two_dashes_everything_is_a_prompt() -> None:
    arguments = parse(["generate", "chat", "--max-tokens", "3", "--", "--odd", "one"])
    assert arguments.prompts == ["--odd", "one"]
    assert arguments.vllm == {"max_tokens": 3}


def test_prompts_may_follow_own_options() -> None:
    arguments = parse(["generate", "chat", "--stream", "Hello", "--temperature", "0"])
    assert (arguments.prompts, arguments.stream) == (["Hello"], True)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "fly",
        "load",
        "load chat m --seed 1 --seed 2",
        "load chat m --ranks 0,x",
        "load chat m --ranks 0 --num-ranks 1",
        "load chat m --timeout 0",
        "up --nproc-per-node 0",
        "status --wacth",
        "sleep chat --level 3",
        "sleep chat --drain -1",
        "switch chat",
        "switch chat tiny --strategy stgae",
        "switch chat tiny --seed 3",
        "switch chat tiny --ranks 0",
        "trace --last 0",
        "trace --last 1 --since 1m",
        "trace --since yesterday",
    ],
)
def test_wrong_usage_exits_with_2(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        parse(words.split())
    assert exited.value.code == 2
    assert "usage: vllm-resident" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "",
        "up",
        "status",
        "load",
        "unload",
        "sleep",
        "wake-up",
        "switch",
        "prefetch",
        "generate",
        "apply",
        "trace",
        "shutdown",
        "doctor",
    ],
)
def test_every_command_has_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        parse([*command.split(), "--help"])
    assert exited.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "exit codes:" in out
    assert "130  Ctrl-C" in out


# --------------------------------------------------------------------- commands


def test_load_hands_vllms_options_on(answer: Any) -> None:
    client = answer(REPORT)
    assert main(["load", "chat", "m", "--num-ranks", "2", "--dtype", "float32"]) == 0
    expected = {
        "ranks": 2, "asleep": False, "pinned": False, "timeout_s": 600.0,
        "dtype": "float32",
    }  # fmt: skip
    assert client.calls == [("load", ("chat", "m"), expected)]


def test_a_declared_model_is_loaded_by_its_name(answer: Any) -> None:
    client = answer(REPORT)
    assert main(["load", "chat", "--asleep", "--pinned", "--seed", "3"]) == 0
    expected = {
        "ranks": None, "asleep": True, "pinned": True, "timeout_s": 600.0, "seed": 3,
    }  # fmt: skip
    assert client.calls == [("load", ("chat", ""), expected)]


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (
            "sleep chat --level 2 --drain 0",
            ("sleep", ("chat", 2), {"drain_s": 0.0, "timeout_s": 600.0}),
        ),
        (
            "wake-up chat --timeout 5",
            ("wake_up", ("chat",), {"drain_s": 30.0, "timeout_s": 5.0}),
        ),
        (
            "unload chat --drain 2",
            ("unload", ("chat",), {"drain_s": 2.0, "timeout_s": 600.0}),
        ),
        (
            "switch chat tiny",
            (
                "switch",
                ("chat", EngineSpec("tiny")),
                {"drain_s": 30.0, "strategy": "sleep", "timeout_s": 600.0},
            ),
        ),
        (
            "switch chat big --model org/m --num-ranks 2 --strategy stage --seed 3",
            (
                "switch",
                ("chat", EngineSpec("big", "org/m", 2, {"seed": 3})),
                {"drain_s": 30.0, "strategy": "stage", "timeout_s": 600.0},
            ),
        ),
    ],
)
def test_what_moves_engines_is_handed_on(answer: Any, words: str, call: Any) -> None:
    client = answer(REPORT)
    assert main(words.split()) == 0
    assert client.calls == [call]


def test_prefetch_says_how_much_was_read(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = answer(
        CheckpointPrefetched(call=1, num_bytes=2**30, seconds=2.0, hosts=["here"])
    )
    assert main(["prefetch", "m"]) == 0
    assert capsys.readouterr().out == "m: 1.00 GiB in memory on here, 2.00 s\n"
    assert main(["prefetch", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "model": "m", "num_bytes": 2**30, "seconds": 2.0, "hosts": ["here"],
    }  # fmt: skip
    assert client.calls == [("prefetch", ("m",), {"timeout_s": 600.0})] * 2


@pytest.mark.parametrize("option", ["--model", "--name", "--timeout-s"])
def test_load_refuses_what_is_no_engine_argument(answer: Any, option: str) -> None:
    client = answer(REPORT)
    assert main(["load", "chat", "m", option, "x"]) == 2
    assert client.calls == []


def test_apply_reads_the_file_before_it_calls(answer: Any, tmp_path: Path) -> None:
    client = answer(REPORT)
    assert main(["apply", str(tmp_path / "none.toml")]) == 2
    assert client.calls == []
    (tmp_path / "l.toml").write_text('[engines.a]\nmodel = "m"\n')
    assert main(["apply", str(tmp_path / "l.toml"), "--timeout", "5"]) == 0
    assert client.calls[0][2] == {"drain_s": 0.0, "timeout_s": 5.0}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandRejected("no"), 2),
        (PoolUnreachable("nobody"), 3),
        (RankLost("gone", rank=1, phase="build"), 1),
        (ProtocolError("what"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(answer: Any, error: BaseException, code: int) -> None:
    answer(error)
    assert main(["unload", "chat"]) == code


def test_an_error_is_one_line_that_says_who_and_where(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(RankLost("its host is gone", rank=1, phase="build"))
    main(["unload", "chat"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "RankLost: its host is gone (rank 1, phase build)\n"


def test_an_interrupted_switch_is_said_to_go_on(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(KeyboardInterrupt())
    main(["unload", "chat"])
    assert "the pool goes on" in capsys.readouterr().err
    main(["generate", "chat", "hi"])
    assert "the pool goes on" not in capsys.readouterr().err


def test_an_error_in_json_is_a_document_too(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(RankLost("gone", rank=1, phase="build"))
    assert main(["--json", "unload", "chat"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"kind": "RankLost", "message": "gone", "rank": 1, "phase": "build"}


@pytest.mark.parametrize(
    ("words", "answered"),
    [
        ("status", STATUS),
        ("status --ledger", STATUS),
        ("load chat m", REPORT),
        ("sleep chat", REPORT),
        ("wake-up chat", REPORT),
        ("switch chat tiny", REPORT),
        ("unload chat", REPORT),
        ("generate chat hi", [Completion(0, 0, "ho", [1], "stop")]),
        ("shutdown", None),
        ("doctor", None),
    ],
)
def test_json_is_exactly_one_document(
    answer: Any, capsys: pytest.CaptureFixture[str], words: str, answered: Any
) -> None:
    answer(answered)
    assert main([*words.split(), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_generate_prints_the_text(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client = answer([Completion(0, 0, "[b]ho[/b]", [1], "stop")])
    assert main(["generate", "chat", "hi", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "[b]ho[/b]\n"
    assert client.calls == [
        ("generate", ("chat", ["hi"], {"temperature": 0}), {"timeout_s": 600.0})
    ]


def test_a_stream_prints_pieces_as_they_come(
    answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def pieces() -> Iterator[Completion]:
        yield Completion(0, 0, "a", [1])
        yield Completion(0, 0, "b", [2], "stop")

    answer(pieces())
    assert main(["generate", "chat", "hi", "--stream"]) == 0
    assert capsys.readouterr().out == "ab\n"
    answer(pieces())
    assert main(["generate", "chat", "hi", "--stream", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a", "b"]


@pytest.mark.parametrize("words", ["a b --stream", "a --stream --n 2"])
def test_a_stream_is_of_one_sequence(answer: Any, words: str) -> None:
    client = answer([])
    assert main(["generate", "chat", *words.split()]) == 2
    assert client.calls == []


def test_prompts_from_files(answer: Any, tmp_path: Path) -> None:
    client = answer([])
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('"one"\n[1, 2]\n{"prompt": "three"}\n')
    main(["generate", "chat", "--file", str(tmp_path / "p.txt")])
    main(["generate", "chat", "--file", str(tmp_path / "p.jsonl")])
    assert [call[1][1] for call in client.calls] == [
        ["one", "two"],
        ["one", [1, 2], "three"],
    ]


@pytest.mark.parametrize("content", ["\n", "{}\n", "[1, true]\n", "nonsense\n"])
def test_a_wrong_prompt_file_is_rejected(
    answer: Any, tmp_path: Path, content: str
) -> None:
    client = answer([])
    (tmp_path / "p.jsonl").write_text(content)
    assert main(["generate", "chat", "--file", str(tmp_path / "p.jsonl")]) == 2
    assert client.calls == []


# ---------------------------------------------------------------------- display


def rendered(what: Any) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_status_shows_ranks_and_engines() -> None:
    text = rendered(display.pool_tables(STATUS))
    assert "pool default: ready, 1 ranks, up 1:05" in text
    assert "1.00 / 8.00" in text
    assert "dtype='float32'" in text


def test_status_says_how_deep_an_engine_sleeps() -> None:
    asleep = msgspec.structs.replace(ENGINE, phase="asleep", sleep_level=1)
    status = msgspec.structs.replace(STATUS, engines=[asleep])
    assert "asleep (level 1)" in rendered(display.pool_tables(status))
    assert "level" not in rendered(display.pool_tables(STATUS))


def test_the_pool_table_says_who_is_waited_for() -> None:
    status = msgspec.structs.replace(STATUS, waiting={"chat": 3, "tiny": 1})
    assert "calls that wait: 3 for chat, 1 for tiny" in rendered(
        display.pool_tables(status)
    )
    assert "wait" not in rendered(display.pool_tables(STATUS))


def test_the_ledger_says_who_holds_what() -> None:
    rank = msgspec.structs.replace(
        RANK, num_sockets=11, num_process_groups=12, num_engines=13
    )
    memory = {0: EngineMemory(5 * 2**20, 7 * 2**20)}
    asleep = EngineStatus(
        "zzz", "m", "asleep", 8, [0], {}, 0, sleep_level=2, pinned=True, idle_s=65.0,
        memory={0: EngineMemory(2**20, 0)},
    )  # fmt: skip
    status = msgspec.structs.replace(
        STATUS,
        ranks=[rank],
        engines=[msgspec.structs.replace(ENGINE, memory=memory), asleep],
        host_memory_bytes=2**30,
    )
    lines = rendered(display.ledger_tables(status)).splitlines()
    found = [" ".join(line.split()) for line in lines]
    assert "0 ready 1.00 / 8.00 16 11 4 0 12 13" in found
    assert "chat ready 0:00 0 5.0 7.0" in found
    assert "zzz (pinned) asleep (level 2) 1:05 0 1.0 0.0" in found
    assert "device memory rank 0 6.0 MiB no limit" in found
    assert "host memory here 7.0 MiB 1024.0 MiB" in found


def test_the_ledger_counts_communicators_that_are_kept_apart() -> None:
    rank = msgspec.structs.replace(
        RANK,
        num_process_groups=12,
        num_kept_communicators=9,
        kept_communicator_bytes=3 * 2**20,
        num_suspended_communicators=2,
    )
    status = msgspec.structs.replace(STATUS, ranks=[rank], max_communicators=40)
    lines = rendered(display.ledger_tables(status)).splitlines()
    found = [" ".join(line.split()) for line in lines]
    assert "rank 0 12 9 40 3.0 as fits the device 2" in found
    assert "communicators" not in rendered(display.ledger_tables(STATUS))


def test_a_summary_of_a_switch_says_its_path_and_its_gap() -> None:
    parts = [
        EngineReport("chat", "sleep", 7, [0], 0.5, {}, {}, {}, sleep_level=1),
        EngineReport("tiny", "wake_up", 8, [0], 0.5, {}, {}, {}, moved_bytes=2**30),
    ]
    report = SwitchReport(
        "switch", 1.0, {}, parts, path=["drain", "sleep", "wake_up"], unavailable_s=0.25
    )
    text = rendered(display.switch_summary(report))
    assert "chat put to sleep (level 1): rank 0" in text
    assert "tiny woken: rank 0, 0.500 s, generation 8, 1.00 GiB moved" in text
    assert (
        "switch took 1.00 s (drain → sleep → wake_up); neither could serve for 0.250 s"
        in text
    )


@pytest.mark.parametrize(
    ("moved_s", "link", "words"),
    [
        (0.0, 0.0, "10.00 GiB moved"),
        (0.5, 0.0, "10.00 GiB moved at 21.5 GB/s"),
        (0.5, 25e9, "10.00 GiB moved at 21.5 GB/s, 86% of the link"),
    ],
)
def test_a_summary_says_how_fast_weights_moved(
    moved_s: float, link: float, words: str
) -> None:
    part = EngineReport(
        "tiny", "wake_up", 8, [0], 0.6, {}, {}, {},
        moved_bytes=10 * 2**30, moved_s=moved_s, link_bytes_per_s=link,
    )  # fmt: skip
    text = rendered(display.switch_summary(SwitchReport("wake_up", 0.6, {}, [part])))
    line = next(line for line in text.splitlines() if line.startswith("tiny woken"))
    assert line.endswith(words)


def test_a_summary_names_ranks_seconds_and_phases() -> None:
    text = rendered(display.switch_summary(REPORT))
    assert "chat loaded: ranks 0, 1, 2.00 s, generation 7" in text
    assert "build 2.00" in text


def test_progress_without_a_terminal_is_a_line_for_each_phase() -> None:
    console = Console(width=80, color_system=None)
    beats = [("build", 0.0), ("build", 1.0), ("warm_up", 2.0), ("warm_up", 3.0)]
    with console.capture() as capture, display.PhaseDisplay(console) as phases:
        for phase, elapsed_s in beats:
            phases.on_progress(
                Progress(call=1, engine="chat", phase=phase, elapsed_s=elapsed_s)
            )
    assert capture.get().split("\n")[:2] == [
        "   0.0 s  chat: build",
        "   2.0 s  chat: warm_up",
    ]


# ----------------------------------------------------------------------- launch


def test_the_torchrun_command(tmp_path: Path) -> None:
    command = torchrun_command("p", 2, 3, None, tmp_path)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in command
    assert "--max-restarts=3" in command
    assert command[-4:] == ["-m", "vllm_resident.rank", "--pool", "p"]
    assert f"--log-dir={tmp_path}" in command
    joined = torchrun_command("p", 2, 3, "tcp://127.0.0.1:1", tmp_path)
    assert joined[-2:] == ["--controller", "tcp://127.0.0.1:1"]


def test_one_rank_per_visible_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: x\\nGPU 1: x\\nGPU 2: x\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert num_gpus() == default_num_ranks() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert num_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_gpus() == 0


def test_two_ranks_at_most_where_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert default_num_ranks() == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    assert default_num_ranks() == 1


@pytest.mark.parametrize(
    ("http", "why"),
    [
        ("0.0.0.0:8000", "beyond this machine"),
        ("8000", "HOST:PORT"),
        ("127.0.0.1:99999", "HOST:PORT"),
        ("no-such-host.invalid:80", "beyond this machine"),
    ],
)
def test_an_http_address_is_checked_before_anything_is_started(
    http: str,
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("vllm_resident.cli.up.launch", None)  # it would be called
    assert main(["up", "--http", http]) == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_an_http_port_that_is_taken_is_told_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_resident.cli.up.launch", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["up", "--http", f":{taken.getsockname()[1]}"]) == 2
    assert "cannot listen" in capsys.readouterr().err
