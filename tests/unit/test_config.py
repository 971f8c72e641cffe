"""Layout files: what they become, and how a mistake in one is told."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vllm_resident import CommandRejected, EngineSpec, config
from vllm_resident.config import (
    CallLimits,
    PoolConfig,
    adapters,
    engine_arg_names,
    engine_spec,
    frontend_arg_names,
    read_layout,
    read_pool,
    resolve_model,
    resolve_paths,
)
from vllm_resident.controller.__main__ import demand_of
from vllm_resident.controller.policy import Limits
from vllm_resident.controller.usage import Demand

ROOT = Path(__file__).parents[2]


def layout(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "layout.toml"
    path.write_text(text)
    return path


def test_a_layout_becomes_specs_in_order(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    path = layout(
        tmp_path,
        """
        [engines.chat]
        model = "tiny"
        ranks = [0, 1]
        tensor_parallel_size = 2
        hf_overrides = { num_layers = 3 }

        [engines."side-line"]
        model = "org/model"
        ranks = 1

        [engines.third]
        model = "./not-here"
        """,
    )
    assert read_layout(path) == [
        EngineSpec(
            "chat",
            str(tmp_path / "tiny"),
            [0, 1],
            {"tensor_parallel_size": 2, "hf_overrides": {"num_layers": 3}},
        ),
        EngineSpec("side-line", "org/model", 1),
        EngineSpec("third", "./not-here"),
    ]


def test_dashes_are_as_good_as_underscores(tmp_path: Path) -> None:
    path = layout(tmp_path, '[engines.a]\nmodel = "m"\nenforce-eager = true\n')
    assert read_layout(path)[0].engine_args == {"enforce_eager": True}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[engines.a\n", r"layout\.toml: not TOML: .*line 1"),
        ("", r"no \[engines\.NAME\] tables"),
        ("engines = 3", r"no \[engines\.NAME\] tables"),
        (
            '\n[engine.a]\nmodel = "m"\n',
            r"layout\.toml:2: unknown key 'engine'.*did you mean 'engines'",
        ),
        ("pool = 3\n", r"layout\.toml:1: unknown key 'pool'"),
        (
            '[engines.a]\nmodle = "m"\n',
            r"layout\.toml:1: engine 'a': 'model' is missing \(did you mean 'modle'",
        ),
        ("[engines.a]\nmodel = 3\n", r"layout\.toml:2: engine 'a': 'model' must be"),
        ('[engines.a]\nmodel = ""\n', r"layout\.toml:2: .*'model' must be"),
        (
            '[engines.b]\nmodel = "m"\nranks = 1\n[engines.a]\nmodel="m"\nranks = []\n',
            r"layout\.toml:6: engine 'a': 'ranks' must be .*, not \[\]",
        ),
        ('[engines.a]\nmodel = "m"\nranks = true\n', r"layout\.toml:3: .*'ranks'"),
        ('[engines.a]\nmodel = "m"\nranks = 0\n', r"layout\.toml:3: .*'ranks'"),
        ('[engines.a]\nmodel = "m"\nranks = ["0"]\n', r"layout\.toml:3: .*'ranks'"),
        (
            '[engines.a]\nmodel = "m"\nseed = 2020-01-01\n',
            r"layout\.toml:3: engine 'a': 'seed' cannot be of type date",
        ),
        ("[engines]\na = 3\n", r"engine 'a': must be a table"),
        ('[engines.a]\nmodel = "m"\nasleep = 1\n', r"layout\.toml:3: .*'asleep' must"),
        ('[engines.a]\nstart = "none"\n', r"layout\.toml:2: .*did you mean 'asleep'"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = layout(tmp_path, text)
    with pytest.raises(CommandRejected, match=complaint):
        read_layout(path)


def test_an_engine_of_a_layout_may_be_one_that_the_pool_declares(
    tmp_path: Path,
) -> None:
    path = layout(tmp_path, "[engines.a]\n[engines.b]\nasleep = true\npinned = true\n")
    assert read_layout(path) == [
        EngineSpec("a"),
        EngineSpec("b", asleep=True, pinned=True),
    ]


# -------------------------------------------------------------------- pool.toml


def pool_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pool.toml"
    path.write_text(text)
    return path


def test_a_pool_file_becomes_budgets_and_models(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    path = pool_file(
        tmp_path,
        """
        [pool]
        host_memory = "1.5 GiB"
        device_memory = 1000
        awake_per_rank = 2
        communicators = 0
        communicator_memory = "2GiB"

        [models.a]
        model = "tiny"
        ranks = [0, 1]
        pinned = true
        start = "asleep"
        tensor_parallel_size = 2

        [models.b]
        model = "org/model"
        start = "loaded"
        enforce-eager = true

        [models.c]
        model = "org/other"
        ranks = 1
        """,
    )
    a = EngineSpec(
        "a", str(tmp_path / "tiny"), [0, 1], {"tensor_parallel_size": 2}, pinned=True
    )
    b = EngineSpec("b", "org/model", None, {"enforce_eager": True})
    c = EngineSpec("c", "org/other", 1)
    assert read_pool(path) == PoolConfig(
        host_memory_bytes=3 * 2**29,
        device_memory_bytes=1000,
        awake_per_rank=2,
        num_communicators=0,
        communicator_memory_bytes=2**31,
        models={"a": a, "b": b, "c": c},
        start=[
            EngineSpec(
                "a", a.model, [0, 1], a.engine_args, asleep=True, pinned=True
            ),
            b,
        ],
    )  # fmt: skip


def test_limits_are_a_models_own_or_the_pools(tmp_path: Path) -> None:
    path = pool_file(
        tmp_path,
        """
        [pool]
        max_queue = 7
        idle_ttl_s = 600
        min_residency_s = 0.5
        drain_s = 0
        [models.a]
        model = "m"
        max_wait_s = 2.5
        [models.b]
        model = "m"
        """,
    )
    pool = read_pool(path)
    assert (pool.min_residency_s, pool.drain_s) == (0.5, 0.0)
    assert pool.default_limits == CallLimits(7, 120.0, 600.0)
    assert pool.limits == {"a": CallLimits(7, 2.5, 600.0)}
    assert pool.models["a"].engine_args == {}
    demand = demand_of(pool)
    assert demand.limits_of("a") == Limits(7, 2.5, 600.0)
    assert demand.limits_of("b") == Limits(7, 120.0, 600.0)
    assert (demand.min_residency_s, demand.drain_s) == (0.5, 0.0)


def test_the_defaults_of_both_sides_are_the_same() -> None:
    assert demand_of(PoolConfig()) == Demand()


def test_an_empty_pool_file_is_the_defaults(tmp_path: Path) -> None:
    assert read_pool(pool_file(tmp_path, "")) == PoolConfig()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("7", 7), ('"7"', 7), ('"2KiB"', 2048), ('"2 kB"', None), ('"2KB"', 2000),
     ('"1TiB"', 2**40), ("0", None), ("-1", None), ("true", None), ("1.5", None),
     ('"GiB"', None), ('"-1GiB"', None), ('"0B"', None)],
)  # fmt: skip
def test_memory_is_bytes_or_text(
    tmp_path: Path, text: str, num_bytes: int | None
) -> None:
    path = pool_file(tmp_path, f"[pool]\nhost_memory = {text}\n")
    if num_bytes is not None:
        assert read_pool(path).host_memory_bytes == num_bytes
        return
    with pytest.raises(CommandRejected, match=r"pool\.toml:2: 'host_memory' must be"):
        read_pool(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n[pol]\n", r"pool\.toml:2: unknown key 'pol'.*did you mean 'pool'"),
        ("[engines.a]\n", r"pool\.toml:1: unknown key 'engines'.*\[models\.NAME\]"),
        ("pool = 3\n", r"'pool' must be a table"),
        ("models = 3\n", r"pool\.toml:1: 'models' must be \[models\.NAME\] tables"),
        ("[models]\na = 3\n", r"model 'a': must be a table"),
        (
            "[pool]\n\nhost_memroy = 3\n",
            r"pool\.toml:3: unknown key 'host_memroy'.*did you mean 'host_memory'",
        ),
        ("[pool]\ncolour = 3\n", r"pool\.toml:2: unknown key 'colour'.*there are host"),
        ("[pool]\nawake_per_rank = 0\n", r"pool\.toml:2: 'awake_per_rank' must be"),
        ("[pool]\ncommunicators = -1\n", r"pool\.toml:2: 'communicators' must be"),
        ("[pool]\ncommunicator_memory = 0\n", r"pool\.toml:2: 'communicator_memory'"),
        ("[models.a]\nranks = 1\n", r"pool\.toml:1: model 'a': 'model' is missing"),
        (
            '[models.a]\nmodel = "m"\nstart = "lodaed"\n',
            r"pool\.toml:3: model 'a': 'start' must be .*\(did you mean 'loaded'",
        ),
        ('[models.a]\nmodel = "m"\nstart = []\n', r"pool\.toml:3: .*'start' must"),
        ('[models.a]\nmodel = "m"\npinned = 1\n', r"pool\.toml:3: .*'pinned' must be"),
        (
            '[models.a]\nmodel = "m"\nasleep = true\n',
            r"pool\.toml:3: .*unknown key 'asleep' \(did you mean 'start'",
        ),
        (
            '[models.a]\nmodel = "m"\n\npined = true\n',
            r"pool\.toml:4: model 'a': unknown key 'pined'.*did you mean 'pinned'",
        ),
        (
            '[models.a]\nmodel = "m"\nmax_queu = 3\n',
            r"pool\.toml:3: .*unknown key 'max_queu'.*did you mean 'max_queue'",
        ),
        (
            '[models.a]\nmodel = "m"\nmax_queue = 0\n',
            r"pool\.toml:3: model 'a': 'max_queue' must be a number from 1, not 0",
        ),
        ("[pool]\nmax_wait_s = 0\n", r"pool\.toml:2: 'max_wait_s' must be more"),
        ('[pool]\nidle_ttl_s = "5m"\n', r"pool\.toml:2: .*must be seconds.*'5m'"),
        ("[pool]\ndrain_s = -1\n", r"pool\.toml:2: 'drain_s' must be seconds"),
        ("[pool]\ndrain_s = nan\n", r"pool\.toml:2: 'drain_s' must be seconds"),
        ('[models.a]\nmodel = "m"\nranks = []\n', r"pool\.toml:3: .*'ranks' must be"),
        (
            '[pool]\ntool_call_parsr = "x"\n',
            r"pool\.toml:2: unknown key 'tool_call_parsr'.*mean 'tool_call_parser'",
        ),
        (
            '[models.a]\nmodel = "m"\nchat_templat = "x"\n',
            r"pool\.toml:3: .*unknown key 'chat_templat'.*mean 'chat_template'",
        ),
        (
            '[models.a]\nmodel="m"\nlora_modules=[{name="b"}]\n[models.b]\nmodel="m"\n',
            r"pool\.toml:3: model 'a': the name 'b' is in use by 'b'",
        ),
        ("[pool]\nlora_modules = []\n", r"pool\.toml:2: .*one model's, not the pool"),
        ("[pool]\nchat_template = 1979-05-27\n", r"pool\.toml:2: .*of type date"),
    ],
)
def test_a_mistake_in_a_pool_file_is_told_with_file_line_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(CommandRejected, match=complaint):
        read_pool(pool_file(tmp_path, text))


@pytest.mark.parametrize("where", ["enforce_eagre", "engine_args.enforce_eagre"])
def test_an_engine_argument_that_vllm_has_not_is_named_where_there_is_a_vllm(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pool_file(tmp_path, f'[models.a]\nmodel = "m"\n{where} = true\n')
    monkeypatch.setattr(
        config, "engine_arg_names", lambda: frozenset(["enforce_eager"])
    )
    with pytest.raises(
        CommandRejected, match=r"unknown key 'enforce_eagre'.*mean 'enforce_eager'"
    ):
        read_pool(path)
    monkeypatch.setattr(config, "engine_arg_names", frozenset)
    monkeypatch.setattr(config, "frontend_arg_names", frozenset)
    assert read_pool(path).models["a"].engine_args == {"enforce_eagre": True}


def test_vllms_engine_arguments_are_read_from_its_source() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("no vLLM is installed")
    assert {"tensor_parallel_size", "enforce_eager", "dtype"} <= engine_arg_names()


def test_options_of_vllms_server_are_read_from_its_source() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("no vLLM is installed")
    names = frontend_arg_names()
    assert {"chat_template", "tool_call_parser", "lora_modules"} <= names
    assert not names & engine_arg_names()
    assert "port" not in names  # the gateway's


def test_options_of_vllms_server_are_a_models_or_the_pools(tmp_path: Path) -> None:
    (tmp_path / "tools.jinja").write_text("{{ messages }}")
    (tmp_path / "adapter").mkdir()
    path = pool_file(
        tmp_path,
        """
        [pool]
        chat-template = "tools.jinja"
        response_role = "helper"

        [models.a]
        model = "m"
        tool_call_parser = "hermes"
        chat_template = "{{ messages }}"
        lora_modules = [{name = "b", path = "adapter"}, {name = "c", path = "org/c"}]
        """,
    )
    pool = read_pool(path)
    template = str(tmp_path / "tools.jinja")
    assert pool.frontend_args == {"chat_template": template, "response_role": "helper"}
    given = pool.models["a"].engine_args
    assert given["tool_call_parser"] == "hermes"
    assert given["chat_template"] == "{{ messages }}"
    assert adapters(given) == {"b": str(tmp_path / "adapter"), "c": "org/c"}


@pytest.mark.parametrize("modules", [None, 7, "a=b", [7], [{}], [{"name": 7}]])
def test_adapters_that_are_none(modules: Any) -> None:
    """vLLM says what is wrong with them."""
    assert adapters({"lora_modules": modules}) == {}
    assert resolve_paths({"lora_modules": modules}) == {"lora_modules": modules}


def test_a_template_in_one_line_may_be_longer_than_a_path() -> None:
    template = "x" * 10_000
    assert resolve_paths({"chat_template": template}) == {"chat_template": template}


def test_the_example_pool_file_is_one() -> None:
    pool = read_pool(ROOT / "examples" / "pool.toml")
    assert set(pool.models) == {"chat", "tiny", "wide"}
    assert [spec.name for spec in pool.start] == ["chat", "tiny"]
    assert pool.start[1].asleep


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CommandRejected, match="No such file"):
        read_layout(tmp_path / "none.toml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandRejected, match="not UTF-8"):
        read_layout(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "table",
    [
        {"name": "a", "model": "m", "ranks": 1, "seed": 3},
        {"name": "a", "model": "m", "ranks": 1, "engine_args": {"seed": 3}},
        EngineSpec("a", "m", 1, {"seed": 3}),
    ],
)
def test_a_table_in_code_is_a_spec(table: Any) -> None:
    assert engine_spec(table) == EngineSpec("a", "m", 1, {"seed": 3})


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"model": "m"}, "no name"),
        ({"name": "a", "modell": "m"}, "'model' is missing.*'modell'"),
        ({"name": "a", "model": "m", "ranks": "0"}, "'ranks'"),
        (
            {"name": "a", "model": "m", "seed": 1, "engine_args": {"seed": 2}},
            "both beside and in",
        ),
        ({"name": "a", "model": "m", "engine_args": 3}, "'engine_args'"),
        (["a", "m"], "not list"),
    ],
)
def test_a_wrong_table_in_code_is_rejected(table: Any, complaint: str) -> None:
    with pytest.raises(CommandRejected, match=complaint):
        engine_spec(table)


def test_only_a_path_that_exists_becomes_absolute(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    assert resolve_model("tiny", tmp_path) == str(tmp_path / "tiny")
    assert resolve_model("org/model", tmp_path) == "org/model"
    assert resolve_model(str(tmp_path / "tiny")) == str(tmp_path / "tiny")
