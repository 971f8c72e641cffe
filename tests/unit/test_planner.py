"""Which ranks an engine gets and what a new layout keeps."""

from __future__ import annotations

import pytest

from tests.unit.controller_harness import spec
from vllm_resident.controller.planner import (
    LayoutPlan,
    Placement,
    RankView,
    Resident,
    choose_ranks,
    complete,
    num_ranks,
    plan_layout,
)
from vllm_resident.errors import CommandRejected


def views(taken: str = "", hosts: str = "") -> list[RankView]:
    """One character per rank: `x` is taken; `hosts` names each rank's host."""
    hosts = hosts or "a" * len(taken)
    return [
        RankView(rank, host, "is taken" if mark == "x" else "")
        for rank, (mark, host) in enumerate(zip(taken, hosts, strict=True))
    ]


@pytest.mark.parametrize(
    ("args", "number"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}, 6),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, 4),
    ],
)
def test_number_of_ranks_is_the_product_of_the_sizes(args, number):
    assert num_ranks(spec("a", **args)) == number


def test_tensor_parallel_size_follows_the_ranks():
    assert complete(spec("a", [3, 1])).engine_args == {"tensor_parallel_size": 2}
    assert complete(spec("a", 4)).engine_args == {"tensor_parallel_size": 4}
    assert complete(spec("a")).engine_args == {}
    wanted = spec("a", 4, pipeline_parallel_size=4)
    assert complete(wanted) is wanted


def test_ranks_and_sizes_that_disagree_are_both_named():
    with pytest.raises(CommandRejected) as rejected:
        complete(spec("a", [0, 1, 2], tensor_parallel_size=2))
    assert "3 rank(s)" in str(rejected.value)
    assert "tensor_parallel_size=2 needs 2" in str(rejected.value)


@pytest.mark.parametrize(
    ("count", "taken", "hosts", "chosen"),
    [
        (1, "....", "", [0]),
        (2, "x...", "", [2, 3]),  # aligned before lowest
        (2, "x..x", "", [1, 2]),  # contiguous before scattered
        (2, ".x.x", "", [0, 2]),
        (2, "....", "abbb", [2, 3]),  # one host before lowest
        (2, ".x..", "abab", [0, 2]),  # one host before contiguous over two
        (3, "....", "aabb", [0, 1, 2]),
        (4, "xxxx....", "", [4, 5, 6, 7]),
        (2, "x.xx..", "aaabbb", [4, 5]),
    ],
)
def test_choice_by_count(count, taken, hosts, chosen):
    wanted = spec("a", tensor_parallel_size=count)
    assert choose_ranks(wanted, views(taken, hosts)) == chosen


def test_listed_ranks_keep_their_order():
    assert choose_ranks(spec("a", [3, 1]), views("....")) == [3, 1]


def test_refusal_names_the_ranks_in_the_way():
    with pytest.raises(CommandRejected, match=r"rank 1 is taken; rank 2 is taken"):
        choose_ranks(spec("a", [0, 1, 2]), views(".xx."))
    with pytest.raises(CommandRejected, match=r"needs 3 .* 2 of 4 .*rank 1 is taken"):
        choose_ranks(spec("a", tensor_parallel_size=3), views(".x.x"))


def placed(name: str, *ranks: int, **args: object) -> Placement:
    return Placement(complete(spec(name, list(ranks), **args)), list(ranks))


def resident(name: str, *ranks: int, is_awake: bool = True, **args: object) -> Resident:
    return Resident(placed(name, *ranks, **args), is_awake)


def wanted(*specs) -> list:
    return [complete(each) for each in specs]


def test_equal_engine_is_kept_where_it_is():
    plan = plan_layout([resident("a", 2, 3)], wanted(spec("a", 2)), views("...."))
    assert plan == LayoutPlan(keep=["a"], unload=[], load=[], wake_up=[], sleep=[])


@pytest.mark.parametrize(
    "change",
    [
        spec("a", [1, 0]),
        spec("a", [2, 3]),
        spec("a", 2, dtype="half"),
        spec("a", 1),
    ],
)
def test_changed_engine_is_loaded_anew(change):
    plan = plan_layout([resident("a", 0, 1)], wanted(change), views("...."))
    assert plan.keep == []
    assert plan.unload == ["a"]
    assert [p.spec.name for p in plan.load] == ["a"]


def test_default_sizes_spelled_out_are_no_change():
    asked = spec("a", pipeline_parallel_size=1)
    plan = plan_layout([resident("a", 0)], wanted(asked), views("...."))
    assert plan.keep == ["a"]


def test_ranks_of_what_goes_are_free_for_what_comes():
    plan = plan_layout(
        [resident("a", 0, 1), resident("b", 2)],
        wanted(spec("c", [1, 0]), spec("b"), spec("d")),
        views("...."),
    )
    assert plan.keep == ["b"]
    assert plan.unload == ["a"]
    assert [(p.spec.name, p.ranks) for p in plan.load] == [("c", [1, 0]), ("d", [3])]


def test_listed_ranks_are_given_out_before_counted_ones():
    plan = plan_layout(
        [], wanted(spec("one"), spec("two", 2), spec("fixed", [0])), views("....")
    )
    assert {p.spec.name: p.ranks for p in plan.load} == {
        "one": [1],
        "two": [2, 3],
        "fixed": [0],
    }
    assert [p.spec.name for p in plan.load] == ["one", "two", "fixed"]


def test_empty_layout_unloads_everything():
    plan = plan_layout([resident("a", 0), resident("b", 1)], [], views(".."))
    assert plan == LayoutPlan(keep=[], unload=["a", "b"], load=[], wake_up=[], sleep=[])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((spec("b"), spec("b")), "names b twice"),
        ((spec("b", [0]), spec("c", [0])), "rank 0 is asked for by 'b'"),
        ((spec("a", 1), spec("c", [0])), "rank 0 is asked for by 'a'"),
        ((spec("b", 4), spec("c")), "0 of 4 are free"),
    ],
)
def test_layout_that_does_not_fit(asked, says):
    with pytest.raises(CommandRejected, match=says):
        plan_layout([resident("a", 0)], wanted(*asked), views("...."))
