"""Any model to any other, any layout to any other, in processes that stay the same."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.at_rest import ranks_at_rest
from tests.e2e.pools import (
    ARCHITECTURES,
    ENGINE_ARGS,
    PROMPTS,
    SAMPLING,
    eventually,
)
from vllm_resident import Client, EngineSpec
from vllm_resident.messages import RankStatus

Reference = Callable[[str], list[list[int]]]


def tokens(pool: Client, engine: str) -> list[list[int]]:
    return [each.token_ids for each in pool.generate(engine, PROMPTS, SAMPLING)]


def spec(
    name: str, model: str, ranks: list[int], checkpoints: dict[str, str]
) -> EngineSpec:
    return EngineSpec(name, checkpoints[model], ranks, ENGINE_ARGS)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_tokens_equal_plain_vllm_at_tp1_and_tp2(
    model: str, pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    expected = reference(model)
    pool.apply([spec("one", model, [1], checkpoints)])
    assert tokens(pool, "one") == expected
    pool.apply([spec("two", model, [0, 1], checkpoints)])
    assert tokens(pool, "two") == expected


def test_a_checkpoint_written_anew_is_read_anew(
    pool: Client, checkpoints: dict[str, str], reference: Reference, tmp_path: Path
) -> None:
    """Under one name: another model, then another tokenizer."""
    folder = tmp_path / "model"

    def load(model: str) -> None:
        shutil.copytree(checkpoints[model], folder, dirs_exist_ok=True)
        pool.apply([])
        pool.load("same", str(folder), ranks=[0], **ENGINE_ARGS)

    for model in ("qwen2", "llama"):
        load(model)
        assert tokens(pool, "same") == reference(model)
    for_b = pool.generate("same", "b", SAMPLING)[0].token_ids
    assert pool.generate("same", "a", SAMPLING)[0].token_ids != for_b
    pool.unload("same")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    pool.load("same", str(folder), ranks=[0], **ENGINE_ARGS)
    assert pool.generate("same", "a", SAMPLING)[0].token_ids == for_b


def assert_given_back(before: list[RankStatus], pool: Client) -> None:
    def check() -> None:
        for was, now in zip(before, ranks_at_rest(pool), strict=True):
            assert now.pid == was.pid
            assert now.incarnation == was.incarnation
            assert now.num_file_descriptors <= was.num_file_descriptors
            assert now.num_threads <= was.num_threads
            assert now.num_shm_segments <= was.num_shm_segments
            assert now.memory_used_bytes <= 1.10 * was.memory_used_bytes

    eventually(check)


def change_layouts(
    pool: Client, checkpoints: dict[str, str], reference: Reference, num_changes: int
) -> None:
    """Random layouts one after another; what each generates is checked."""
    choose = random.Random(num_changes)
    for change in range(num_changes):
        first, second = choose.sample(ARCHITECTURES, 2)
        layout = (
            [spec(f"both-{change}", first, [0, 1], checkpoints)]
            if choose.random() < 0.5
            else [
                spec(f"left-{change}", first, [0], checkpoints),
                spec(f"right-{change}", second, [1], checkpoints),
            ]
        )
        pool.apply(layout)
        for engine, model in zip(layout, (first, second), strict=False):
            assert tokens(pool, engine.name) == reference(model), (change, engine)


def warm(pool: Client, checkpoints: dict[str, str]) -> None:
    """Let each architecture leave in the process what it leaves only once: its
    module's code, compiled helpers, thread pools."""
    for model in ARCHITECTURES:
        pool.apply([spec("warm", model, [0, 1], checkpoints)])
        tokens(pool, "warm")
        pool.apply([spec(f"w{rank}", model, [rank], checkpoints) for rank in (0, 1)])
        tokens(pool, "w0")
        tokens(pool, "w1")
    pool.apply([])


@pytest.mark.timeout(600)
def test_ten_random_layout_changes_leave_nothing_behind(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    warm(pool, checkpoints)
    before = ranks_at_rest(pool)
    change_layouts(pool, checkpoints, reference, 10)
    pool.apply([])
    assert_given_back(before, pool)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_random_layout_changes_leave_nothing_behind(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    warm(pool, checkpoints)
    before = ranks_at_rest(pool)
    change_layouts(pool, checkpoints, reference, 100)
    pool.apply([])
    assert_given_back(before, pool)


def test_apply_leaves_alone_what_is_already_as_asked(
    pool: Client, checkpoints: dict[str, str]
) -> None:
    left = spec("left", "llama", [0], checkpoints)
    pool.apply([left, spec("right", "qwen2", [1], checkpoints)])
    generation = {e.name: e.generation for e in pool.status().engines}["left"]
    report = pool.apply([left, spec("other", "opt", [1], checkpoints)])
    assert report.kept == ["left"]
    assert sorted((e.name, e.action) for e in report.engines) == [
        ("other", "load"),
        ("right", "sleep"),
        ("right", "unload"),
    ]
    assert {e.name: e.generation for e in pool.status().engines}["left"] == generation


def test_reports_account_for_the_time(
    pool: Client, checkpoints: dict[str, str]
) -> None:
    report = pool.load("a", checkpoints["llama"], ranks=2, **ENGINE_ARGS)
    assert sum(report.phases.values()) == pytest.approx(report.seconds, rel=0.25)
    [engine] = report.engines
    assert engine.ranks == [0, 1]
    assert set(engine.memory_after_bytes) == {0, 1}
    assert {"prepare", "form_world", "load_model", "kv_cache"} <= set(engine.phases)


def test_a_pipeline_over_two_ranks_gives_the_same_tokens(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    pool.load("pp", checkpoints["llama"], pipeline_parallel_size=2, **ENGINE_ARGS)
    assert tokens(pool, "pp") == reference("llama")
    streamed = [
        token
        for piece in pool.stream("pp", PROMPTS[0], SAMPLING)
        for token in piece.token_ids
    ]
    assert streamed == reference("llama")[0]


def test_real_text_over_two_pipeline_stages(pool: Client, smollm2: str) -> None:
    """SmolLM2's nine heads rule TP=2 out; PP=2 gives the text that one rank gives."""
    texts = []
    for size in (1, 2):
        pool.load("chat", smollm2, pipeline_parallel_size=size, **ENGINE_ARGS)
        (completion,) = pool.generate(
            "chat", "The capital of France is", temperature=0.0, max_tokens=12
        )
        texts.append(completion.text)
        pool.unload("chat")
    assert texts[0].startswith(" Paris")
    assert texts[1] == texts[0]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_hundred_switches_leave_nothing_behind(
    pool: Client, checkpoints: dict[str, str], reference: Reference
) -> None:
    """Between three models of different architecture, unloaded and loaded each time."""
    models = ("llama", "qwen3", "opt")
    at_thirty: list[RankStatus] = []
    for number in range(300):
        model = models[number % 3]
        pool.apply([spec(f"{model}-{number % 2}", model, [0, 1], checkpoints)])
        assert tokens(pool, f"{model}-{number % 2}") == reference(model), number
        if number == 29:
            at_thirty = ranks_at_rest(pool)

    def check() -> None:
        for was, now in zip(at_thirty, ranks_at_rest(pool), strict=True):
            assert now.pid == was.pid
            assert now.num_file_descriptors <= was.num_file_descriptors
            assert now.num_threads <= was.num_threads
            assert now.num_shm_segments == was.num_shm_segments
            assert now.num_process_groups == was.num_process_groups
            assert now.num_engines == was.num_engines == 1
            assert now.memory_used_bytes <= 1.03 * was.memory_used_bytes

    eventually(check)
