"""What the effect tests run in processes of their own, with real vLLM on CPU.

    python -m tests.patches.scenarios NAME REPORT MODEL [MODEL ...]

Each scenario activates the overlay, does its work and writes what it saw to REPORT, as
JSON (under torchrun, one file per rank).
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "dtype": "float32",
}
PROMPTS = ["hello world", "the quick brown fox", "a", "fox " * 20]
MAX_TOKENS = 16


def plain(models: list[str]) -> dict[str, Any]:
    """The installed vLLM's tokens; no overlay."""
    from vllm import LLM

    llm = LLM(models[0], **ENGINE_ARGS)
    return {"tokens": _tokens(llm), "file": inspect.getfile(LLM)}


def defaults(models: list[str]) -> dict[str, Any]:
    """The overlay with no flag set: vLLM as it always was."""
    _activate({})
    children = _count_children()
    from vllm import LLM, envs

    with _Counted() as counts:
        llm = LLM(models[0], **ENGINE_ARGS)
        tokens = _tokens(llm)
        llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": tokens,
        "counts": counts,
        "children": children,
        "flags": [envs.VLLM_RESIDENT_PROCESS, envs.VLLM_INSPECT_MODELS_IN_PROCESS],
        "sources": _sources(),
    }


def resident(models: list[str]) -> dict[str, Any]:
    """One engine after another in a process that owns its heap and its worlds."""
    from vllm_resident.patching import FLAGS

    activation = _activate(FLAGS)
    children = _count_children()
    import torch.distributed as dist
    from vllm.distributed import parallel_state
    from vllm.distributed.parallel_state import ParallelState
    from vllm.engine.arg_utils import EngineArgs
    from vllm.triton_utils import dispatcher
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.uniproc_executor import (
        ExecutorWithExternalLauncher,
        ExternalRendezvous,
    )

    walks: Counter[str] = Counter()
    rebind = dispatcher._rebind_kernels

    def counted_rebind(overrides: Any) -> None:
        walks["rebind"] += 1
        rebind(overrides)

    dispatcher._rebind_kernels = counted_rebind
    look_ups = _count_look_ups()
    turns = _count_turns()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    gc.freeze()
    engines = []
    for model in models:
        with ParallelState() as state, _Counted() as counts:
            config = EngineArgs(
                model, distributed_executor_backend="external_launcher", **ENGINE_ARGS
            ).create_engine_config()
            # RANK and LOCAL_RANK are not in the environment: the object says them.
            meet = ExternalRendezvous(rank=0, local_rank=0, init_method="env://:x")
            llm = LLMEngine(
                config,
                partial(ExecutorWithExternalLauncher, rendezvous=meet),
                log_stats=False,
            )
            llm.engine_core._finalizer.detach()
            start_look_ups = dict(look_ups)
            look_ups.clear()
            core = llm.engine_core.engine_core
            kv_cache = core.model_executor.driver_worker.model_runner.kv_caches[0]
            kv_start = _resident_share(kv_cache)
            tokens = _generate(llm)
            kv_used = _resident_share(kv_cache)
            del kv_cache
            model_ref = weakref.ref(core.model_executor.driver_worker.get_model())
            executor_ref = weakref.ref(core.model_executor)
            executor = core.model_executor
            core.shutdown()
            executor.shutdown()
            core.shutdown()
            state.close()
        del llm, config, executor
        engines.append(
            {
                "tokens": tokens,
                "counts": dict(counts),
                "frozen": gc.get_freeze_count(),
                "look_ups": start_look_ups,
                "kv_resident": [kv_start, kv_used],
            }
        )
        gc.collect()
        engines[-1]["model_dead"] = model_ref() is None
        engines[-1]["executor_dead"] = executor_ref() is None
        engines[-1]["core_holds_executor"] = core.model_executor is not None
        engines[-1]["tp_group_after"] = repr(parallel_state._TP)
    return {
        "engines": engines,
        "children": children,
        "walks": walks["rebind"],
        "turns": turns["taken"],
        "seconds": activation.seconds,
        "default_group_alive": dist.is_initialized(),
    }


