"""What this package imports of vLLM, looked for in sources that are not imported.

For versions that cannot run here. An import that may fail (`try`, `except ImportError`)
is for another version and not looked for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "vllm_resident"


def missing(*roots: Path) -> list[str]:
    """`file: module.name` of what is in none of the trees; the first that has a module
    counts."""
    return [
        f"{file.relative_to(PACKAGE)}: {module}.{name}"
        for file, module, name in _imports()
        if not _has(roots, module, name)
    ]


def modules() -> set[str]:
    """The modules something is imported from."""
    return {module for _, module, _ in _imports()}


def _imports() -> Iterator[tuple[Path, str, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        parsed = ast.parse(file.read_text())
        optional = {
            id(node)
            for statement in ast.walk(parsed)
            if isinstance(statement, ast.Try)
            for part in (statement.body, *(each.body for each in statement.handlers))
            for node in part
        }
        for node in ast.walk(parsed):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == "vllm"
                and id(node) not in optional
            ):
                yield from ((file, node.module or "", each.name) for each in node.names)


def _has(roots: tuple[Path, ...], module: str, name: str) -> bool:
    if _file(roots, f"{module}.{name}"):
        return True
    file = _file(roots, module)
    if file is None:
        return False
    names = _names(ast.parse(file.read_text()))
    # A module that makes its names when they are asked for.
    return name in names or "__getattr__" in names


def _file(roots: tuple[Path, ...], module: str) -> Path | None:
    for root in roots:
        path = root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _names(parsed: ast.Module) -> set[str]:
    """Everything the module defines, assigns or imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(parsed):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names |= {(each.asname or each.name).split(".")[0] for each in node.names}
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
    return names
