"""The names that are public, and what importing them may not bring along."""

import subprocess
import sys

import vllm_resident


def test_every_public_name_is_there_once_and_sorted() -> None:
    names = vllm_resident.__all__
    assert names == sorted(set(names))
    for name in names:
        assert getattr(vllm_resident, name).__doc__, f"{name} has no docstring"


def test_nothing_else_looks_public() -> None:
    modules = {"client", "config", "errors", "messages", "transport"}
    visible = {
        name
        for name, value in vars(vllm_resident).items()
        if not name.startswith("_") and isinstance(value, type)
    }
    assert visible - modules == set(vllm_resident.__all__)


def test_every_error_of_the_tree_is_public() -> None:
    def tree(cls: type[Exception]) -> set[str]:
        below = {name for sub in cls.__subclasses__() for name in tree(sub)}
        return below | {cls.__name__}

    assert tree(vllm_resident.ResidentError) <= set(vllm_resident.__all__)


def test_importing_brings_neither_torch_nor_vllm() -> None:
    code = """if True:
        import sys
        import vllm_resident
        import vllm_resident.cli, vllm_resident.client, vllm_resident.config
        import vllm_resident.doctor, vllm_resident.launch, vllm_resident.shm
        heavy = {"torch", "torch_npu", "vllm", "numpy", "transformers"}
        print(sorted(heavy & set(sys.modules)))
    """
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert out.stdout.strip() == "[]"
