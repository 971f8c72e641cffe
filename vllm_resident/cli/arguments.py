"""Options the parser does not know: vLLM's, by vLLM's own names.

`--tensor-parallel-size 2` is `tensor_parallel_size=2`, `--enforce-eager` is
`enforce_eager=True`, `--no-enable-prefix-caching` is `enable_prefix_caching=False`.
Whether vLLM knows the name and takes the value is the pool's to say.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

_OPTION = re.compile(r"--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser that remembers its options, so that others can be told from them."""

    def __init__(self, **kwargs: Any) -> None:
        # Each option string and whether a value follows it.
        self.own: dict[str, bool] = {}
        # An abbreviation would swallow a vLLM option of that name.
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        for option in action.option_strings:
            self.own[option] = action.nargs != 0
        return action


def split_options(parser: Parser, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(`parser`'s own words, its options first; the other options by name).

    An option that is not the parser's takes the next word as its value unless that is
    an option too; so positional words come before such options.
    """
    options: list[str] = []
    positional: list[str] = []
    others: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += [word, *rest]
            break
        option, equals, inline = word.partition("=")
        if option in parser.own:
            options.append(word)
            if parser.own[option] and not equals and rest:
                options.append(rest.pop(0))
        elif not _OPTION.fullmatch(word):
            positional.append(word)
        elif equals:
            _add(parser, others, option, parse_value(inline))
        elif rest and not _is_option(rest[0]):
            _add(parser, others, option, parse_value(rest.pop(0)))
        else:
            _add_flag(parser, others, option)
    return [*options, *positional], others


def parse_value(text: str) -> Any:
    """A number, boolean, null, list or table where it reads as JSON; else the text.

    Text that looks like one of these is written in JSON's quotes: '"123"'.
    """
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text


def _is_option(word: str) -> bool:
    return word == "--" or _OPTION.fullmatch(word) is not None


def _add_flag(parser: Parser, others: dict[str, Any], option: str) -> None:
    if option.startswith("--no-"):
        _add(parser, others, "--" + option.removeprefix("--no-"), False)
    else:
        _add(parser, others, option, True)


def _add(parser: Parser, others: dict[str, Any], option: str, value: Any) -> None:
    name = option.removeprefix("--").replace("-", "_")
    if name in others:
        parser.error(f"{option} is given twice; a list is written as JSON: '[1, 2]'")
    others[name] = value


def _no_constant(name: str) -> None:
    # JSON has neither NaN nor Infinity; Python's reader would take them.
    raise ValueError(name)
