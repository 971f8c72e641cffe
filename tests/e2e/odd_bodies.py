"""Request bodies that no client should send, by route: wrong types, extreme numbers,
grammars of nothing, prompts of no text. What each is answered is vLLM's to say, if only
it is an answer and below 500.
"""

from __future__ import annotations

import json
from typing import Any

MAX_TOKENS = 4
_MESSAGES = [{"role": "user", "content": "hello"}]
_DEEP = 200


def _nested(depth: int, key: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", key: {"a": schema}}
    return schema


def _constrained(**outputs: Any) -> dict[str, Any]:
    return {"structured_outputs": outputs}


# On top of a model, a prompt and a few tokens.
COMPLETIONS: dict[str, dict[str, Any]] = {
    "temperature is nan": {"temperature": float("nan")},
    "temperature is infinite": {"temperature": float("inf")},
    "temperature is 1e308": {"temperature": 1e308},
    "temperature is tiny": {"temperature": 1e-308},
    "temperature is negative": {"temperature": -1},
    "top_p is 0": {"top_p": 0},
    "top_p is nan": {"top_p": float("nan")},
    "top_k is huge": {"top_k": 2**31},
    "min_p is 2": {"min_p": 2},
    "penalties are infinite": {"repetition_penalty": float("inf")},
    "presence penalty is out of range": {"presence_penalty": 1e9},
    "max_tokens is 0": {"max_tokens": 0},
    "max_tokens is negative": {"max_tokens": -1},
    "max_tokens is 10**12": {"max_tokens": 10**12},
    "max_tokens is 10**30": {"max_tokens": 10**30},
    "max_tokens is a list": {"max_tokens": [4]},
    "min_tokens above max_tokens": {"min_tokens": 10**6},
    "n is 0": {"n": 0},
    "n is 2**40": {"n": 2**40},
    "n is many": {"n": 300, "max_tokens": 1},
    "best_of below n": {"n": 4, "best_of": 2},
    "beam search of many": {"use_beam_search": True, "n": 2, "best_of": 10**6},
    "logprobs are absurd": {"logprobs": 10**9},
    "logprobs are negative": {"logprobs": -2},
    "prompt logprobs are absurd": {"prompt_logprobs": 10**9},
    "an empty stop": {"stop": [""]},
    "thousands of stops": {"stop": [f"stop {n}" for n in range(5000)]},
    "stop tokens out of the vocabulary": {"stop_token_ids": [-5, 10**9, 2**62]},
    "a bias out of the vocabulary": {"logit_bias": {"10000000": 5.0}},
    "a bias for no number": {"logit_bias": {"x": 5.0}},
    "an infinite bias": {"logit_bias": {"5": float("inf")}},
    "no token is allowed": {"allowed_token_ids": []},
    "allowed tokens out of range": {"allowed_token_ids": [-1, 10**9]},
    "bad words of nothing": {"bad_words": ["", " "]},
    "a huge seed": {"seed": 2**63},
    "a huger seed": {"seed": 2**70},
    "a negative seed": {"seed": -(2**63)},
    "a priority": {"priority": -(2**40)},
    "echo and nothing more": {"echo": True, "max_tokens": 0, "logprobs": 1},
    "a suffix": {"suffix": "the end"},
    "fields nobody knows": {"no_such_field": {"a": [1, 2, 3]}},
    "arguments nobody knows": {"vllm_xargs": {"a": [[1]], "b": None}},
    "truncated to nothing": {"truncate_prompt_tokens": 0},
    "truncated to less": {"truncate_prompt_tokens": -7},
    "no prompt": {"prompt": None},
    "an empty prompt": {"prompt": ""},
    "a list of no prompts": {"prompt": []},
    "a prompt of no tokens": {"prompt": [[]]},
    "tokens out of the vocabulary": {"prompt": [1, 10**9]},
    "tokens that are huge": {"prompt": [2**70]},
    "tokens that are negative": {"prompt": [-1, 2]},
    "nested prompts": {"prompt": [[[1]]]},
    "texts and tokens": {"prompt": ["hello", 5]},
    "null bytes": {"prompt": "a\0b", "stop": ["\0"]},
    "half a character": {"prompt": "\ud800", "stop": ["\udfff"]},
    "a prompt that is too long": {"prompt": "word " * 5000},
    "embeddings for a prompt": {"prompt_embeds": "AAAA"},
    "a grammar of nothing": _constrained(grammar="root ::= root root"),
    "a grammar with a dead end": _constrained(
        grammar='root ::= "a" | "b" dead\ndead ::= dead dead'
    ),
    "no grammar": _constrained(grammar="::: no grammar"),
    "an empty grammar": _constrained(grammar=""),
    "a grammar of other rules": _constrained(grammar='other ::= "a"'),
    "a schema of itself": _constrained(json={"$ref": "#"}),
    "a schema that is none": _constrained(json="{nope"),
    "a schema of nothing": _constrained(json={"enum": []}),
    "a schema that refers to nobody": _constrained(json={"$ref": "#/$defs/nobody"}),
    "a schema with no such type": _constrained(json={"type": "no such"}),
    "a deep schema": _constrained(json=_nested(_DEEP, "properties")),
    "a schema that nothing fits": _constrained(
        json={"type": "integer", "minimum": 5, "maximum": 1}
    ),
    "an open regex": _constrained(regex="(["),
    "a regex with a null byte": _constrained(regex="a\0"),
    "a regex that looks ahead": _constrained(regex="(?=a)b"),
    "a regex that grows": _constrained(regex="((a{1,90}){1,90}){1,9}"),
    "no choice": _constrained(choice=[]),
    "a choice of nothing": _constrained(choice=[""]),
    "two ways at once": _constrained(regex="a", choice=["b"]),
    "no tag": _constrained(structural_tag='{"structures": 5}'),
    "several of a grammar of nothing": {
        "n": 3, **_constrained(grammar="root ::= root root"),
    },
}  # fmt: skip

CHATS: dict[str, dict[str, Any]] = {
    "no messages": {"messages": []},
    "messages of no kind": {"messages": [5, None]},
    "content of no kind": {"messages": [{"role": "user", "content": [{"type": "x"}]}]},
    "an image": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}],
            }
        ]
    },
    "half a character": {"messages": [{"role": "user", "content": "\ud800"}]},
    "a schema of itself": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"$ref": "#"}},
        }
    },
    "logprobs are absurd": {"logprobs": True, "top_logprobs": 10**6},
    "a tool that nobody has": {"tool_choice": {"type": "function", "function": {}}},
    "tools without names": {"tools": [{"type": "function", "function": {}}]},
    "a template of its own": {"chat_template": "{{ 1 / 0 }}"},
    "a template that is none": {"chat_template": "{% nope"},
    "arguments of the template": {"chat_template_kwargs": {"messages": 5}},
    "options of a stream without one": {"stream_options": {"include_usage": True}},
}

