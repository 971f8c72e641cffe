"""Which two models take turns, in which layout, and how people write that.

    smollm2,llama          on one rank: smollm2 is measured, llama is what it replaces
    llama,qwen2@tp2        over two ranks; also @pp2, @tp2pp2

A model is a checkpoint of `examples.checkpoints` by its name, a folder, or a name on a
hub. Pure but for asking whether a folder is there; knows nothing of processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.checkpoints import NAMES, TINY, cache_folder

SHAPE = re.compile(r"(?:tp(?P<tp>[1-9]\d*))?(?:pp(?P<pp>[1-9]\d*))?")


@dataclass(frozen=True)
class Model:
    """`name` is what the rows say, `source` what vLLM is given."""

    name: str
    source: str

    @property
    def nickname(self) -> str:
        """Its part of a row's name: the random little ones are all alike."""
        return "tiny" if self.name in TINY else self.name

    @property
    def weights_bytes(self) -> int:
        """Of its safetensors files; 0 where it is not a folder here."""
        return sum(
            file.stat().st_size for file in Path(self.source).glob("*.safetensors")
        )


@dataclass(frozen=True)
class Pair:
    """The rows are about `measured`, which takes the place of `other`.

    `suffix` ends the rows' names and is what tells one pair's from another's.
    """

    measured: Model
    other: Model
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    suffix: str = ""

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def parallel_args(self) -> dict[str, int]:
        """vLLM's engine arguments for the layout; sizes of one are its default."""
        sizes = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
        }
        return {name: size for name, size in sizes.items() if size > 1}

    @property
    def title(self) -> str:
        """Model and layout, for a reader."""
        sizes = [
            f"{short}={size}"
            for short, size in (
                ("TP", self.tensor_parallel_size),
                ("PP", self.pipeline_parallel_size),
            )
            if size > 1
        ]
        ranks = "one rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        return ", ".join([self.measured.name, *sizes, ranks])


def model(text: str) -> Model:
    """A checkpoint by name wins over a folder of that name."""
    if text in NAMES:
        return Model(text, str(cache_folder() / text))
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Model(_word(folder.resolve().name), str(folder.resolve()))
    if text.startswith((".", "/", "~")):
        raise ValueError(f"no such model folder: {text}")
    return Model(_word(text.rpartition("/")[2]), text)


def pair(text: str) -> Pair:
    """Read `MEASURED,OTHER[@LAYOUT]`; ValueError says what is wrong with it."""
    models, at, layout = text.partition("@")
    names = [name.strip() for name in models.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"{text!r}: two models with a comma between, as smollm2,llama")
    found = SHAPE.fullmatch(layout)
    if found is None or (at and not layout):
        raise ValueError(f"{text!r}: after the @ comes tp2, pp2 or tp2pp2")
    measured, other = map(model, names)
    if measured == other:
        raise ValueError(f"{text!r}: switching needs two different models")
    tensor, pipeline = int(found["tp"] or 1), int(found["pp"] or 1)
    return Pair(measured, other, tensor, pipeline)


def name_apart(first: Pair, further: Iterable[Pair]) -> list[Pair]:
    """The pairs with suffixes: none for the first, then the layout (on one rank the
    model), and the model too where that is taken."""
    taken: set[str] = {""}
    named = [first]
    for each in further:
        suffix = _suffix(each)
        if suffix in taken:
            suffix += f"_{each.measured.name}"
        if suffix in taken:
            raise ValueError(f"{each.title} is there twice")
        taken.add(suffix)
        named.append(
            Pair(
                each.measured,
                each.other,
                each.tensor_parallel_size,
                each.pipeline_parallel_size,
                suffix,
            )
        )
    return named


def _suffix(pair: Pair) -> str:
    tensor, pipeline = pair.tensor_parallel_size, pair.pipeline_parallel_size
    shape = (f"tp{tensor}" if tensor > 1 else "") + (
        f"pp{pipeline}" if pipeline > 1 else ""
    )
    return f"_{shape or pair.measured.name}"


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)
