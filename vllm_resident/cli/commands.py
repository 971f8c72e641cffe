"""What each command does, through the client; `run` picks one.

Every command returns its exit code or raises an error of the tree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vllm_resident import config, doctor, keys
from vllm_resident.cli import display, parser, patch, trace, up, watch
from vllm_resident.cli.output import Output
from vllm_resident.client import Client
from vllm_resident.client.connection import resolve_endpoint, somebody_listens
from vllm_resident.errors import CommandRejected, PoolUnreachable
from vllm_resident.keys import KEY_FILE_VARIABLE
from vllm_resident.launch import default_num_ranks
from vllm_resident.messages import Completion, EngineSpec, SwitchReport

# A controller with a socket may be busy; one without has no longer than it takes to
# come up between our look and the call.
_CONNECT_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_NOBODY_S = 1.0


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Do what was asked; returns the exit code."""
    if arguments.key_file:
        # Also for what is started from here.
        os.environ[KEY_FILE_VARIABLE] = str(Path(arguments.key_file).resolve())
    if arguments.command == "up":
        return up.up(arguments, output)
    if arguments.command == "key":
        return _key(arguments, output)
    if arguments.command == "doctor":
        return _doctor(arguments, output)
    if arguments.command == "patch":
        return patch.run(arguments, output)
    if arguments.command == "trace":
        return trace.run(arguments, output)
    with connect(arguments) as client:
        return _COMMANDS[arguments.command](client, arguments, output)


