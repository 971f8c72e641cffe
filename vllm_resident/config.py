"""What people write in TOML files and plain tables, as `EngineSpec`s.

A layout, which is applied, says what a pool holds:

    [engines.chat]
    model = "checkpoints/smollm2"   # a folder beside this file, or a model's name
    ranks = [0, 1]                  # or how many; optional
    tensor_parallel_size = 2        # every other key: a vLLM engine argument, or an
                                    # option of its server, such as chat_template

pool.toml, which a controller starts with, says what it may hold and how much of it:

    [pool]
    host_memory = "8GiB"            # for the weights of engines that sleep

    [models.chat]                   # as in a layout, and
    start = "asleep"                # when the pool is up: "loaded", "asleep", "none"
    max_wait_s = 30                 # how long a call waits for it to come up

Options of vLLM's server may stand under [pool], too: for all models.

Checks what can be known without vLLM; whether an engine argument exists and fits is
the pool's to say. Every complaint is a `CommandRejected` that names file, line and key.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from vllm_resident.errors import CommandRejected
from vllm_resident.messages import EngineSpec

CONFIG_VARIABLE = "VLLM_RESIDENT_CONFIG"
STARTS = ("loaded", "asleep", "none")

_SPEC_KEYS = ("name", "model", "ranks", "engine_args", "asleep", "pinned")
# `start` of a declared model is what `asleep` is of an engine.
_LIMIT_KEYS = ("max_queue", "max_wait_s", "idle_ttl_s")
_MODEL_KEYS = (
    "name", "model", "ranks", "engine_args", "pinned", "start", *_LIMIT_KEYS
)  # fmt: skip
_POOL_KEYS = (
    "host_memory", "device_memory", "awake_per_rank", "min_residency_s", "drain_s",
    "communicators", "communicator_memory", *_LIMIT_KEYS,
)  # fmt: skip
_UNITS = {
    "": 1,
    "B": 1,
    **{
        f"{prefix}{suffix}": base**power
        for power, prefix in enumerate("KMGT", 1)
        for suffix, base in (("B", 1000), ("iB", 1024))
    },
}


# vLLM's options that are paths where such a file exists.
_PATHS = frozenset({"chat_template", "tool_parser_plugin"})
# A template in one line may be much longer than any path can be.
_MAX_PATH = 255

T = TypeVar("T")


class CallLimits(msgspec.Struct, frozen=True):
    """What calls for a model that is not awake may expect: how many may wait
    (`max_queue`) and how long; and after how long without a call the model falls asleep
    (`idle_ttl_s`; None: only to make room)."""

    max_queue: int = 1000
    max_wait_s: float = 120.0
    idle_ttl_s: float | None = None


class PoolConfig(msgspec.Struct, frozen=True):
    """What pool.toml says; without one, its defaults.

    `host_memory_bytes` is for the weights of engines that sleep, on each machine;
    `device_memory_bytes` for engines on each rank (None: what there is).
    `awake_per_rank` is how many engines may be awake on one rank. `models` are the
    declared ones by name; `start` are those among them to load when the pool is
    complete, in the file's order, with `asleep` as their `start` says. `limits` are the
    declared models' own, `default_limits` all others'. An engine that is called stays
    awake for `min_residency_s` at least, and has `drain_s` to finish its requests
    before it makes room for another that is. `frontend_args` are options of vLLM's
    server for all models that do not say otherwise. `num_communicators` are kept on
    each rank of worlds that are closed, with `communicator_memory_bytes` of its device
    (None: as fits the device).
    """

    host_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    awake_per_rank: int = 1
    models: dict[str, EngineSpec] = {}
    start: list[EngineSpec] = []
    limits: dict[str, CallLimits] = {}
    default_limits: CallLimits = CallLimits()
    min_residency_s: float = 1.0
    drain_s: float = 30.0
    frontend_args: dict[str, Any] = {}
    num_communicators: int | None = None
    communicator_memory_bytes: int | None = None


class _Wrong(Exception):
    """What is wrong with one key of a table; the caller adds where the table is."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message


def read_layout(path: str | Path) -> list[EngineSpec]:
    """The engines of a layout file, in its order.

    A relative `model` that exists beside the file becomes absolute, since the ranks do
    not share the caller's working directory; any other is passed on as it stands. An
    engine without `model` is one that the pool's pool.toml declares.
    Raises `CommandRejected`, also when the file cannot be read.
    """
    document = _Document(Path(path))
    document.check_keys(("engines",), "a layout holds [engines.NAME] tables")
    if not isinstance(document.content.get("engines"), dict):
        raise CommandRejected(f"{path}: no [engines.NAME] tables")
    return list(document.each("engines", "engine", _spec).values())


