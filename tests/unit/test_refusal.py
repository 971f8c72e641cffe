"""What is told of what vLLM raises."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vllm_resident.rank import refusal


@dataclass
class Config:
    """As vLLM's: it checks itself."""

    num_heads: int = 8
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.num_heads % self.tensor_parallel_size:
            raise ValueError(
                f"{self.num_heads} heads, {self.tensor_parallel_size} parts"
            )


def error_of(**values: Any) -> ValidationError:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(Config).validate_python(values)
    return raised.value


def test_what_a_config_says_itself_is_all_that_is_told() -> None:
    error = error_of(num_heads=9, tensor_parallel_size=2)
    assert "pydantic" in str(error)
    assert refusal.in_words(error) == "9 heads, 2 parts"


def test_each_field_that_is_wrong_is_named() -> None:
    told = refusal.in_words(error_of(num_heads="x", tensor_parallel_size=1.5))
    first, second = told.split("; ")
    assert first.startswith("num_heads: Input should be a valid integer")
    assert second.startswith("tensor_parallel_size: Input should be a valid integer")


def test_another_error_is_told_with_its_kind() -> None:
    assert refusal.in_words(OSError("no config.json")) == "OSError: no config.json"


def test_a_list_without_end_is_cut_off() -> None:
    known = [f"Architecture{number}" for number in range(500)]
    told = refusal.in_words(ValueError(f"'Unknown' is not supported, but {known}"))
    assert told.startswith("ValueError: 'Unknown' is not supported, but ['Arch")
    assert told.endswith(" ...")
    assert len(told) <= refusal.MAX_LENGTH + 4
