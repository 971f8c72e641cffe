"""The pool's routes as an OpenAPI 3.1 document, made of the types that they read and
write. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_resident.gateway.feed import EndedSwitch
from vllm_resident.gateway.problems import Problem
from vllm_resident.messages import PoolStatus, SwitchReport, SwitchStatus

_REFERENCE = "#/components/schemas/{name}"
# What the routes answer besides 200, and when.
_PROBLEMS = {
    400: "The body is not JSON, or not what the command takes.",
    401: "An operator key is needed, and was not given.",
    403: "No operator key was set: these routes are for this machine only.",
    409: "The pool rejected the command: nothing was changed.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    500: "A rank failed: `rank`, `generation` and `phase` say where.",
    503: "The pool does not answer; or too many large bodies came at once.",
}
_READING = (401, 403, 503)


def describe(commands: Mapping[str, type[msgspec.Struct]]) -> dict[str, Any]:
    """The document; `commands` are the forms of their bodies by route."""
    types = [PoolStatus, SwitchStatus, EndedSwitch, SwitchReport, *commands.values()]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schemas["Problem"] = _problem()
    paths: dict[str, Any] = {
        "/pool": {"get": _reading("status", "What the pool holds.", PoolStatus)},
        "/pool/events": {"get": _events()},
        "/pool/openapi.json": {"get": _reading("describe", "This document.", None)},
    }
    for name, form in commands.items():
        paths[f"/pool/{name}"] = {"post": _command(name, form)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vllm-resident: the pool's commands", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # One of these is enough; on loopback, without a key set, none is needed.
        "security": [{}, {"key": []}],
    }


def _reading(name: str, summary: str, answer: type | None) -> dict[str, Any]:
    schema = {"type": "object"} if answer is None else _reference(answer.__name__)
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _json(summary, schema), **_problems(_READING)},
    }


def _events() -> dict[str, Any]:
    summary = (
        "What happens, as server-sent events, until the caller leaves: `status` (a "
        "PoolStatus) each second, `progress` (a SwitchStatus) whenever a switch gets "
        "on, `switch` (an EndedSwitch) when one has ended, with an id that "
        "`Last-Event-ID` takes, and `error` where the pool does not answer."
    )
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "operationId": "events",
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": stream},
            **_problems(_READING),
        },
    }


def _command(name: str, form: type[msgspec.Struct]) -> dict[str, Any]:
    body = {"application/json": {"schema": _reference(form.__name__)}}
    report = _json("What it took.", _reference(SwitchReport.__name__))
    return {
        "operationId": name,
        "summary": f"The client's `{name}`, with its arguments.",
        "requestBody": {"required": True, "content": body},
        "responses": {"200": report, **_problems(tuple(_PROBLEMS))},
    }


def _problems(statuses: tuple[int, ...]) -> dict[str, Any]:
    return {
        str(each): _json(_PROBLEMS[each], _reference("Problem")) for each in statuses
    }


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"description": description, "content": content}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=name)}


def _problem() -> dict[str, Any]:
    """The schema of `Problem.body`."""
    text = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": text,
            "code": {"type": "integer"},
            "kind": {"type": "string"},
        },
        "required": list(Problem(400, "").body()["error"]),
    }
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