def read_pool(path: str | Path) -> PoolConfig:
    """What a pool.toml says.

    A relative `model` that exists beside the file becomes absolute, as in a layout.
    Raises `CommandRejected`, also when the file cannot be read.
    """
    document = _Document(Path(path))
    document.check_keys(
        ("pool", "models"), "pool.toml holds [pool] and [models.NAME] tables"
    )
    pool = document.table("pool", functools.partial(_pool, base=Path(path).parent))
    declare = functools.partial(_declared, default=pool["default_limits"])
    declared = document.each("models", "model", declare)
    _check_adapters(document, {name: each.spec for name, each in declared.items()})
    return PoolConfig(
        **pool,
        models={name: model.spec for name, model in declared.items()},
        limits={name: model.limits for name, model in declared.items() if model.limits},
        start=[
            msgspec.structs.replace(model.spec, asleep=model.start == "asleep")
            for model in declared.values()
            if model.start != "none"
        ],
    )


def _check_adapters(document: _Document, specs: dict[str, EngineSpec]) -> None:
    """A request's `model` may be an adapter's name, so each has one of its own."""
    owners = {name: name for name in specs}
    for name, spec in specs.items():
        for adapter in adapters(spec.engine_args):
            if adapter in owners:
                raise CommandRejected(
                    f"{document.place(('models', name), 'lora_modules')}: model "
                    f"{name!r}: the name {adapter!r} is in use by {owners[adapter]!r}: "
                    "give the adapter another"
                )
            owners[adapter] = name


def engine_spec(engine: EngineSpec | Mapping[str, Any]) -> EngineSpec:
    """One engine of a layout given in code.

    A mapping has `name` and optionally `model`, `ranks`, `asleep` and `pinned`; engine
    arguments stand beside them, under `engine_args`, or both. Raises `CommandRejected`.
    """
    if isinstance(engine, EngineSpec):
        return msgspec.structs.replace(
            engine,
            model=resolve_model(engine.model),
            engine_args=resolve_paths(engine.engine_args),
        )
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


def resolve_paths(args: dict[str, Any], base: Path | None = None) -> dict[str, Any]:
    """The arguments with the files among them that exist from `base` (default: here)
    absolute: neither ranks nor gateway share the caller's working directory."""
    found = dict(args)
    for name in _PATHS.intersection(args):
        if isinstance(path := args[name], str) and len(path) <= _MAX_PATH:
            found[name] = resolve_model(path, base)
    modules = args.get("lora_modules")
    if isinstance(modules, list):
        found["lora_modules"] = [
            {**each, "path": resolve_model(each["path"], base)}
            if isinstance(each, dict) and isinstance(each.get("path"), str)
            else each
            for each in modules
        ]
    return found


def adapters(frontend_args: Mapping[str, Any]) -> dict[str, str]:
    """Names and paths of the LoRA adapters that `lora_modules` lists."""
    modules = frontend_args.get("lora_modules")
    return {
        each["name"]: str(each.get("path", ""))
        for each in (modules if isinstance(modules, list) else ())
        if isinstance(each, dict) and isinstance(each.get("name"), str)
    }


