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
    """(words of `parser`'s own, the other options by name).

    An option that is not the parser's takes the next word as its value unless that is
    an option too; so positional words come before such options.
    """
    own: list[str] = []
    others: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            own += words[position - 1 :]
            break
        option, _, inline = word.partition("=")
        following = words[position] if position < len(words) else None
        if option in parser.own:
            own.append(word)
            if parser.own[option] and "=" not in word and following is not None:
                own.append(following)
                position += 1
        elif not _OPTION.fullmatch(word):
            own.append(word)
        elif "=" in word:
            _add(parser, others, option, parse_value(inline))
        elif following is not None and not _is_option(following):
            _add(parser, others, option, parse_value(following))
            position += 1
        else:
            _add_flag(parser, others, option)
    return own, others


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
