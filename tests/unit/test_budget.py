"""A load's share is of what is free; what cannot fit is refused before it begins."""

import pytest

from vllm_resident.errors import RankFailure
from vllm_resident.messages import EngineMemory
from vllm_resident.rank import budget

GIB = 2**30


def test_an_empty_device_is_shared_as_vllm_shares_it() -> None:
    assert budget.utilization(0.9, EngineMemory(), 80 * GIB, 80 * GIB) == 0.9


def test_beside_others_it_is_a_share_of_what_they_leave() -> None:
    got = budget.utilization(0.9, EngineMemory(), 20 * GIB, 80 * GIB)
    # What vLLM makes of it is free.
    assert got * 80 * GIB == pytest.approx(18 * GIB)


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    expected = EngineMemory(device_bytes=21 * GIB)
    with pytest.raises(RankFailure, match=r"needs 22548578304 .* 21474836480 of") as e:
        budget.utilization(0.9, expected, 20 * GIB, 80 * GIB)
    assert e.value.phase == "load_model"
    fits = EngineMemory(device_bytes=20 * GIB)
    assert budget.utilization(1.0, fits, 20 * GIB, 80 * GIB) == 0.25
