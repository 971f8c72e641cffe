"""Layouts as people write them: TOML files and plain tables into `EngineSpec`s.

    [engines.chat]
    model = "checkpoints/smollm2"   # a folder beside this file, or a model's name
    ranks = [0, 1]                  # or how many; optional
    tensor_parallel_size = 2        # every other key: a vLLM engine argument

Checks what can be known without vLLM; whether an engine argument exists and fits is
the pool's to say. Every complaint is a `CommandRejected` that names file, line and key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_resident.errors import CommandRejected
from vllm_resident.messages import EngineSpec

_TOP_LEVEL_KEYS = ("engines",)
_SPEC_KEYS = ("name", "model", "ranks", "engine_args")


class _Wrong(Exception):
    """What is wrong with one key of a table; the caller adds where the table is."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


def read_layout(path: str | Path) -> list[EngineSpec]:
    """The engines of a layout file, in its order.

    A relative `model` that exists beside the file becomes absolute, since the ranks do
    not share the caller's working directory; any other is passed on as it stands.
    Raises `CommandRejected`, also when the file cannot be read.
    """
    path = Path(path)
    text = _read(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CommandRejected(f"{path}: not TOML: {error}") from error
    for key in document.keys() - set(_TOP_LEVEL_KEYS):
        raise CommandRejected(
            f"{_place(path, text, None, key)}: unknown key {key!r}; a layout holds "
            f"[engines.NAME] tables{_hint(key, _TOP_LEVEL_KEYS)}"
        )
    engines = document.get("engines")
    if not isinstance(engines, dict):
        raise CommandRejected(f"{path}: no [engines.NAME] tables")
    specs = []
    for name, table in engines.items():
        try:
            specs.append(_spec(name, table, path.parent))
        except _Wrong as wrong:
            place = _place(path, text, name, wrong.key)
            raise CommandRejected(
                f"{place}: engine {name!r}: {wrong.message}"
            ) from wrong
    return specs


def engine_spec(engine: EngineSpec | Mapping[str, Any]) -> EngineSpec:
    """One engine of a layout given in code.

    A mapping has `name`, `model` and optionally `ranks`; engine arguments stand beside
    them, under `engine_args`, or both. Raises `CommandRejected`.
    """
    if isinstance(engine, EngineSpec):
        return msgspec.structs.replace(engine, model=resolve_model(engine.model))
    if not isinstance(engine, Mapping):
        raise CommandRejected(
            f"an engine is an EngineSpec or a table, not {type(engine).__name__}"
        )
    name = engine.get("name")
    if not isinstance(name, str) or not name:
        raise CommandRejected(f"an engine of the layout has no name: {dict(engine)!r}")
    table = {key: value for key, value in engine.items() if key != "name"}
    try:
        return _spec(name, table, Path())
    except _Wrong as wrong:
        raise CommandRejected(f"engine {name!r}: {wrong.message}") from wrong


def resolve_model(model: str, base: Path | None = None) -> str:
    """`model`, absolute if it is a path that exists from `base` (default: here)."""
    path = (base or Path()) / Path(model).expanduser()
    return str(path.resolve()) if model and path.exists() else model


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandRejected(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandRejected(f"{path}: not UTF-8 text") from error


def _spec(name: str, table: Any, base: Path) -> EngineSpec:
    if not isinstance(table, dict):
        raise _Wrong(name, f"must be a table, [engines.{name}], not {table!r}")
    model = table.get("model")
    if model is None:
        hint = _hint("model", tuple(table))
        raise _Wrong("", f"'model' is missing{hint}")
    if not isinstance(model, str) or not model:
        raise _Wrong("model", f"'model' must be a path or a name, not {model!r}")
    return EngineSpec(
        name=name,
        model=resolve_model(model, base),
        ranks=_ranks(table.get("ranks")),
        engine_args=_engine_args(table),
    )


def _ranks(ranks: Any) -> list[int] | int | None:
    if ranks is None:
        return None
    if _is_int(ranks) and ranks >= 1:
        return int(ranks)
    if isinstance(ranks, list) and ranks and all(map(_is_int, ranks)):
        return ranks
    raise _Wrong("ranks", f"'ranks' must be a list of ranks or how many, not {ranks!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _engine_args(table: dict[str, Any]) -> dict[str, Any]:
    nested = table.get("engine_args", {})
    if not isinstance(nested, dict):
        raise _Wrong("engine_args", f"'engine_args' must be a table, not {nested!r}")
    beside = {key: value for key, value in table.items() if key not in _SPEC_KEYS}
    for key in beside.keys() & nested.keys():
        raise _Wrong(key, f"{key!r} stands both beside and in 'engine_args'")
    engine_args = {key.replace("-", "_"): v for key, v in {**beside, **nested}.items()}
    for key, value in engine_args.items():
        if not _is_json_like(value):
            raise _Wrong(key, f"{key!r} cannot be of type {type(value).__name__}")
    return engine_args


def _is_json_like(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json_like(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json_like, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _hint(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _place(path: Path, text: str, engine: str | None, key: str) -> str:
    """`path:line` of a key of `[engines.<engine>]`, or of the file where that is None;
    the table's own line, or the path alone, where the key cannot be found."""
    inside = engine is None
    table_line = None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            names = [part.strip(" \"'") for part in header[1].split(".")]
            if engine is None and names[0] == key:
                return f"{path}:{number}"
            inside = engine is not None and names[:2] == ["engines", engine]
            table_line = table_line or (number if inside else None)
        elif inside and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{path}:{number}"
    return f"{path}:{table_line}" if table_line else str(path)
