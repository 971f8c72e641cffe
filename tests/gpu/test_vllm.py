"""Tier two: real engines in a pool on real devices, CUDA graphs on.

Two models that are loaded, switched, put to sleep, woken and unloaded; tokens are
compared with plain vLLM in a fresh process, memory with what the device had before.
The models are small random ones (examples/checkpoints.py); for figures that mean
something, name two real ones in VLLM_RESIDENT_GPU_MODELS, separated by a comma.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_resident.rank.device import Device

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

from benchmarks.at_rest import ranks_at_rest
from tests.e2e.pools import (
    PROMPTS,
    SAMPLING,
    run_repo_python,
    running_pool,
)
from vllm_resident import Client, RankFailure, ReleaseIncomplete
from vllm_resident.messages import EngineReport, SwitchReport

MODELS_VARIABLE = "VLLM_RESIDENT_GPU_MODELS"
# Graphs of a few sizes: captured, but not for minutes.
ENGINE_ARGS: dict[str, Any] = {
    "max_model_len": 256,
    "dtype": "bfloat16",
    "gpu_memory_utilization": 0.3,
    "cudagraph_capture_sizes": [1, 2, 4, 8],
    "seed": 0,
}
# Beyond the first engine of a process: kernels and workspaces of libraries stay.
MAX_LEFT_BYTES = 512 * 2**20
NUM_CYCLES = 5

_PLAIN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
model, engine_args, prompts, sampling = json.loads(sys.argv[1])
llm = LLM(model, **engine_args)
outputs = llm.generate(prompts, SamplingParams(**sampling))
tokens = [list(output.outputs[0].token_ids) for output in outputs]
sys.stdout.write("TOKENS " + json.dumps(tokens) + chr(10))
sys.stdout.flush()
os._exit(0)
"""

pytestmark = pytest.mark.timeout(1800) if "pytest_timeout" in sys.modules else []


