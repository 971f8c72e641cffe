"""The options of vLLM's server that are one model's (`BaseFrontendArgs`), by its names.

Checked on the ranks before anything is built, so that a wrong one is the load's error
and not that of every request; used by the model's frontend in the gateway. Imports
vLLM's parser of them only where there are any.
"""

from __future__ import annotations

import difflib
from argparse import Namespace
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.tool_parsers import ToolParserManager

from vllm_resident.errors import CommandRejected
from vllm_resident.rank import refusal


def server_arguments(
    model: str,
    config: VllmConfig,
    engine_args: dict[str, Any],
    frontend_args: dict[str, Any],
) -> Namespace:
    """What `vllm serve` would have of its command line (0.32.0, entrypoints/launchers).

    Raises `CommandRejected` in vLLM's words, or with the names there are.
    """
    try:
        arguments = _parsed(model, config, engine_args, frontend_args)
    except CommandRejected:
        raise
    # Of pydantic, of vLLM's checks, of a template or plugin that cannot be read.
    except Exception as error:
        raise CommandRejected(
            f"vLLM's server refuses these options: {refusal.in_words(error)}"
        ) from error
    _check_adapters(arguments, config)
    return arguments


def check(
    model: str,
    config: VllmConfig,
    engine_args: dict[str, Any],
    frontend_args: dict[str, Any],
) -> None:
    """Raise what `server_arguments` would. Free where there are none to check."""
    if frontend_args:
        server_arguments(model, config, engine_args, frontend_args)


def _parsed(
    model: str,
    config: VllmConfig,
    engine_args: dict[str, Any],
    frontend_args: dict[str, Any],
) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import (
        BaseFrontendArgs,
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = BaseFrontendArgs(**frontend_args)
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for name in frontend_args:
        setattr(arguments, name, getattr(given, name))
    for name, value in engine_args.items():
        setattr(arguments, name, value)
    arguments.model = model
    arguments.structured_outputs_config = config.structured_outputs_config
    if len(arguments.tool_parser_plugin) > 3:  # as vLLM asks
        ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
    validate_parsed_serve_args(arguments)
    _check_parser(arguments.tool_call_parser)
    return arguments


def _check_parser(name: str | None) -> None:
    """vLLM looks when it is first needed: at a request."""
    if not name or name in (there := sorted(ToolParserManager.list_registered())):
        return
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there)}"
    raise CommandRejected(f"tool_call_parser: vLLM has no {name!r}: {hint}")


def _check_adapters(arguments: Namespace, config: VllmConfig) -> None:
    modules = arguments.lora_modules or []
    if modules and config.lora_config is None:
        raise CommandRejected("lora_modules: the engine needs enable_lora, too")
    for module in modules:
        is_path = module.path.startswith((".", "/", "~"))
        if is_path and not Path(module.path).expanduser().is_dir():
            raise CommandRejected(
                f"lora_modules: {module.name!r}: folder {module.path} is not there"
            )
