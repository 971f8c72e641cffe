"""What is kept of closed worlds, and what ranks agree to use again; no torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from vllm_resident.rank.communicators import (
    Agreement,
    Budget,
    Communicator,
    CommunicatorPool,
    Key,
    Offer,
    agree,
    describe,
)


def made(name: str, *ranks: int, num_bytes: int = 0) -> Communicator:
    return Communicator(name, Key(ranks, "hccl", ""), object(), num_bytes)


def offer(
    name: str,
    *ranks: int,
    used: bool = True,
    options: str = "",
    served: tuple[int, ...] = (),
) -> Offer:
    return Offer(name, Key(ranks, "hccl", options), used, served)


class Recorder:
    """Destroys nothing; remembers what it was given."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, communicators: list[Communicator]) -> None:
        self.names += [each.name for each in communicators]


def pool(num: int = 3, num_bytes: int | None = None) -> tuple[CommunicatorPool, Any]:
    destroyed = Recorder()
    return CommunicatorPool(Budget(num, num_bytes), destroyed), destroyed


def test_the_least_recently_used_go_first() -> None:
    kept, destroyed = pool(num=2)
    kept.give_back([made("a", 0, 1), made("b", 0, 1)])
    kept.give_back([kept.take("a")])
    kept.give_back([made("c", 0, 1)])
    assert destroyed.names == ["b"]
    assert kept.num == 2
    assert kept.counts.reused == 1
    assert kept.counts.destroyed == 1


def test_bytes_count_as_numbers_do() -> None:
    kept, destroyed = pool(num=10, num_bytes=100)
    kept.give_back([made("a", 0, num_bytes=60), made("b", 0, num_bytes=30)])
    assert kept.num_bytes == 90
    kept.give_back([made("c", 0, num_bytes=20)])
    assert destroyed.names == ["a"]
    kept.give_back([made("too large", 0, num_bytes=101)])
    assert kept.num == 0


def test_a_smaller_budget_holds_at_once_and_none_keeps_nothing() -> None:
    kept, destroyed = pool(num=3)
    kept.give_back([made("a", 0), made("b", 0), made("c", 0)])
    kept.set_budget(Budget(1))
    assert sorted(destroyed.names) == ["a", "b"]
    kept.set_budget(Budget())
    kept.give_back([made("d", 0)])
    assert kept.num == 0
    assert sorted(destroyed.names) == ["a", "b", "c", "d"]


def test_those_of_a_lost_rank_go() -> None:
    kept, destroyed = pool()
    kept.give_back([made("a", 0, 1), made("b", 0, 2), made("c", 0)])
    kept.discard_of(2)
    assert destroyed.names == ["b"]
    kept.close()
    kept.close()
    assert sorted(destroyed.names) == ["a", "b", "c"]


def test_only_what_lies_within_a_world_is_offered() -> None:
    kept, _ = pool()
    kept.give_back([made("b", 0, 1), made("a", 0), made("c", 0, 3)])
    assert [each.name for each in kept.within([0, 1, 2])] == ["a", "b"]


def test_all_members_must_have_it() -> None:
    both, alone = offer("both", 0, 1), offer("alone", 0, 1)
    agreement = agree({0: [both, alone], 1: [both], 2: []})
    assert agreement.offers == (both,)


def test_a_name_is_not_enough() -> None:
    agreement = agree({0: [offer("a", 0, 1)], 1: [offer("a", 0, 1, options="x")]})
    assert agreement.offers == ()


def test_one_that_a_member_has_used_was_used() -> None:
    agreement = agree({0: [offer("a", 0, 1, used=False)], 1: [offer("a", 0, 1)], 2: []})
    (found,) = agreement.offers
    assert found.used
    assert agreement.worth_a_check() == (found,)
    assert agreement.without(["a"]) == Agreement()


def test_what_a_check_tells_nothing_of_is_not_checked() -> None:
    agreement = Agreement((offer("unused", 0, 1, used=False), offer("single", 0)))
    assert agreement.worth_a_check() == ()


NAMES = st.sampled_from(["a", "b", "c", "d"])
# Made once: whoever has it knows it alike.
MEMBERS = {"a": (0, 1), "b": (0, 1, 2), "c": (2,), "d": (1, 2)}


def test_what_a_world_is_about_to_take_is_over_its_ranks_or_was_its_kind_before() -> (
    None
):
    whole = offer("whole", 0, 1, 2, 3, served=(0, 1))
    part = offer("part", 0, 1, served=(0, 1, 2, 3))
    other = offer("other", 0, 1, served=(0, 1))
    unused = offer("unused", 0, 1, 2, 3, used=False)
    agreement = Agreement((whole, part, other, unused))
    assert agreement.likely([0, 1, 2, 3]) == (whole, part)
    assert agreement.likely([0, 1]) == (whole, part, other)


def test_where_several_would_do_one_that_is_checked_is_first() -> None:
    agreement = Agreement((offer("a", 0, 1), offer("b", 0, 1), offer("c", 0, 2)))
    key = Key((0, 1), "hccl", "")
    assert agreement.first(key, {"a"}) == offer("b", 0, 1)
    assert agreement.first(key, {"a", "b"}) == offer("a", 0, 1)
    assert agreement.first(Key((1, 2), "hccl", ""), set()) is None


def test_members_that_do_not_say_alike_whom_it_served_leave_it_open() -> None:
    mine, theirs = offer("a", 0, 1, served=(0, 1)), offer("a", 0, 1)
    assert agree({0: [mine], 1: [mine]}).offers == (mine,)
    assert agree({0: [mine], 1: [theirs]}).offers == (theirs,)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 2), st.sets(NAMES), min_size=3))
def test_agreement_is_what_all_members_have(has: dict[int, set[str]]) -> None:
    offers = {
        rank: [offer(name, *MEMBERS[name]) for name in names if rank in MEMBERS[name]]
        for rank, names in has.items()
    }
    expected = sorted(
        name for name, ranks in MEMBERS.items() if all(name in has[r] for r in ranks)
    )
    assert [each.name for each in agree(offers).offers] == expected
    # In whatever order the ranks' words are read.
    assert agree(dict(reversed(offers.items()))) == agree(offers)


def test_equal_options_have_equal_texts() -> None:
    def options(**changes: Any) -> SimpleNamespace:
        fields = {
            "hccl_config": {"hccl_buffer_size": 200, "group_name": "tp"},
            "is_high_priority_stream": False,
            "global_ranks_in_group": [],
            "group_id": "",
        }
        return SimpleNamespace(**(fields | changes))

    text = describe(options())
    assert text is not None
    # Each group's own are filled in by torch.
    assert describe(options(global_ranks_in_group=[0, 1], group_id="7")) == text
    assert describe(options(is_high_priority_stream=True)) != text
    assert describe(options(hccl_config={"hccl_buffer_size": 100})) != text
    assert describe(None) == describe(None) != text


@pytest.mark.parametrize("unknown", [object(), SimpleNamespace(x=object()), len])
def test_options_that_cannot_be_compared_are_never_equal(unknown: Any) -> None:
    assert describe(unknown) is None