@pytest.fixture(scope="module")
def models() -> list[str]:
    if named := os.environ.get(MODELS_VARIABLE):
        first, second = named.split(",")
        return [first, second]
    done = run_repo_python(
        "-m", "examples.checkpoints", "llama-42m", "qwen3", timeout_s=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def plain(models: list[str]) -> dict[str, list[list[int]]]:
    """What plain vLLM in a fresh process says, before any pool has the device."""
    tokens = {}
    for model in models:
        request = json.dumps([model, ENGINE_ARGS, PROMPTS, SAMPLING])
        done = subprocess.run(
            [sys.executable, "-c", _PLAIN, request],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        lines = [x for x in done.stdout.splitlines() if x.startswith("TOKENS ")]
        assert lines, done.stderr[-4000:]
        tokens[model] = json.loads(lines[0].removeprefix("TOKENS "))
    return tokens


@pytest.fixture(scope="module")
def client(plain: dict[str, list[list[int]]], num_devices: int) -> Iterator[Client]:
    with (
        tempfile.TemporaryDirectory(prefix="vr-gpu-") as folder,
        running_pool("gpu", Path(folder), num_ranks=min(2, num_devices)) as connected,
    ):
        yield connected


def load(client: Client, name: str, model: str, **engine_args: Any) -> EngineReport:
    """On the first device."""
    report = client.load(
        name, model, ranks=[0], timeout_s=900, **{**ENGINE_ARGS, **engine_args}
    )
    return part(report, name)


def part(report: SwitchReport, name: str) -> EngineReport:
    return next(each for each in report.engines if each.name == name)


def tokens_of(client: Client, name: str) -> list[list[int]]:
    done = client.generate(name, PROMPTS, SAMPLING)
    return [completion.token_ids for completion in done]


def used_bytes(client: Client) -> int:
    return sum(rank.memory_used_bytes for rank in ranks_at_rest(client))


def rate(report: EngineReport) -> dict[str, float]:
    """In GB/s, and of the link."""
    speed = report.moved_bytes / report.moved_s if report.moved_s else 0.0
    link = report.link_bytes_per_s
    return {
        "moved_gib": report.moved_bytes / 2**30,
        "gb_per_s": speed / 1e9,
        "of_link": speed / link if link else 0.0,
    }


@pytest.fixture(autouse=True)
def nothing_left(client: Client) -> Iterator[None]:
    yield
    for engine in client.status().engines:
        client.unload(engine.name)


def test_load_sleep_wake_unload(
    client: Client,
    models: list[str],
    plain: dict[str, list[list[int]]],
    figure: Callable[..., None],
) -> None:
    model = models[0]
    loaded = load(client, "first", model)
    assert tokens_of(client, "first") == plain[model]
    awake = used_bytes(client)
    slept = part(client.sleep("first"), "first")
    asleep = used_bytes(client)
    woken = part(client.wake_up("first"), "first")
    assert tokens_of(client, "first") == plain[model]
    again = part(client.sleep("first"), "first")
    client.wake_up("first")
    assert tokens_of(client, "first") == plain[model]
    client.sleep("first", level=2)
    read = part(client.wake_up("first"), "first")
    assert tokens_of(client, "first") == plain[model]
    figure(
        load_s=loaded.seconds,
        sleep_s=again.seconds,
        wake_up_s=woken.seconds,
        wake_up_from_level_2_s=read.seconds,
        freed_gib=(awake - asleep) / 2**30,
        first_sleep=rate(slept),
        sleep=rate(again),
        wake_up=rate(woken),
    )
    assert slept.moved_bytes > 0
    # The KV cache as well as the weights.
    assert awake - asleep > slept.moved_bytes


def test_switch_and_back(
    client: Client,
    models: list[str],
    plain: dict[str, list[list[int]]],
    figure: Callable[..., None],
) -> None:
    first, second = models
    load(client, "first", first)
    client.sleep("first")
    load(client, "second", second)
    assert tokens_of(client, "second") == plain[second]
    reports = []
    for _ in range(NUM_CYCLES):
        for old, new, model in (
            ("second", "first", first),
            ("first", "second", second),
        ):
            reports.append(client.switch(old, new))
            assert tokens_of(client, new) == plain[model]
    figure(
        switch_s=[round(report.seconds, 4) for report in reports],
        unavailable_s=[round(report.unavailable_s, 4) for report in reports],
        wake_up=rate(part(reports[-1], "second")),
    )


def test_an_engine_is_loaded_beside_a_sleeper_and_unloaded_alone(
    client: Client, models: list[str], plain: dict[str, list[list[int]]]
) -> None:
    """Also the other way: a sleeper is unloaded while another serves."""
    first, second = models
    load(client, "first", first)
    client.sleep("first")
    load(client, "second", second)
    client.unload("second")
    client.wake_up("first")
    assert tokens_of(client, "first") == plain[first]
    client.sleep("first")
    load(client, "second", second)
    client.unload("first")
    assert tokens_of(client, "second") == plain[second]


def test_memory_is_back_after_each_unload(
    client: Client, models: list[str], figure: Callable[..., None]
) -> None:
    """The first load of all brings what stays; each that follows leaves what it found
    (`ReleaseIncomplete` would fail the unload)."""
    used = []
    try:
        for number in range(NUM_CYCLES):
            load(client, "first", models[number % 2])
            client.unload("first")
            used.append(used_bytes(client))
    except ReleaseIncomplete as error:
        pytest.fail(f"after {len(used)} cycles: {error}")
    figure(left_mib=[(each - used[0]) / 2**20 for each in used])
    assert max(used[1:]) - used[0] < MAX_LEFT_BYTES


def test_worlds_of_two_devices_are_formed_and_closed_again(
    client: Client,
    models: list[str],
    plain: dict[str, list[list[int]]],
    num_devices: int,
    figure: Callable[..., None],
) -> None:
    """A real collective world, beside and after worlds of one rank each."""
    if num_devices < 2:
        pytest.skip("needs two devices")
    load(client, "first", models[0])
    client.sleep("first")
    seconds, used, wides = [], [], []
    for _ in range(NUM_CYCLES):
        report = client.load(
            "wide",
            models[1],
            ranks=[0, 1],
            timeout_s=900,
            **{**ENGINE_ARGS, "tensor_parallel_size": 2},
        )
        seconds.append(part(report, "wide").phases["form_world"])
        wide = tokens_of(client, "wide")
        client.sleep("wide")
        client.wake_up("wide")
        assert tokens_of(client, "wide") == wide
        wides.append(wide)
        client.unload("wide")
        used.append(used_bytes(client))
    # The first made the communicators that the others took.
    assert wides == wides[:1] * NUM_CYCLES
    client.wake_up("first")
    assert tokens_of(client, "first") == plain[models[0]]
    figure(
        form_world_s=[round(each, 4) for each in seconds],
        left_mib=[(each - used[0]) / 2**20 for each in used],
    )
    assert max(used[1:]) - used[0] < MAX_LEFT_BYTES


def test_a_load_that_cannot_fit_is_refused_and_nothing_is_lost(
    client: Client,
    models: list[str],
    plain: dict[str, list[list[int]]],
    device: Device,
) -> None:
    load(client, "first", models[0])
    client.sleep("first")
    total = device.memory()[1]
    with pytest.raises(RankFailure, match=r"bytes of the device .* are free"):
        load(client, "second", models[1], kv_cache_memory_bytes=total)
    client.wake_up("first")
    assert tokens_of(client, "first") == plain[models[0]]
