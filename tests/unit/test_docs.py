"""What README and the pages in docs/ name is there: targets, files, commands, names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vllm_resident
from vllm_resident.cli import parser
from vllm_resident.client import AsyncClient, Client
from vllm_resident.config import read_pool

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "docs/ACCELERATORS.md",
    "docs/ARCHITECTURE.md",
    "docs/CONTRIBUTING.md",
    "docs/HTTP.md",
]
# Made by what the pages tell the reader to run.
MADE = ("build/", ".venv/")

pages = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def python_blocks(page: str) -> list[ast.Module]:
    blocks = re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S)
    return [ast.parse(block) for block in blocks]


@pages
def test_make_targets_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M)
    named = re.findall(r"(?:`|^)make ([a-z-]+)", text_of(page), re.M)
    assert set(named) <= set(targets)
    assert page != "README.md" or {"demo", "test"} <= set(named)


@pages
def test_paths_exist(page: str) -> None:
    """Every word with a slash that looks like a file or folder of the repository."""
    words = re.findall(r"(?<![\w/~.*-])((?:[\w.-]+/)+[\w.-]*\w)", text_of(page))
    tops = {path.name for path in ROOT.iterdir()}
    named = {
        word
        for word in words
        if word.split("/")[0] in tops and not word.startswith(MADE)
    }
    files = re.findall(r"`([\w.-]+\.(?:md|toml|py)|LICENSE|Makefile)`", text_of(page))
    missing = [path for path in {*named, *files} if not (ROOT / path).exists()]
    assert not missing


def test_the_house_is_drawn_as_it_is() -> None:
    """What ARCHITECTURE draws is there, and a folder it draws it draws whole."""
    house = text_of("docs/ARCHITECTURE.md").split("```")[3]
    drawn: dict[str, set[str]] = {"": set()}
    folder = ""
    for line in house.partition("tests/")[0].splitlines():
        if found := re.match(r"  (\w+/)(?:\s|$)", line):
            folder = found[1]
            drawn[folder] = set()
        elif found := re.match(r"(  |    )(\w+\.py)\s", line):
            drawn["" if found[1] == "  " else folder].add(found[2])
    assert {"", "client/", "controller/", "rank/"} <= set(drawn)
    for folder, modules in drawn.items():
        own = {path.name for path in (ROOT / "vllm_resident" / folder).glob("*.py")}
        if folder:
            own -= {"__init__.py", "__main__.py"}
        assert modules == own, folder


def test_commands_exist() -> None:
    named = re.findall(r"^\| `vllm-resident ([\w-]+)", text_of("README.md"), re.M)
    _, commands = parser._build()
    assert sorted(named) == sorted(commands)


def test_names_of_the_python_blocks_are_public() -> None:
    imported = [
        alias.name
        for block in python_blocks("README.md")
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and node.module == "vllm_resident"
        for alias in node.names
    ]
    assert imported
    assert set(imported) <= set(vllm_resident.__all__)


def test_methods_of_the_python_blocks_exist() -> None:
    called = {
        node.func.attr
        for block in python_blocks("README.md")
        for node in ast.walk(block)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "client"
    }
    assert {"load", "generate", "apply"} <= called
    for name in called:
        assert hasattr(Client, name)
        assert hasattr(AsyncClient, name)


def test_the_pool_file_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```", text_of("README.md"), re.M | re.S)
    file = tmp_path / "pool.toml"
    file.write_text(block)
    pool = read_pool(file)
    assert {"chat", "wide"} == set(pool.models)
    assert pool.host_memory_bytes == 8 * 2**30


def test_errors_are_described() -> None:
    for error in re.findall(r"^\| (`.*?`) \|", text_of("README.md"), re.M):
        for name in re.findall(r"`([A-Z]\w+)`", error):
            assert name in vllm_resident.__all__
