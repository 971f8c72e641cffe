"""Layout files: what they become, and how a mistake in one is told."""

from pathlib import Path
from typing import Any

import pytest

from vllm_resident import CommandRejected, EngineSpec
from vllm_resident.config import engine_spec, read_layout, resolve_model


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
    ],
)
def test_a_mistake_is_told_with_file_line_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = layout(tmp_path, text)
    with pytest.raises(CommandRejected, match=complaint):
        read_layout(path)


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
        ({"name": "a"}, "'model' is missing"),
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
