"""Batches, streams and changes next to each other, in one engine and in several."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from tests.e2e.pools import (
    ENGINE_ARGS,
    PROMPTS,
    SAMPLING,
    meanwhile,
    pids,
    wait_until,
)
from tests.members import standing_still
from vllm_resident import AsyncClient, Client, CommandRejected, Completion

LONG = {"temperature": 0.0, "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(params=[1, 2], ids=["tp1", "tp2"])
def engine(
    request: pytest.FixtureRequest, pool: Client, checkpoints: dict[str, str]
) -> str:
    pool.load("m", checkpoints["llama"], ranks=request.param, **ENGINE_ARGS)
    return "m"


def test_a_batch_and_a_stream_run_together(engine: str, pool: Client) -> None:
    """The stream is admitted while the batch runs, ends before it, and neither
    changes the other's tokens."""
    alone = [c.token_ids for c in pool.generate(engine, PROMPTS, LONG)]
    # Few, so that a machine with other work has it end first as well.
    short = {**SAMPLING, "max_tokens": 4}
    alone_short = pool.generate(engine, "hello", short)[0].token_ids

    async def together() -> tuple[list[Completion], list[int], bool]:
        async with AsyncClient(pool.endpoint) as client:
            batch = asyncio.create_task(client.generate(engine, PROMPTS, LONG))
            await asyncio.sleep(0.02)  # it is asked for first
            streamed: list[int] = []
            async for piece in client.stream(engine, "hello", short):
                streamed += piece.token_ids
            is_first = not batch.done()
            return await batch, streamed, is_first

    # Where others have the cores this process may hear of both ends at once.
    for _ in range(4):
        completions, streamed, is_first = asyncio.run(together())
        assert [c.token_ids for c in completions] == alone
        assert streamed == alone_short
        if is_first:
            break
    assert is_first


def test_a_stream_comes_in_pieces_and_adds_up(engine: str, pool: Client) -> None:
    whole = pool.generate(engine, "hello world", SAMPLING)[0]
    pieces = list(pool.stream(engine, "hello world", SAMPLING))
    assert len(pieces) > 3
    assert [t for p in pieces for t in p.token_ids] == whole.token_ids
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason


def test_several_sequences_of_one_prompt(engine: str, pool: Client) -> None:
    completions = pool.generate(
        engine, ["hello", "fox"], n=3, temperature=1.0, seed=7, max_tokens=8
    )
    assert [(c.prompt_index, c.index) for c in completions] == [
        (prompt, index) for prompt in range(2) for index in range(3)
    ]
    assert len({tuple(c.token_ids) for c in completions}) > 3


def test_stop_strings_end_a_request_on_every_rank(engine: str, pool: Client) -> None:
    """The leader alone sees the stop string; its followers hear of it by plan."""
    whole = pool.generate(engine, "hello world", SAMPLING)[0]
    stop = whole.text[3]
    [stopped] = pool.generate(engine, "hello world", {**SAMPLING, "stop": [stop]})
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert pool.generate(engine, "hello world", SAMPLING)[0] == whole


def test_random_sampling_stays_in_lockstep(engine: str, pool: Client) -> None:
    """Unseeded sampling draws from each rank's own generator: they must agree."""
    for _ in range(3):
        pool.generate(engine, PROMPTS, temperature=1.0, max_tokens=32)
    assert pool.status().engines[0].phase == "ready"


def test_leaving_a_stream_aborts_its_request(engine: str, pool: Client) -> None:
    stream = pool.stream(engine, "hello", LONG)
    next(iter(stream))
    stream.close()
    wait_until(pool, lambda s: s.engines[0].num_requests == 0, 30, "the abort")
    assert pool.generate(engine, "hello", SAMPLING)


def test_a_vanished_client_is_aborted(engine: str, pool: Client) -> None:
    """A process that dies in the middle of its stream leaves no request behind."""
    script = (
        "import sys; from vllm_resident import Client\n"
        f"for _ in Client({pool.endpoint!r}).stream({engine!r}, 'hello', "
        "max_tokens=240, temperature=0, ignore_eos=True): print('piece', flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "piece\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_until(pool, lambda s: s.engines[0].num_requests == 0, 30, "the abort")
    assert pool.generate(engine, "hello", SAMPLING)


def test_unloading_ends_streams_properly(engine: str, pool: Client) -> None:
    (leader, _) = pids(pool)
    stream = iter(pool.stream(engine, "hello", LONG))
    pieces = [next(stream)]
    with meanwhile(pool, engine, leader, command=lambda: pool.unload(engine)):
        pieces += list(stream)
    assert pieces[-1].finish_reason == "abort"
    with pytest.raises(CommandRejected, match="m"):
        pool.generate(engine, "hello", SAMPLING)


def test_the_controller_is_not_kept_on_the_core_of_the_rank_that_started_it(
    pool: Client,
) -> None:
    (first, second) = (rank.pid for rank in pool.status().ranks)
    controller = os.sched_getaffinity(pool.status().controller_pid)
    assert controller == os.sched_getaffinity(0)
    assert controller >= os.sched_getaffinity(first) | os.sched_getaffinity(second)


def test_one_engine_serves_while_another_loads(
    pool: Client, checkpoints: dict[str, str], smollm2: str
) -> None:
    pool.load("serves", checkpoints["llama"], ranks=[0], **ENGINE_ARGS)
    phases: list[str] = []

    def load() -> None:
        pool.load(
            "loads",
            # The tiny ones are loaded before another answer is there.
            smollm2,
            ranks=[1],
            on_progress=lambda p: phases.append(p.phase),
            **ENGINE_ARGS,
        )

    loading = threading.Thread(target=load)
    with standing_still(pids(pool)[1]):
        loading.start()
        served_during = [
            pool.generate("serves", "hello", SAMPLING)[0].text for _ in range(2)
        ]
    while loading.is_alive():
        completion = pool.generate("serves", "hello", SAMPLING)[0]
        if loading.is_alive() and phases:
            served_during.append(completion.text)
    loading.join()
    assert "load_model" in phases
    assert len(set(served_during)) == 1
    assert pool.generate("loads", "hello", SAMPLING)
