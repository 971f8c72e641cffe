"""What ranks say of their transfers, as one report tells it."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_resident.controller import reports
from vllm_resident.messages import EngineMemory, EngineResumed


def resumed(rank: int, moved_s: float, link: float) -> EngineResumed:
    return EngineResumed(
        rank=rank, generation=3, phases={"read_weights": moved_s},
        memory_before_bytes=1, memory_after_bytes=2, memory=EngineMemory(),
        moved_bytes=100, moved_s=moved_s, link_bytes_per_s=link,
    )  # fmt: skip


def test_ranks_move_side_by_side() -> None:
    """Bytes and links add up, the slowest says how long it took."""
    engine = SimpleNamespace(
        name="a",
        generation=3,
        ranks=[0, 1],
        motion_began=10.0,
        sleep_level=0,
        resumed={0: resumed(0, 0.5, 300.0), 1: resumed(1, 0.25, 500.0)},
    )
    switch = SimpleNamespace(started=9.0)
    report = reports.wake_report(engine, switch, 11.0)  # type: ignore[arg-type]
    assert (report.moved_bytes, report.moved_s) == (200, 0.5)
    assert report.link_bytes_per_s == 800.0
    # 200 bytes in half a second, of 800 a second.
    assert report.moved_bytes / report.moved_s / report.link_bytes_per_s == 0.5