class _Document:
    """A TOML file and its text, to say on which line a key of it stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = _read(path)
        try:
            self.content = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            raise CommandRejected(f"{path}: not TOML: {error}") from error

    def check_keys(self, known: tuple[str, ...], rule: str) -> None:
        for key in self.content:
            if key not in known:
                raise CommandRejected(
                    f"{self.place((), key)}: unknown key {key!r}; {rule}"
                    f"{_hint(key, known)}"
                )

    def table(self, key: str, read: Callable[[Any], T]) -> T:
        """What `read` makes of the table [key], which is empty where there is none."""
        try:
            return read(self.content.get(key, {}))
        except _Wrong as wrong:
            place = self.place((key,), wrong.key)
            raise CommandRejected(f"{place}: {wrong.message}") from wrong

    def each(
        self, key: str, kind: str, read: Callable[[str, Any, Path], T]
    ) -> dict[str, T]:
        """What `read` makes of each table [key.NAME], by name, in the file's order."""
        tables = self.content.get(key, {})
        if not isinstance(tables, dict):
            raise CommandRejected(
                f"{self.place((), key)}: {key!r} must be [{key}.NAME] tables, not "
                f"{tables!r}"
            )
        found: dict[str, T] = {}
        for name, table in tables.items():
            try:
                found[name] = read(name, table, self.path.parent)
            except _Wrong as wrong:
                place = self.place((key, name), wrong.key)
                raise CommandRejected(
                    f"{place}: {kind} {name!r}: {wrong.message}"
                ) from wrong
        return found

    def place(self, table: tuple[str, ...], key: str) -> str:
        """`path:line` of a key of the table so called, or of the file where that is
        (); the table's own line, or the path alone, where the key cannot be found."""
        inside = not table
        table_line = None
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
                names = tuple(part.strip(" \"'") for part in header[1].split("."))
                if not table and names[0] == key:
                    return f"{self.path}:{number}"
                inside = bool(table) and names[: len(table)] == table
                table_line = table_line or (number if inside else None)
            elif inside and key and _is_at(key, line):
                return f"{self.path}:{number}"
        return f"{self.path}:{table_line}" if table_line else str(self.path)


def _is_at(key: str, line: str) -> bool:
    return re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line) is not None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandRejected(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandRejected(f"{path}: not UTF-8 text") from error


def _pool(table: Any, base: Path) -> dict[str, Any]:
    """What [pool] says, by the names of `PoolConfig`."""
    if not isinstance(table, dict):
        raise _Wrong("", f"'pool' must be a table, [pool], not {table!r}")
    others = {key: value for key, value in table.items() if key not in _POOL_KEYS}
    known = frontend_arg_names()
    for key in others:
        if key.replace("-", "_") in known:
            continue
        hint = _hint(key, (*_POOL_KEYS, *known)) or (
            f"; there are {', '.join(_POOL_KEYS)}, and the options of vLLM's server"
        )
        raise _Wrong(key, f"unknown key {key!r} in [pool]{hint}")
    if "lora_modules" in others:
        raise _Wrong("lora_modules", "'lora_modules' are one model's, not the pool's")
    defaults = PoolConfig()
    return {
        "frontend_args": resolve_paths(_engine_args(others, _POOL_KEYS), base),
        "host_memory_bytes": _num_bytes(table, "host_memory"),
        "device_memory_bytes": _num_bytes(table, "device_memory"),
        "awake_per_rank": _whole(table, "awake_per_rank", 1),
        "default_limits": _limits(table, defaults.default_limits),
        "min_residency_s": _seconds(table, "min_residency_s", defaults.min_residency_s),
        "drain_s": _seconds(table, "drain_s", defaults.drain_s),
        "num_communicators": _count(table, "communicators"),
        "communicator_memory_bytes": _num_bytes(table, "communicator_memory"),
    }


def _limits(table: dict[str, Any], default: CallLimits) -> CallLimits:
    """A model's limits where it says any, else the pool's."""
    idle_ttl_s = default.idle_ttl_s
    if "idle_ttl_s" in table:
        idle_ttl_s = _seconds(table, "idle_ttl_s", 0.0, is_positive=True)
    return CallLimits(
        max_queue=_whole(table, "max_queue", default.max_queue),
        max_wait_s=_seconds(table, "max_wait_s", default.max_wait_s, is_positive=True),
        idle_ttl_s=idle_ttl_s,
    )


def _whole(table: dict[str, Any], key: str, default: int) -> int:
    value = table.get(key, default)
    if not _is_int(value) or value < 1:
        raise _Wrong(key, f"{key!r} must be a number from 1, not {value!r}")
    return int(value)


def _count(table: dict[str, Any], key: str) -> int | None:
    value = table.get(key)
    if value is None:
        return None
    if not _is_int(value) or value < 0:
        raise _Wrong(key, f"{key!r} must be a number from 0, not {value!r}")
    return int(value)


def _seconds(
    table: dict[str, Any], key: str, default: float, *, is_positive: bool = False
) -> float:
    value = table.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise _Wrong(key, f"{key!r} must be seconds, such as 30 or 0.5, not {value!r}")
    if is_positive and not value:
        raise _Wrong(key, f"{key!r} must be more than 0 seconds: leave it out for none")
    return float(value)


def _num_bytes(table: dict[str, Any], key: str) -> int | None:
    """A number of bytes, or text such as "8GiB" or "1.5 GB"."""
    value = table.get(key)
    if value is None:
        return None
    if _is_int(value) and value > 0:
        return int(value)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2] in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2]])
    raise _Wrong(
        key,
        f'{key!r} must be a number of bytes, or text such as "8GiB" or "500MB", not '
        f"{value!r}",
    )


