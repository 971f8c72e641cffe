"""What an engine spec may say, checked before any rank hears of it (pure)."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from vllm_resident.controller.planner import PARALLEL_SIZES
from vllm_resident.errors import CommandRejected
from vllm_resident.messages import EngineSpec

RESERVED_NAMES = frozenset({"all", "pool"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Engine arguments the pool sets itself, and why the caller cannot.
_OWN_ARGS = {
    "model": "it is the engine's `model`, not one of its engine_args",
    "distributed_executor_backend": "the pool's ranks are the executor",
    "data_parallel_rank": "the pool gives each rank its place in the engine",
    "nnodes": "the pool's launcher starts the nodes",
    "node_rank": "the pool's launcher starts the nodes",
    "master_addr": "the pool forms the engine's world over its own store",
    "master_port": "the pool forms the engine's world over its own store",
    "worker_cls": "the pool brings its own worker",
    **dict.fromkeys(
        ("host", "port", "api_key", "root_path", "uds", "middleware"),
        "it is the gateway's, which is one for all models",
    ),
}


def check_timeout(timeout_s: float) -> None:
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise CommandRejected(f"timeout_s is {timeout_s}: give a positive number")


def check_drain(drain_s: float) -> None:
    if not (math.isfinite(drain_s) and drain_s >= 0):
        raise CommandRejected(f"drain_s is {drain_s}: give seconds from 0")


def check_level(level: int) -> None:
    if level not in (1, 2):
        raise CommandRejected(
            f"sleep level {level}: 1 keeps the weights in host memory, 2 drops them"
        )


def with_frontend_args(
    spec: EngineSpec, known: Collection[str], defaults: Mapping[str, Any]
) -> EngineSpec:
    """The spec with the options of vLLM's server, whose names are `known`, told from
    its engine arguments; `defaults` are those of all models."""
    args = spec.engine_args
    own = {name: value for name, value in args.items() if name in known}
    return msgspec.structs.replace(
        spec,
        engine_args={name: value for name, value in args.items() if name not in own},
        frontend_args={**defaults, **spec.frontend_args, **own},
    )


def check_spec(
    spec: EngineSpec,
    known_args: Collection[str],
    known_frontend_args: Collection[str] = (),
) -> None:
    """Everything about one spec that does not depend on the other engines.

    `known_args` are the engine arguments the pool's vLLM takes, and
    `known_frontend_args` its server's options.
    """
    if not _NAME.fullmatch(spec.name):
        raise CommandRejected(
            f"engine name {spec.name!r}: use 1 to 64 letters, digits, '.', '_' or "
            "'-', starting with a letter or digit"
        )
    if spec.name in RESERVED_NAMES:
        raise CommandRejected(f"engine name {spec.name!r} is reserved: take another")
    if not spec.model.strip():
        raise CommandRejected(
            f"engine {spec.name!r} names no model: give a folder or a model id"
        )
    for name in (*spec.engine_args, *spec.frontend_args):
        _check_arg_name(spec.name, name, (*known_args, *known_frontend_args))
    for name in PARALLEL_SIZES:
        _check_parallel_size(spec, name)


def _check_arg_name(engine: str, name: str, known_args: Collection[str]) -> None:
    if reason := _OWN_ARGS.get(name):
        raise CommandRejected(f"engine {engine!r}: {name} cannot be set: {reason}")
    if name in known_args:
        return
    close = difflib.get_close_matches(name, known_args, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see vLLM's EngineArgs"
    raise CommandRejected(
        f"engine {engine!r}: the ranks' vLLM has no engine argument {name!r}: {hint}"
    )


def _check_parallel_size(spec: EngineSpec, name: str) -> None:
    size: Any = spec.engine_args.get(name, 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise CommandRejected(
            f"engine {spec.name!r}: {name} is {size!r}: give a whole number from 1"
        )