def states(models: list[str]) -> dict[str, Any]:
    """Two parallel states beside each other and beside the process's own."""
    del models
    _activate({})
    import torch
    import torch.distributed as dist
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as ps

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seen: dict[str, Any] = {}
    with set_current_vllm_config(VllmConfig()):
        ps.init_distributed_environment(1, 0, "env://", 0, "gloo")
        own = ps.get_world_group()
        first, second = ps.ParallelState(), ps.ParallelState()
        for state in (first, second):
            with state:
                os.environ["VLLM_DIST_IDENT"] = "states"
                ps.set_custom_all_reduce(state is second)
                ps.init_distributed_environment(1, 0, "env://", 0, "gloo")
                ps.initialize_model_parallel(1, 1)
    with first:
        seen["names"] = [ps.get_world_group().unique_name]
        seen["names"].append(ps.get_tp_group().unique_name)
        groups = [ps.get_tp_group()]
        seen["custom_all_reduce"] = [ps._ENABLE_CUSTOM_ALL_REDUCE]
    seen["own"] = [repr(ps._TP), ps.get_world_group() is own, list(ps._groups)]
    with second:
        seen["names"].append(ps.get_tp_group().unique_name)
        groups.append(ps.get_tp_group())
        seen["custom_all_reduce"].append(ps._ENABLE_CUSTOM_ALL_REDUCE)
    seen["different"] = groups[0] is not groups[1]
    second.close()
    second.close()
    seen["closed"] = not hasattr(groups[1], "cpu_group")
    first.enter()
    one = torch.ones(1)
    dist.all_reduce(one, group=ps.get_tp_group().cpu_group)
    seen["first_works"] = one.item() == 1.0
    first.close()
    seen["own_after"] = [repr(ps._TP), ps.get_world_group() is own]
    seen["default_group_alive"] = dist.is_initialized()
    return seen


def pipeline(models: list[str]) -> dict[str, Any]:
    """On each of two ranks: two pipeline stages, then two tensor-parallel shards."""
    from vllm_resident.patching import FLAGS

    _activate(FLAGS)
    import torch
    import torch.distributed as dist
    from vllm import LLM
    from vllm.distributed import parallel_state as ps

    token = os.environ["SEGMENTS"]
    dist.init_process_group("gloo")
    reports: dict[str, Any] = {}
    for size in ("pipeline_parallel_size", "tensor_parallel_size"):
        os.environ["VLLM_DIST_IDENT"] = f"{token}-{size}"
        with ps.ParallelState() as state:
            llm = LLM(
                models[0],
                distributed_executor_backend="external_launcher",
                **{size: 2},
                **ENGINE_ARGS,
            )
            group = ps.get_pp_group() if "pipeline" in size else ps.get_tp_group()
            reports[size] = {
                "shares_memory": hasattr(torch.ops._C, "init_shm_manager"),
                "tokens": _tokens(llm),
                "segments": getattr(
                    group.device_communicator.dist_module, "group_name", None
                ),
                "names": _names(token),
                "mapped": _num_mapped(f"{token}-{size}"),
            }
            llm.llm_engine.engine_core.shutdown()
            del llm, group
            state.close()
        gc.collect()
    return reports


def compiled(models: list[str]) -> dict[str, Any]:
    """With torch.compile on, in one process and cache folder: a start that fails once
    the model is there, then two that do not."""
    _activate({})
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    failed: weakref.WeakSet[Any] = weakref.WeakSet()

    def fail(executor: Any) -> None:
        failed.update(executor.driver_worker.get_model().modules())
        raise RuntimeError("as asked")

    determine_available_memory = UniProcExecutor.determine_available_memory
    UniProcExecutor.determine_available_memory = fail
    try:
        LLM(models[0], **{**ENGINE_ARGS, "enforce_eager": False})
    except RuntimeError as error:
        num_built = len(failed)
        clear_frames(error.__traceback__)
    UniProcExecutor.determine_available_memory = determine_available_memory
    cleanup_dist_env_and_memory()
    gc.collect()

    starts = []
    for _ in range(2):
        llm = LLM(models[0], **{**ENGINE_ARGS, "enforce_eager": False})
        starts.append(
            {
                "tokens": _tokens(llm),
                "compiles": compilation_counter.num_aot_compiles,
                "loads": compilation_counter.num_aot_artifacts_loaded,
            }
        )
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.get_model()
        layers = weakref.WeakSet(model.modules())
        llm.llm_engine.engine_core.shutdown()
        del llm, core, model
        cleanup_dist_env_and_memory()
        gc.collect()
        starts[-1]["left"] = _names_of(layers)
    return {"starts": starts, "num_built": num_built, "left": _names_of(failed)}


