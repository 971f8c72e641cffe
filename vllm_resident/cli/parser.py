"""The command line's grammar and its help: every command, option and exit code."""

from __future__ import annotations

import argparse
import sys
from typing import Any, get_args

from vllm_resident.cli import values
from vllm_resident.cli.arguments import Parser, split_options
from vllm_resident.client.asynchronous import DRAIN_S, Strategy

OK, FAILED, REJECTED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

_ABOUT = """\
Many vLLM models on one pool of ranks whose processes never end: load and unload
engines, put them to sleep, wake and regroup them while the others go on serving."""

_EXAMPLES = """\
examples:
  vllm-resident up --detach                        start a pool and come back
  vllm-resident load chat ./smollm2 --num-ranks 1 --dtype bfloat16
  vllm-resident generate chat "The capital of France is" --max-tokens 8
  vllm-resident status --watch                     see it live
  vllm-resident sleep chat                         free its device, keep the engine
  vllm-resident switch chat tiny                   one goes to sleep, one wakes up
  vllm-resident apply layout.toml                  exactly the engines of a file
  vllm-resident trace --last 10 -o switches.json   what switches took, for Perfetto
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
    if words[head - 1 : head] in (["load"], ["generate"], ["switch"]):
        own, options = split_options(commands[words[head - 1]], words[head:])
        words = [*words[:head], *own]
    arguments = main.parse_args(words)
    arguments.vllm = options
    _check_together(arguments, commands)
    return arguments


def _check_together(arguments: argparse.Namespace, commands: dict[str, Parser]) -> None:
    """End the process where options do not go together."""
    if arguments.command not in ("load", "switch"):
        return
    error = commands[arguments.command].error
    if arguments.ranks and arguments.num_ranks:
        error("--ranks says already how many: leave --num-ranks out")
    # An engine that sleeps is built already; a declared one has a pool.toml.
    is_plain = not (arguments.vllm or arguments.ranks or arguments.num_ranks)
    if arguments.command == "switch" and not arguments.model and not is_plain:
        error("only an engine that is to be loaded takes these: name its --model")


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
    main.set_defaults(pool="default", controller=None, key_file=None, json=False)
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
    _add_sleep(add("sleep", "free an engine's device memory and keep the engine"))
    _add_wake_up(add("wake-up", "wake an engine that sleeps"))
    _add_switch(
        add(
            "switch",
            "put one engine aside and bring another up, or change nothing",
            "\n\n" + _VLLM_OPTIONS,
        )
    )
    _add_prefetch(add("prefetch", "read a checkpoint into memory before it is loaded"))
    _add_generate(
        add("generate", "complete prompts with an engine", "\n\n" + _VLLM_OPTIONS)
    )
    _add_apply(add("apply", "make the pool hold exactly the engines of a layout file"))
    _add_trace(add("trace", "make a timeline of the pool's switches"))
    _add_shutdown(add("shutdown", "unload every engine and end the pool"))
    _add_key(add("key", "make the key of a pool on several machines"))
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
        "--key-file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="the key of a pool on several machines, made by `vllm-resident key` "
        "(default: $VLLM_RESIDENT_KEY_FILE)",
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
        type=values.seconds,
        default=default_s,
        help=f"how long {what} may take (default: %(default)g)",
    )


def _add_up(parser: Parser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        type=values.num_ranks,
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
        "--config",
        metavar="POOL.toml",
        help="what the pool may hold and how much of it: memory budgets and the models "
        "that `load NAME` then needs no more of (default: $VLLM_RESIDENT_CONFIG)",
    )
    parser.add_argument(
        "--layout", metavar="LAYOUT.toml", help="apply this layout when it is ready"
    )
    parser.add_argument(
        "--http",
        metavar="HOST:PORT",
        help="serve the pool's models to OpenAI clients there, each brought up when a "
        "request names it; :PORT is loopback's, beyond that an --api-key is needed",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="the key that requests over HTTP need (default: $VLLM_API_KEY, else none)",
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
    parser.add_argument(
        "--ledger",
        action="store_true",
        help="what each engine and each rank holds: memory on device and host, "
        "descriptors, sockets, threads, segments, process groups; and the budgets "
        "(with --json it is in the document anyway)",
    )


def _add_load(parser: Parser) -> None:
    parser.usage = (
        "vllm-resident load NAME [MODEL] [--ranks 0,1 | --num-ranks 2] "
        "[--asleep] [--pinned]\n                          "
        "[--timeout SECONDS] [--ANY-VLLM-ENGINE-ARGUMENT VALUE ...]"
    )
    parser.epilog = (
        "example: vllm-resident load big ./llama --ranks 0,1 --tensor-parallel-size 2"
    )
    parser.add_argument("name", metavar="NAME", help="what the engine shall be called")
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="",
        help="a checkpoint's folder, or its name on a hub; without it, what the pool's "
        "pool.toml declares under NAME",
    )
    _add_ranks(parser)
    parser.add_argument(
        "--asleep", action="store_true", help="leave it at sleep level 1 when built"
    )
    parser.add_argument(
        "--pinned",
        action="store_true",
        help="never put it aside to make room for another",
    )
    _add_timeout(parser, 600.0, "the load")


def _add_ranks(parser: Parser) -> None:
    parser.add_argument(
        "--ranks",
        metavar="LIST",
        type=values.rank_list,
        help="global ranks to build it on, such as 0,1 or 0-3",
    )
    parser.add_argument(
        "--num-ranks",
        metavar="N",
        type=int,
        help="how many ranks; the pool picks (default: what the parallel sizes need)",
    )


def _add_drain(parser: Parser, default_s: float) -> None:
    parser.add_argument(
        "--drain",
        metavar="SECONDS",
        type=values.seconds_or_none,
        default=default_s,
        help="how long requests of an engine that goes may still run; then they are "
        'aborted and end with reason "abort" (default: %(default)g)',
    )


def _add_unload(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the engine")
    _add_drain(parser, 0.0)
    _add_timeout(parser, 600.0, "it")


def _add_sleep(parser: Parser) -> None:
    parser.epilog = (
        "What stays at any level: its processes, world, tokenizer and compiled code.\n"
        "Its KV cache goes. Wake it with `vllm-resident wake-up NAME`."
    )
    parser.add_argument("name", metavar="NAME", help="the engine")
    parser.add_argument(
        "--level",
        type=int,
        choices=(1, 2),
        default=1,
        help="1 keeps the weights in host memory, 2 drops them and reads them from the "
        "checkpoint again on waking; from 1 it may go to 2 (default: %(default)s)",
    )
    _add_drain(parser, DRAIN_S)
    _add_timeout(parser, 600.0, "it")


def _add_wake_up(parser: Parser) -> None:
    parser.epilog = (
        "What is awake on its ranks and leaves no room for it is put to sleep."
    )
    parser.add_argument("name", metavar="NAME", help="the engine")
    _add_drain(parser, DRAIN_S)
    _add_timeout(parser, 600.0, "it")


def _add_switch(parser: Parser) -> None:
    parser.usage = (
        "vllm-resident switch OLD NEW [--strategy sleep|unload|stage] "
        "[--drain SECONDS]\n                            [--timeout SECONDS] "
        "[--model MODEL [--ranks 0,1 | --num-ranks 2]\n"
        "                            [--ANY-VLLM-ENGINE-ARGUMENT VALUE ...]]"
    )
    parser.epilog = (
        "examples: vllm-resident switch chat tiny\n"
        "          vllm-resident switch chat big --strategy stage --model ./llama\n"
        "If anything fails on any rank, OLD serves again and NEW is as it was."
    )
    parser.add_argument("old", metavar="OLD", help="the engine that goes")
    parser.add_argument(
        "new",
        metavar="NEW",
        help="the one that comes: an engine that sleeps, a model that pool.toml "
        "declares, or, with --model, what a new one shall be called",
    )
    parser.add_argument(
        "--model", metavar="MODEL", default="", help="build NEW from this checkpoint"
    )
    parser.add_argument(
        "--strategy",
        choices=get_args(Strategy),
        default="sleep",
        help="sleep: OLD falls asleep, then NEW comes; unload: OLD gives its memory up "
        "first, where both do not fit; stage: NEW is built while OLD serves, then they "
        "change places (default: %(default)s)",
    )
    _add_ranks(parser)
    _add_drain(parser, DRAIN_S)
    _add_timeout(parser, 600.0, "the switch")


def _add_prefetch(parser: Parser) -> None:
    parser.epilog = (
        "One rank of each machine reads the files into the page cache while engines\n"
        "go on serving; a load, or a wake-up from level 2, then finds them in memory."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint's folder, or the name of a model: one that pool.toml "
        "declares, or one of a hub whose files are here already",
    )
    _add_timeout(parser, 600.0, "it")


def _add_trace(parser: Parser) -> None:
    parser.epilog = (
        "The timeline is a Chrome trace: open it at ui.perfetto.dev, or in\n"
        "chrome://tracing. A track for each rank, its phases as slices, and one for\n"
        "the controller. The pool need not be up: it is made from its log."
    )
    span = parser.add_mutually_exclusive_group()
    span.add_argument(
        "--last",
        metavar="N",
        type=values.count,
        help="the last N switches (default: all)",
    )
    span.add_argument(
        "--since",
        metavar="T",
        type=values.moment,
        help="those that began since then: 90s, 10m, 2h or 1d ago, or a time such as "
        "2026-01-31T08:30 (of this machine's time zone)",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to write (default: standard out)"
    )


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
    _add_drain(parser, 0.0)
    _add_timeout(parser, 600.0, "the switch")


def _add_shutdown(parser: Parser) -> None:
    _add_timeout(parser, 60.0, "it")


def _add_key(parser: Parser) -> None:
    parser.epilog = (
        "Copy the file to every machine of the pool, readable by you alone; whoever\n"
        "has it may do all that the pool can. Starting such a pool: docs/MACHINES.md."
    )
    parser.add_argument("file", metavar="FILE", help="where to write it")


def _add_doctor(parser: Parser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        type=values.num_ranks,
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