def _key(arguments: argparse.Namespace, output: Output) -> int:
    path = Path(arguments.file)
    keys.create(path)
    output.result({"key_file": str(path)}, f"a new key is in {path}")
    return parser.OK


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the pool that was named."""
    endpoint = resolve_endpoint(arguments.controller, arguments.pool)
    timeout_s = (
        _CONNECT_TIMEOUT_S if somebody_listens(endpoint) else _CONNECT_TIMEOUT_NOBODY_S
    )
    return Client(endpoint, connect_timeout_s=timeout_s)


def _status(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    show = display.ledger_tables if arguments.ledger else display.pool_tables
    if arguments.watch:
        watch.watch(client, output, show)
    else:
        status = client.status()
        output.result(status, show(status))
    return parser.OK


def _load(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    with output.phases() as phases:
        report = client.load(
            arguments.name,
            arguments.model,
            ranks=arguments.ranks or arguments.num_ranks,
            asleep=arguments.asleep,
            pinned=arguments.pinned,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
            **_engine_args(arguments.vllm),
        )
    return _switched(report, output)


def _engine_args(options: dict[str, Any]) -> dict[str, Any]:
    # Not options of the command, but parameters of the method: they would collide.
    for name in ("name", "model", "on_progress", "timeout_s"):
        if name in options:
            raise CommandRejected(
                f"--{name.replace('_', '-')} is not an engine argument"
            )
    return config.resolve_paths(options)


def _unload(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    with output.phases() as phases:
        report = client.unload(
            arguments.name,
            drain_s=arguments.drain,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
        )
    return _switched(report, output)


def _sleep(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    with output.phases() as phases:
        report = client.sleep(
            arguments.name,
            arguments.level,
            drain_s=arguments.drain,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
        )
    return _switched(report, output)


def _wake_up(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    with output.phases() as phases:
        report = client.wake_up(
            arguments.name,
            drain_s=arguments.drain,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
        )
    return _switched(report, output)


def _switch(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    new = EngineSpec(
        arguments.new,
        config.resolve_model(arguments.model),
        arguments.ranks or arguments.num_ranks,
        _engine_args(arguments.vllm),
    )
    with output.phases() as phases:
        report = client.switch(
            arguments.old,
            new,
            drain_s=arguments.drain,
            strategy=arguments.strategy,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
        )
    return _switched(report, output)


def _prefetch(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    with output.phases() as phases:
        done = client.prefetch(
            arguments.model,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
        )
    document = {
        "model": arguments.model,
        "num_bytes": done.num_bytes,
        "seconds": done.seconds,
        "hosts": done.hosts,
    }
    output.result(document, display.prefetch_summary(arguments.model, done))
    return parser.OK


def _apply(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    engines = config.read_layout(arguments.layout)
    with output.phases() as phases:
        report = client.apply(
            engines,
            drain_s=arguments.drain,
            timeout_s=arguments.timeout,
            on_progress=phases.on_progress,
        )
    return _switched(report, output)


def _switched(report: SwitchReport, output: Output) -> int:
    output.result(report, display.switch_summary(report))
    return parser.OK


def _generate(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    prompts = _prompts(arguments)
    if arguments.stream:
        return _stream(client, arguments, prompts, output)
    completions = client.generate(
        arguments.engine, prompts, arguments.vllm, timeout_s=arguments.timeout
    )
    if output.json:
        output.result({"engine": arguments.engine, "completions": completions})
    else:
        _print_completions(completions, output)
    return parser.OK


def _print_completions(completions: list[Completion], output: Output) -> None:
    for completion in completions:
        if len(completions) > 1:
            output.message(
                f"[dim]prompt {completion.prompt_index}, sequence {completion.index}, "
                f"{len(completion.token_ids)} tokens, {completion.finish_reason}[/]"
            )
        output.line(completion.text)


def _stream(
    client: Client,
    arguments: argparse.Namespace,
    prompts: list[str | list[int]],
    output: Output,
) -> int:
    if len(prompts) != 1:
        raise CommandRejected(f"--stream takes one prompt, not {len(prompts)}")
    several = arguments.vllm.get("n", 1) != 1
    if several and not output.json:
        raise CommandRejected(
            "--stream with --n above 1 needs --json to tell them apart"
        )
    pieces = client.stream(
        arguments.engine, prompts[0], arguments.vllm, timeout_s=arguments.timeout
    )
    try:
        for piece in pieces:
            if output.json:
                output.result(piece)
            else:
                output.line(piece.text, end="")
    finally:
        pieces.close()
        if not output.json:
            output.line("")
    return parser.OK


def _prompts(arguments: argparse.Namespace) -> list[str | list[int]]:
    """From the command line, else the file, else standard input."""
    if arguments.prompts and arguments.file:
        raise CommandRejected("prompts come from the command line or --file, not both")
    if arguments.prompts:
        return list(arguments.prompts)
    source = arguments.file or "-"
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text("utf-8")
    except OSError as error:
        raise CommandRejected(f"{source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandRejected(f"{source}: not UTF-8 text") from error
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise CommandRejected("no prompts: name some, or give --file or standard input")
    if source.endswith(".jsonl"):
        return [_json_prompt(source, number, line) for number, line in lines]
    return [line for _, line in lines]


def _json_prompt(source: str, number: int, line: str) -> str | list[int]:
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            value = value["prompt"]
        return msgspec.convert(value, str | list[int])
    except (ValueError, KeyError) as error:
        raise CommandRejected(
            f"{source}:{number}: not a JSON string, a list of token ids, or "
            '{"prompt": one of these}'
        ) from error


def _shutdown(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    with output.phases() as phases:
        phases.phase_started("pool", "shutting down", 0.0)
        client.shutdown(arguments.timeout, on_progress=phases.on_progress)
        _wait_until_gone(client.endpoint, arguments.timeout)
    output.result(
        {"stopped": True, "endpoint": client.endpoint}, "the pool has stopped"
    )
    return parser.OK


def _wait_until_gone(endpoint: str, timeout_s: float) -> None:
    """So that an `up` may follow at once. A controller on TCP is not ours to end."""
    deadline = time.monotonic() + timeout_s
    while endpoint.startswith("ipc://") and somebody_listens(endpoint):
        if time.monotonic() > deadline:
            raise PoolUnreachable(
                f"the pool has stopped but its controller still listens at {endpoint} "
                f"after {timeout_s:g} s"
            )
        time.sleep(0.1)


def _doctor(arguments: argparse.Namespace, output: Output) -> int:
    num_ranks = arguments.nproc_per_node or default_num_ranks()
    removed = doctor.fix() if arguments.fix else []
    checks = doctor.examine(arguments.pool, num_ranks)
    failed = any(check.verdict == "fail" for check in checks)
    output.result(
        {"ok": not failed, "checks": checks, "removed": [str(p) for p in removed]},
        display.checks_table(checks),
    )
    if arguments.fix:
        output.message(f"removed {len(removed)} stale segments")
    return parser.FAILED if failed else parser.OK


_Command = Callable[[Client, argparse.Namespace, Output], int]
_COMMANDS: dict[str, _Command] = {
    "status": _status,
    "load": _load,
    "unload": _unload,
    "sleep": _sleep,
    "wake-up": _wake_up,
    "switch": _switch,
    "prefetch": _prefetch,
    "generate": _generate,
    "apply": _apply,
    "shutdown": _shutdown,
}