def _names_of(layers: Iterable[Any]) -> list[str]:
    return sorted({type(layer).__name__ for layer in layers})


class _Counted:
    """Counts the heap's collections and freezes while entered."""

    def __enter__(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        self._originals = {
            name: getattr(gc, name) for name in ("collect", "freeze", "unfreeze")
        }
        for name, function in self._originals.items():

            def counted(*args: Any, name: str = name, call: Any = function) -> Any:
                counts[name] += 1
                return call(*args)

            setattr(gc, name, counted)
        return counts

    def __exit__(self, *exc: object) -> None:
        for name, function in self._originals.items():
            setattr(gc, name, function)


def _activate(flags: dict[str, str]) -> Any:
    from vllm_resident import patching

    os.environ.update(flags)
    return patching.activate()


def _count_children() -> list[str]:
    children: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            children.append(str(args[1]))

    sys.addaudithook(hook)
    return children


def _count_look_ups() -> Counter[str]:
    """Counts, from here on, readings of entry points and copies of tokenizers."""
    import copy
    import importlib.metadata

    from transformers import TokenizersBackend

    counts: Counter[str] = Counter()
    entry_points, deepcopy = importlib.metadata.entry_points, copy.deepcopy

    def counted_entry_points(**params: Any) -> Any:
        counts[f"entry points {params.get('group')}"] += 1
        return entry_points(**params)

    def counted_deepcopy(x: Any, memo: Any = None) -> Any:
        counts["tokenizer copies"] += isinstance(x, TokenizersBackend)
        return deepcopy(x, memo)

    importlib.metadata.entry_points = counted_entry_points
    copy.deepcopy = counted_deepcopy
    return counts


def _count_turns() -> Counter[str]:
    """Counts the turns that loading offers from here on."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    counts: Counter[str] = Counter()

    def take() -> None:
        counts["taken"] += 1

    DefaultModelLoader.before_tensor = staticmethod(take)
    return counts


def _resident_share(tensor: Any) -> float:
    """Which part of the tensor's mapping is in memory."""
    address = tensor.untyped_storage().data_ptr()
    sizes: dict[str, int] = {}
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            low, high = (int(bound, 16) for bound in name.split("-"))
            here = low <= address < high
        elif here and name in ("Size:", "Rss:"):
            sizes[name] = int(rest.split()[0])
    return sizes["Rss:"] / sizes["Size:"]


def _sources() -> dict[str, Any]:
    """What the interpreter and its tools say of a patched module's source."""
    from vllm.distributed import parallel_state
    from vllm.triton_utils import dispatcher

    return {
        "file": parallel_state.__file__,
        "class": "process's own" in inspect.getsource(parallel_state.ParallelState),
        "function": "id(value)" in inspect.getsource(dispatcher._rebind_kernels),
        "code_file": dispatcher._rebind_kernels.__code__.co_filename,
        "neighbour": Path(parallel_state.__file__).with_name("utils.py").is_file(),
        "spec": parallel_state.__spec__.name,
    }


def _tokens(llm: Any) -> list[list[int]]:
    return _generate(llm.llm_engine)


def _generate(engine: Any) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, parameters)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    return [tokens[number] for number in sorted(tokens)]


def _names(token: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").iterdir() if token in path.name]


def _num_mapped(token: str) -> int:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len([line for line in maps if token in line])


def main(scenario: str, report: str, *models: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    seen = globals()[scenario](list(models))
    path = Path(report)
    if "RANK" in os.environ:
        path = path.with_suffix(f".{os.environ['RANK']}")
    path.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