EMBEDDINGS: dict[str, dict[str, Any]] = {
    "no input": {"input": None},
    "an empty input": {"input": ""},
    "a list of no inputs": {"input": []},
    "tokens out of the vocabulary": {"input": [10**9]},
    "no tokens": {"input": [[]]},
    "half a character": {"input": "\ud800"},
    "too long an input": {"input": "word " * 5000},
    "dimensions that are none": {"input": "a", "dimensions": -1},
    "a format that is none": {"input": "a", "encoding_format": "x"},
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello world", "max_tokens": MAX_TOKENS},
    "/v1/chat/completions": {"messages": _MESSAGES, "max_tokens": MAX_TOKENS},
    "/v1/embeddings": {},
}


def bodies(model: str, pooling: str) -> list[tuple[str, str, bytes]]:
    """(what is odd, route, body) of all, for a model that generates and another."""
    found = []
    for route, name, odd in (
        ("/v1/completions", model, COMPLETIONS),
        ("/v1/chat/completions", model, CHATS),
        ("/v1/embeddings", pooling, EMBEDDINGS),
    ):
        for title, fields in odd.items():
            body = {"model": name, **_DEFAULTS[route], **fields}
            found.append((f"{route}: {title}", route, json.dumps(body).encode()))
    deep = b'{"model": "%s", "prompt": %s}' % (model.encode(), b"[" * _DEEP * 250)
    return [*found, ("/v1/completions: deep and open", "/v1/completions", deep)]
