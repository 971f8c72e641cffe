"""The gateway's table of routes against those of the vLLM that is installed."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_resident.gateway.problems import Problem
from vllm_resident.gateway.routes import Who, response_id, who_answers

_METHODS = ("get", "post", "put", "patch", "delete", "websocket")
# Not of the server of an engine: vLLM's other programs, and the pages that describe it.
_OTHERS = ("dp_supervisor.py", "preload.py", "offline_docs.py")


def test_each_of_vllms_routes_has_its_rule() -> None:
    found = dict.fromkeys(_routes_in_source())
    assert len(found) > 50
    for method, path in found:
        assert _status(method, path.format(response_id="resp_1")) in (200, 501), path
    # vLLM mounts these two, without a decorator.
    assert who_answers("GET", "/metrics") is Who.GATEWAY
    assert who_answers("GET", "/version") is Who.GATEWAY


def _status(method: str, path: str) -> int:
    try:
        who_answers(method, path)
    except Problem as problem:
        return problem.status
    return 200


def _routes_in_source() -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("no vLLM is installed")
    (folder,) = spec.submodule_search_locations or ()
    for file in sorted((Path(folder) / "entrypoints").rglob("*.py")):
        if file.name not in _OTHERS:
            yield from _decorated(ast.parse(file.read_text()))


def _decorated(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(method, path) of what is decorated as a route: `@router.post("/path", ...)`."""
    for node in ast.walk(tree):
        for each in getattr(node, "decorator_list", ()):
            if (
                isinstance(each, ast.Call)
                and isinstance(each.func, ast.Attribute)
                and each.func.attr in _METHODS
                and each.args
                and isinstance(each.args[0], ast.Constant)
            ):
                method = each.func.attr.upper().replace("WEBSOCKET", "GET")
                yield method, str(each.args[0].value)


@pytest.mark.parametrize(
    ("method", "path", "who"),
    [
        ("POST", "/v1/chat/completions", Who.MODEL),
        ("GET", "/load", Who.MODEL),
        ("GET", "/v1/models/org/name", Who.GATEWAY),
        ("GET", "/v1/responses/resp_1", Who.RESPONSE),
        ("POST", "/v1/responses/resp_1/cancel", Who.RESPONSE),
    ],
)
def test_who_answers(method: str, path: str, who: Who) -> None:
    assert who_answers(method, path) is who


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/responses/", 404),
        ("GET", "/v1/responses/resp_1/other", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models/a", 405),
        ("POST", "/sleep", 501),
        ("POST", "/v1/audio/transcriptions", 501),
    ],
)
def test_what_nobody_answers(method: str, path: str, status: int) -> None:
    with pytest.raises(Problem) as caught:
        who_answers(method, path)
    assert caught.value.status == status
    assert ("Allow" in caught.value.headers) is (status == 405)


def test_the_name_of_a_response() -> None:
    assert response_id("/v1/responses/resp_1") == "resp_1"
    assert response_id("/v1/responses/resp_1/cancel") == "resp_1"