class _Declared(NamedTuple):
    """A model of pool.toml: how it starts, and its limits if it has its own."""

    spec: EngineSpec
    start: str
    limits: CallLimits | None


def _declared(name: str, table: Any, base: Path, default: CallLimits) -> _Declared:
    spec = _spec(name, table, base, _MODEL_KEYS)
    _check_known(table)
    if not spec.model:
        raise _Wrong("", f"'model' is missing{_hint('model', tuple(table))}")
    start = table.get("start", "none")
    if start not in STARTS:
        hint = _hint(start, STARTS) if isinstance(start, str) else ""
        raise _Wrong(
            "start", f"'start' must be one of {', '.join(STARTS)}, not {start!r}{hint}"
        )
    has_limits = any(key in table for key in _LIMIT_KEYS)
    return _Declared(spec, start, _limits(table, default) if has_limits else None)


def _check_known(table: dict[str, Any]) -> None:
    """Refuse a key that is neither ours nor, as far as can be told here, vLLM's."""
    known = engine_arg_names() | frontend_arg_names()
    for key in {**table, **table.get("engine_args", {})}:
        name = key.replace("-", "_")
        if key in _MODEL_KEYS or name in known:
            continue
        hint = _hint(key, (*_MODEL_KEYS, *known))
        if known or hint:
            raise _Wrong(
                key, f"unknown key {key!r}, and vLLM has no such engine argument{hint}"
            )


@functools.cache
def engine_arg_names() -> frozenset[str]:
    """The fields of vLLM's `EngineArgs`, read from the source of the vLLM installed
    here, which is not imported (that takes seconds); empty where there is none."""
    return _fields_in_source("engine/arg_utils.py", "EngineArgs")


@functools.cache
def frontend_arg_names() -> frozenset[str]:
    """The same for the options of vLLM's server that are one model's."""
    found = _fields_in_source("entrypoints/launchers/cli_args.py", "BaseFrontendArgs")
    return found - engine_arg_names()


def _fields_in_source(file: str, name: str) -> frozenset[str]:
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            body = ast.parse((Path(folder) / file).read_text()).body
        except (OSError, ValueError, SyntaxError):
            continue
        return frozenset(
            field.target.id
            for node in body
            if isinstance(node, ast.ClassDef) and node.name == name
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        )
    return frozenset()


def _spec(
    name: str, table: Any, base: Path, keys: tuple[str, ...] = _SPEC_KEYS
) -> EngineSpec:
    """An engine by its table, whose own keys are `keys`; all else is for vLLM."""
    if not isinstance(table, dict):
        raise _Wrong(name, f"must be a table, not {table!r}")
    for key in set(_SPEC_KEYS + _MODEL_KEYS) - set(keys):
        if key in table:
            if key in _LIMIT_KEYS:
                raise _Wrong(key, f"{key!r} is for models that pool.toml declares")
            other = "start" if key == "asleep" else "asleep"
            raise _Wrong(key, f"unknown key {key!r} (did you mean {other!r}?)")
    return EngineSpec(
        name=name,
        model=_model(table, base),
        ranks=_ranks(table.get("ranks")),
        engine_args=resolve_paths(_engine_args(table, keys), base),
        asleep=_flag(table, "asleep"),
        pinned=_flag(table, "pinned"),
    )


def _model(table: dict[str, Any], base: Path) -> str:
    """The checkpoint; "" where the table leaves it to what the pool declares."""
    model = table.get("model")
    if model is None:
        if hint := _hint("model", tuple(table)):
            raise _Wrong("", f"'model' is missing{hint}")
        return ""
    if not isinstance(model, str) or not model:
        raise _Wrong("model", f"'model' must be a path or a name, not {model!r}")
    return resolve_model(model, base)


def _flag(table: dict[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _Wrong(key, f"{key!r} must be true or false, not {value!r}")
    return value


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


def _engine_args(table: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    nested = table.get("engine_args", {})
    if not isinstance(nested, dict):
        raise _Wrong("engine_args", f"'engine_args' must be a table, not {nested!r}")
    beside = {key: value for key, value in table.items() if key not in keys}
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
