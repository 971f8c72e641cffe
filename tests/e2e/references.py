"""What plain vLLM answers in a fresh process, of models of other kinds than those that
the fixture `plain` asks: embeddings, and an adapter's completion."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# A model without a KV cache: but for the bytes, vLLM would ask for most of the memory.
POOLING_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 20,
}
TEXTS = ["hello world", "the quick brown fox", "Paris is the capital of France."]

_PLAIN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
request = json.loads(sys.argv[1])
llm = LLM(request["model"], **request["engine_args"])
if "texts" in request:
    answers = [output.outputs.embedding for output in llm.embed(request["texts"])]
else:
    adapter = LoRARequest("tuned", 1, request["adapter"])
    sampling = SamplingParams(**request["sampling"])
    answers = [
        llm.generate(request["prompt"], sampling, lora_request=each)[0].outputs[0].text
        for each in (adapter, None)
    ]
print("PLAIN " + json.dumps(answers), flush=True)
os._exit(0)
"""


@dataclass(frozen=True)
class Expected:
    """A model with an adapter called "tuned", and what each answers to the prompt."""

    model: str
    engine_args: dict[str, Any]
    prompt: str
    with_adapter: str
    without: str


def plain_embeddings(model: str) -> dict[str, list[float]]:
    request = {"model": model, "texts": TEXTS, "engine_args": POOLING_ARGS}
    answers = _ask(request)
    return dict(zip(TEXTS, answers, strict=True))


def plain_adapter(model: str, adapter: Path, engine_args: dict[str, Any],
                  sampling: dict[str, Any]) -> Expected:  # fmt: skip
    """The engine arguments given back are those of a pool's engine over two ranks."""
    request = {
        "model": model,
        "adapter": str(adapter),
        "prompt": "hello world",
        "engine_args": {**engine_args, "enable_lora": True},
        "sampling": sampling,
    }
    with_adapter, without = _ask(request)
    args = {
        **engine_args,
        "enable_lora": True,
        "lora_modules": [{"name": "tuned", "path": str(adapter)}],
    }
    return Expected(model, args, "hello world", with_adapter, without)


def write_adapter(model: Path, folder: Path, rank: int = 8) -> Path:
    """A random LoRA adapter of a tiny Llama, large enough to change what it says."""
    config = json.loads((model / "config.json").read_text())
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    outs = {"q_proj": width, "v_proj": width // heads * config["num_key_value_heads"]}
    random = np.random.default_rng(7)
    tensors = {}
    for layer in range(layers):
        for name, out in outs.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            a = random.standard_normal((rank, width)) / np.sqrt(width)
            b = random.standard_normal((out, rank))
            tensors[f"{key}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": list(outs),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def _ask(request: dict[str, Any]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, json.dumps(request)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("PLAIN "):
            answers: list[Any] = json.loads(line.removeprefix("PLAIN "))
            return answers
    raise AssertionError(f"plain vLLM failed on {request}:\n{done.stderr[-3000:]}")
