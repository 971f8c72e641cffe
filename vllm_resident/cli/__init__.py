"""The `vllm-resident` command.

`parser` is the grammar, `arguments` vLLM's own options, `display` what people see,
`commands`, `up` and `watch` what is done. Here: the way from errors to exit codes.
"""

from __future__ import annotations

import os
import sys

from vllm_resident.cli import parser
from vllm_resident.cli.commands import run
from vllm_resident.cli.output import Output
from vllm_resident.errors import (
    CommandRejected,
    PoolUnreachable,
    ResidentError,
)

# What is under way in the pool is not ended with the command that asked for it.
_GOES_ON = frozenset(
    ("load", "unload", "sleep", "wake-up", "switch", "prefetch", "apply", "shutdown")
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (see `vllm-resident --help`).

    Wrong usage raises `SystemExit(2)`, as argparse does.
    """
    arguments = parser.parse(argv)
    output = Output(arguments.json)
    try:
        return run(arguments, output)
    except KeyboardInterrupt:
        goes_on = arguments.command in _GOES_ON
        output.message(
            "interrupted; the pool goes on with it: see `vllm-resident status`"
            if goes_on
            else "interrupted"
        )
        return parser.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. What is still buffered has
        # nowhere to go when the interpreter flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return parser.OK
    except ResidentError as error:
        output.error(error)
        return exit_code(error)


def exit_code(error: ResidentError) -> int:
    """2 where the caller is at fault, 3 where nobody answered, else 1."""
    if isinstance(error, PoolUnreachable):
        return parser.UNREACHABLE
    if isinstance(error, CommandRejected):
        return parser.REJECTED
    return parser.FAILED
