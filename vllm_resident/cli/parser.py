"""The command line's grammar and its help: every command, option and exit code."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from vllm_resident.cli.arguments import Parser, split_options

OK, FAILED, REJECTED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

_ABOUT = """\
Many vLLM models on one pool of ranks whose processes never end: load, unload and
regroup engines while the others go on serving."""

_EXAMPLES = """\
examples:
  vllm-resident up --detach                        start a pool and come back
  vllm-resident load chat ./smollm2 --num-ranks 1 --dtype bfloat16
  vllm-resident generate chat "The capital of France is" --max-tokens 8
  vllm-resident status --watch                     see it live
  vllm-resident apply layout.toml                  exactly the engines of a file
  vllm-resident patch status                       what is changed in vLLM, and how
  vllm-resident shutdown

exit codes:
  0    done
  1    the pool or one of its ranks failed
  2    wrong usage, or the command was rejected: nothing was changed
  3    no controller could be reached
  130  Ctrl-C

With --json one JSON document goes to standard output, {"error": ...} if it failed
(JSON lines for --watch and --stream); messages go to standard error.
"""

_VLLM_OPTIONS = """\
Any other option is one of vLLM's, by its own name, after the positional arguments:
`--tensor-parallel-size 2`, `--dtype=float32`; a flag without a value is true,
`--no-NAME` is false; numbers, true, false, null, [lists] and {tables} are read as JSON,
a text that looks like one is written '"123"'."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """What was asked: `command`, its arguments, and `vllm`, the options for vLLM.

    Wrong usage ends the process with status 2 and a message; --help with status 0.
    """
    words = sys.argv[1:] if argv is None else argv
    main, commands = _build()
    options: dict[str, Any] = {}
    head = _num_words_to_command(main, words)
    if words[head - 1 : head] in (["load"], ["generate"]):
        own, options = split_options(commands[words[head - 1]], words[head:])
        words = [*words[:head], *own]
    arguments = main.parse_args(words)
    arguments.vllm = options
    if arguments.command == "load" and arguments.ranks and arguments.num_ranks:
        commands["load"].error("--ranks says already how many: leave --num-ranks out")
    return arguments


def _num_words_to_command(main: Parser, words: list[str]) -> int:
    """How many words there are up to and with the command's own, past the options of
    `main` and their values."""
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("-"):
            return position + 1
        position += 2 if main.own.get(word) else 1
    return 0


def _build() -> tuple[Parser, dict[str, Parser]]:
    main = Parser(
        prog="vllm-resident",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.set_defaults(pool="default", controller=None, json=False)
    _add_common(main)
    commands = main.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    built: dict[str, Parser] = {}

    def add(name: str, summary: str, about: str = "") -> Parser:
        parser: Parser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {about}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(parser)
        built[name] = parser
        return parser

    _add_up(add("up", "start a pool on this machine"))
    _add_status(add("status", "show ranks and engines"))
    _add_load(add("load", "build an engine from a checkpoint", "\n\n" + _VLLM_OPTIONS))
    _add_unload(add("unload", "destroy an engine and give everything back"))
    _add_generate(
        add("generate", "complete prompts with an engine", "\n\n" + _VLLM_OPTIONS)
    )
    _add_apply(add("apply", "make the pool hold exactly the engines of a layout file"))
    _add_shutdown(add("shutdown", "unload every engine and end the pool"))
    _add_doctor(add("doctor", "say what is wrong with this machine's set-up"))
    _add_patch(add("patch", "look after the patches to vLLM"))
    return main, built


def _add_common(parser: Parser) -> None:
    parser.add_argument(
        "--pool",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="the pool of that name on this machine (default: default)",
    )
    parser.add_argument(
        "--controller",
        metavar="ENDPOINT",
        default=argparse.SUPPRESS,
        help="its controller, where it is elsewhere, such as tcp://127.0.0.1:5555 "
        "(default: $VLLM_RESIDENT_CONTROLLER, else the pool's own)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print JSON on standard output",
    )


def _add_timeout(parser: Parser, default_s: float, what: str) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=default_s,
        help=f"how long {what} may take (default: %(default)g)",
    )


def _add_up(parser: Parser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        type=_num_ranks,
        default=None,
        help="ranks to start; auto: one per GPU, or two on a machine without "
        "(default: auto)",
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="return when the pool is ready; it goes on until `vllm-resident "
        "shutdown`. Without this the pool ends with this command: Ctrl-C shuts it "
        "down, a second one kills it",
    )
    parser.add_argument(
        "--layout", metavar="LAYOUT.toml", help="apply this layout when it is ready"
    )
    parser.add_argument(
        "--max-restarts",
        metavar="N",
        type=int,
        default=3,
        help="how often torchrun may restart failed ranks (default: %(default)s)",
    )
    _add_timeout(parser, 300.0, "the start")


def _add_status(parser: Parser) -> None:
    parser.add_argument(
        "--watch", action="store_true", help="refresh each second, until q or Ctrl-C"
    )


def _add_load(parser: Parser) -> None:
    parser.usage = (
        "vllm-resident load NAME MODEL [--ranks 0,1 | --num-ranks 2] "
        "[--timeout SECONDS]\n                          "
        "[--ANY-VLLM-ENGINE-ARGUMENT VALUE ...]"
    )
    parser.epilog = (
        "example: vllm-resident load big ./llama --ranks 0,1 --tensor-parallel-size 2"
    )
    parser.add_argument("name", metavar="NAME", help="what the engine shall be called")
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint's folder, or its name on a hub"
    )
    parser.add_argument(
        "--ranks",
        metavar="LIST",
        type=_rank_list,
        help="global ranks to build it on, such as 0,1 or 0-3",
    )
    parser.add_argument(
        "--num-ranks",
        metavar="N",
        type=int,
        help="how many ranks; the pool picks (default: what the parallel sizes need)",
    )
    _add_timeout(parser, 600.0, "the load")


def _add_unload(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the engine")
    _add_timeout(parser, 600.0, "it")


def _add_generate(parser: Parser) -> None:
    parser.usage = (
        "vllm-resident generate ENGINE [PROMPT ...] [--file FILE] [--stream] "
        "[--timeout SECONDS]\n                              "
        "[--ANY-VLLM-SAMPLING-PARAMETER VALUE ...]"
    )
    parser.epilog = (
        'example: vllm-resident generate chat "Once upon" --temperature 0 '
        "--max-tokens 64"
    )
    parser.add_argument("engine", metavar="ENGINE", help="the engine")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="one prompt each")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="prompts, one a line; in a .jsonl file each line is a JSON string, a list "
        'of token ids, or {"prompt": one of these}; - is standard input, which is '
        "also read where no prompt is given",
    )
    parser.add_argument(
        "--stream", action="store_true", help="print text as it comes (one prompt)"
    )
    _add_timeout(parser, 600.0, "the call")


def _add_apply(parser: Parser) -> None:
    parser.epilog = (
        "A layout file holds [engines.NAME] tables with `model`, optionally `ranks`\n"
        "(a list or how many), and any vLLM engine argument by name. What is not in\n"
        "it is unloaded first, what is already as asked stays untouched."
    )
    parser.add_argument("layout", metavar="LAYOUT.toml", help="the layout file")
    _add_timeout(parser, 600.0, "the switch")


def _add_shutdown(parser: Parser) -> None:
    _add_timeout(parser, 60.0, "it")


def _add_doctor(parser: Parser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        type=_num_ranks,
        default=None,
        help="ranks you mean to start (default: auto, as `up` does)",
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="remove stale shared memory of pools that are gone",
    )


def _add_patch(parser: Parser) -> None:
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, parser_class=Parser
    )
    status = actions.add_parser("status", help="say how the installed vLLM stands")
    apply = actions.add_parser(
        "apply", help="put the patches into a vLLM tree, all of them or none"
    )
    apply.add_argument(
        "directory",
        metavar="DIR",
        help="the folder that `vllm/` is in: a git checkout, which gets a commit for "
        "each patch, or an installation",
    )
    apply.add_argument("--revert", action="store_true", help="take them out again")
    export = actions.add_parser(
        "export", help="write the patches anew from a checkout's commits"
    )
    export.add_argument(
        "directory", metavar="DIR", help="the checkout, its last commits the patches"
    )
    check = actions.add_parser(
        "check", help="prove that headers are whole and every patch applies exactly"
    )
    check.add_argument(
        "--sources",
        metavar="DIR",
        action="append",
        default=[],
        help="a pristine vLLM tree to apply to, beside the installed one; may be "
        "repeated",
    )
    check.add_argument(
        "--fix", action="store_true", help="bring patches/README.md up to date first"
    )
    for action in (status, apply, export, check):
        _add_common(action)


def _num_ranks(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1, or auto")
    return int(text)


def _rank_list(text: str) -> list[int]:
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r}: ranks are 0,1 or 0-3")
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    return ranks


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: seconds above 0")
    return seconds
