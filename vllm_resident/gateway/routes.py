"""Who answers what: the routes of vLLM's server (0.32.0), and the rule for each.

A table, so that a path that leads nowhere brings no model up, and what is not served is
refused with the reason. `tests/unit/test_routes.py` holds it against vLLM's source.
Pure.
"""

from __future__ import annotations

from enum import Enum

from vllm_resident.gateway.problems import Problem


class Who(Enum):
    """Who answers: the gateway itself; the app of the model that the request names;
    the app that keeps the response named in the path."""

    GATEWAY = "gateway"
    MODEL = "model"
    RESPONSE = "response"


_OWN = {
    "/health": ("GET",),
    "/ping": ("GET", "POST"),
    "/version": ("GET",),
    "/metrics": ("GET",),
    "/v1/models": ("GET",),
}
# The body names the model.
_POST = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/cohere/v2/chat",
    "/generative_scoring",
    "/v1/systemone",
    "/v1/embeddings",
    "/v2/embed",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/tokenize",
    "/detokenize",
    "/invocations",
    # With enable_scale_out.
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
    "/cohere/v2/chat/render",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/inference/v1/generate",
)
# The query does: ?model=NAME.
_GET = ("/load", "/tokenizer_info")

_PLACES = "where its engine runs is the pool's to say: command it (POST /pool/...)"
_AUDIO = "audio is not served: the model is read from a JSON body"
_ADAPTERS = "adapters are given to a model when it is loaded (lora_modules)"
_ONE_PROCESS = "it is for a server of one engine, in its own process"
_DEVELOPMENT = "vLLM's routes for development and training are not served"
_REFUSED = {
    "/v1/audio/transcriptions": _AUDIO,
    "/v1/audio/translations": _AUDIO,
    "/v1/realtime": "websockets are not served",
    "/v1/load_lora_adapter": _ADAPTERS,
    "/v1/unload_lora_adapter": _ADAPTERS,
    "/scale_elastic_ep": _PLACES,
    "/is_scaling_elastic_ep": _PLACES,
    "/sleep": _PLACES,
    "/wake_up": _PLACES,
    "/is_sleeping": _PLACES,
    "/release_kv_cache_memory": _PLACES,
    "/fault_tolerance/apply": _PLACES,
    "/fault_tolerance/status": _PLACES,
    "/inference/v1/abort_requests": "a request ends when its caller disconnects",
    "/kv_event_sources": _ONE_PROCESS,
    "/start_profile": _ONE_PROCESS,
    "/stop_profile": _ONE_PROCESS,
    "/server_info": _DEVELOPMENT,
    "/collective_rpc": _DEVELOPMENT,
    "/reset_prefix_cache": _DEVELOPMENT,
    "/reset_mm_cache": _DEVELOPMENT,
    "/reset_encoder_cache": _DEVELOPMENT,
    "/pause": _DEVELOPMENT,
    "/resume": _DEVELOPMENT,
    "/is_paused": _DEVELOPMENT,
    "/abort_requests": _DEVELOPMENT,
    "/init_weight_transfer_engine": _DEVELOPMENT,
    "/shutdown_weight_transfer_engine": _DEVELOPMENT,
    "/start_weight_update": _DEVELOPMENT,
    "/start_draft_weight_update": _DEVELOPMENT,
    "/update_weights": _DEVELOPMENT,
    "/finish_weight_update": _DEVELOPMENT,
    "/update_weight_version": _DEVELOPMENT,
    "/weight_info": _DEVELOPMENT,
    "/weight_checker": _DEVELOPMENT,
    "/get_world_size": _DEVELOPMENT,
}
_RULES: dict[str, tuple[Who, tuple[str, ...]]] = {
    **{path: (Who.GATEWAY, methods) for path, methods in _OWN.items()},
    **dict.fromkeys(_POST, (Who.MODEL, ("POST",))),
    **dict.fromkeys(_GET, (Who.MODEL, ("GET",))),
}
_MODEL_PREFIX = "/v1/models/"
_RESPONSE_PREFIX = "/v1/responses/"


def who_answers(method: str, path: str) -> Who:
    """Raises `Problem`: 404 where there is no such route, 405 where it is for other
    methods, 501 where it is one of vLLM's that a pool does not serve."""
    if why := _REFUSED.get(path):
        raise Problem(501, f"{path} is not served: {why}")
    rule = _RULES.get(path) or _with_a_name(path)
    if rule is None:
        raise Problem(404, f"no route {method} {path}")
    who, methods = rule
    if method not in methods:
        raise Problem(
            405,
            f"{method} is not for {path}",
            headers={"Allow": ", ".join(methods)},
        )
    return who


def response_id(path: str) -> str:
    """Of a path whose answer is `Who.RESPONSE`'s."""
    return path.removeprefix(_RESPONSE_PREFIX).removesuffix("/cancel")


def _with_a_name(path: str) -> tuple[Who, tuple[str, ...]] | None:
    if path.startswith(_MODEL_PREFIX):
        return Who.GATEWAY, ("GET",)
    name, _, action = path.removeprefix(_RESPONSE_PREFIX).partition("/")
    is_one = path.startswith(_RESPONSE_PREFIX) and name
    if not is_one or action not in ("", "cancel"):
        return None
    return Who.RESPONSE, ("POST",) if action else ("GET",)
