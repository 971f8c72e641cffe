"""`vllm-resident patch`: what is changed in vLLM, seen, applied, taken out and proven.

Needs no pool, and vLLM's sources only where it says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from vllm_resident.cli import parser
from vllm_resident.cli.output import Output
from vllm_resident.errors import PatchError
from vllm_resident.patching import actions, readme, tree
from vllm_resident.patching.check import Verdict, check


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Do what was asked; returns the exit code."""
    return _ACTIONS[arguments.action](arguments, output)


def _status(arguments: argparse.Namespace, output: Output) -> int:
    del arguments
    status = actions.status()
    head = (
        f"vLLM [bold]{escape(status.version)}[/] in {escape(status.root)}: the series "
        f"touches {len(status.files)} files, {actions.describe(status.files)}"
    )
    overlay = (
        f"a rank imports the patched copies in {escape(status.overlay)}"
        if status.overlay
        else "a rank's first start makes the patched copies it imports"
    )
    if set(status.files.values()) == {tree.FileState.PATCHED}:
        overlay = "a rank imports the installed files, which have the patches in them"
    table = Table("patch", "what it does", box=None, pad_edge=False)
    for slug, subject in status.patches.items():
        table.add_row(escape(slug), escape(subject))
    output.result(status, Group(head, overlay, table))
    bad = {tree.FileState.EDITED, tree.FileState.MISSING} & set(status.files.values())
    return parser.FAILED if bad else parser.OK


def _apply(arguments: argparse.Namespace, output: Output) -> int:
    directory = Path(arguments.directory)
    if arguments.revert:
        changed, did = actions.revert(directory), "taken out of"
    else:
        changed, did = actions.apply(directory), "put into"
    how = " as commits" if changed.as_commits else ""
    words = (
        f"the patches for vLLM {changed.version} are {did} {changed.root}{how}: "
        f"{len(changed.files)} files changed"
        if changed.files
        else f"nothing to do: {changed.root} is as asked already"
    )
    output.result(changed, escape(words))
    return parser.OK


def _export(arguments: argparse.Namespace, output: Output) -> int:
    changed = actions.export(Path(arguments.directory))
    words = f"{changed.root}: {', '.join(sorted(changed.files)) or 'nothing changed'}"
    output.result(changed, escape(words))
    return parser.OK


def _check(arguments: argparse.Namespace, output: Output) -> int:
    if arguments.fix:
        readme.write()
    verdicts = check(_sources(arguments.sources))
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    output.result(
        {"ok": not problems, "verdicts": verdicts},
        "\n".join(_verdict_line(verdict) for verdict in verdicts),
    )
    return parser.FAILED if problems else parser.OK


def _sources(directories: list[str]) -> list[tree.Tree]:
    """The trees that were named, else of a version the installed one, if there is."""
    trees = [tree.find(Path(directory)) for directory in directories]
    try:
        return [tree.installed(), *trees]
    except PatchError:
        return trees


def _verdict_line(verdict: Verdict) -> str:
    name = f"vLLM {verdict.version}" if verdict.version else "README"
    mark = "[red]FAIL[/]" if verdict.problems else "[green]ok[/]"
    line = f"{mark} {name}"
    if verdict.version:
        where = (
            f"applied to {verdict.sources}"
            if verdict.sources
            else ("not applied: no sources of it here, give --sources DIR")
        )
        line += f": {verdict.num_patches} patches, {escape(where)}"
    return "\n".join([line, *(f"  {escape(each)}" for each in verdict.problems)])


_Action = Callable[[argparse.Namespace, Output], int]
_ACTIONS: dict[str, _Action] = {
    "status": _status,
    "apply": _apply,
    "export": _export,
    "check": _check,
}
