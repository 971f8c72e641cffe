"""The pure parts of the benchmarks: pairs, rows, the chart, what a machine says."""

from __future__ import annotations

import platform
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from benchmarks import chart, machine, pairs, switch
from benchmarks.contenders import copy_seconds, phases_of
from benchmarks.rows import (
    Heading,
    Row,
    Sample,
    as_json,
    disagreement,
    ratio,
    rows,
    seconds_text,
    with_other,
)
from vllm_resident.messages import EngineReport, SwitchReport

SVG = "{http://www.w3.org/2000/svg}"


# ------------------------------------------------------------------ rows


def measured(name: str, *seconds: float, baseline: str = "resident") -> Row:
    samples = [Sample(name, each) for each in seconds]
    (row,) = rows([Heading(name, name, baseline)], samples)
    return row


def test_a_row_is_the_median_and_the_spread() -> None:
    document = as_json(measured("cold", 3.0, 1.0, 8.0), [measured("resident", 0.5)])
    assert document["median_s"] == 3.0
    assert (document["min_s"], document["max_s"]) == (1.0, 8.0)
    assert document["runs"] == 3
    assert document["ratio"] == 6.0


def test_rows_stand_in_the_headings_order_and_only_if_measured() -> None:
    headings = [Heading(name, name, "b") for name in ("a", "b", "c")]
    found = rows(headings, [Sample("c", 1.0), Sample("a", 2.0)])
    assert [row.name for row in found] == ["a", "c"]


def test_a_row_without_its_baseline_has_no_ratio() -> None:
    assert ratio(measured("cold", 1.0), [measured("in_process", 1.0)]) is None


def test_phases_are_medians_and_a_missing_one_is_zero() -> None:
    samples = [
        Sample("r", 1.0, {"load": 0.5, "other": 0.1}),
        Sample("r", 1.0, {"load": 0.7, "warm_up": 0.2, "other": 0.1}),
        Sample("r", 2.0, {"load": 0.6, "other": 1.0}),
    ]
    (row,) = rows([Heading("r", "r", "r")], samples)
    assert row.phases == {"load": 0.6, "other": 0.1, "warm_up": 0.0}
    assert row.accounted == pytest.approx(0.9)


def test_what_phases_leave_is_called_other() -> None:
    assert with_other({"a": 0.25, "b": 0.5}, 1.0)["other"] == 0.25
    # Two clocks may differ by a hair.
    assert with_other({"a": 1.001}, 1.0)["other"] == 0.0


def test_rows_that_did_other_work_are_found_out() -> None:
    alike = [
        Sample("cold", 1.0, {}, "llama", (5,)),
        Sample("resident", 1.0, {}, "llama", (5,)),
        Sample("resident_tiny", 1.0, {}, "qwen2", (9,)),
        Sample("memory_copy", 1.0),
    ]
    assert disagreement(alike) == ""
    found = disagreement([*alike, Sample("in_process", 1.0, {}, "llama", (6,))])
    assert "in_process" in found
    assert "cold" in found


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0432, "0.043"), (2.168, "2.17"), (17.26, "17.3")]
)
def test_seconds_are_short(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def report(action: str, **phases: float) -> SwitchReport:
    total = sum(phases.values())
    engine = EngineReport("bench", action, 1, [0], total, phases, {}, {})
    return SwitchReport(action, total, phases, [engine])


def test_phases_of_a_switch_are_all_there_once() -> None:
    unload = report("unload", release=0.1, coordinate=0.01)
    load = report("load", load_model=0.5, coordinate=0.02)
    phases = phases_of([unload, load])
    assert phases == {
        "release": 0.1, "coordinate_unload": 0.01,
        "load_model": 0.5, "coordinate": 0.02,
    }  # fmt: skip
    assert sum(phases.values()) == pytest.approx(unload.seconds + load.seconds)


# ------------------------------------------------------------------ pairs


def test_a_pair_with_a_layout() -> None:
    pair = pairs.pair("llama,qwen2@tp2pp3")
    assert (pair.measured.name, pair.other.name) == ("llama", "qwen2")
    assert pair.num_ranks == 6
    assert pair.parallel_args == {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
    }
    assert pair.title == "llama, TP=2, PP=3, 6 ranks"


def test_on_one_rank_the_layout_is_vllms_default() -> None:
    assert pairs.pair("smollm2,llama").parallel_args == {}


@pytest.mark.parametrize(
    "text",
    ["llama", "llama,", "llama,qwen2,opt", "llama,llama", "llama,qwen2@",
     "llama,qwen2@2", "llama,qwen2@tp0", "./nowhere,llama"],
)  # fmt: skip
def test_a_pair_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"llama|nowhere"):
        pairs.pair(text)


def test_suffixes_tell_pairs_apart() -> None:
    texts = ["llama,qwen2@tp2", "qwen2,opt@tp2", "opt,llama", "opt,llama@tp2pp2"]
    first = pairs.pair("smollm2,llama")
    named = pairs.name_apart(first, map(pairs.pair, texts))
    assert [pair.suffix for pair in named] == [
        "", "_tp2", "_tp2_qwen2", "_opt", "_tp2pp2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="twice"):
        pairs.name_apart(first, map(pairs.pair, [*texts, texts[1]]))


def test_tiny_models_share_a_nickname() -> None:
    assert pairs.model("qwen2").nickname == "tiny"
    assert pairs.model("some-hub/Some Model").nickname == "Some-Model"


# ------------------------------------------------------------------ the command


def test_the_default_is_one_rank_then_two() -> None:
    arguments = switch.parse_arguments([])
    assert [pair.title for pair in arguments.pairs] == [
        "smollm2, one rank",
        "llama, TP=2, 2 ranks",
    ]
    assert arguments.runs == 5
    assert not arguments.compile


def test_one_model_takes_turns_with_a_default() -> None:
    for name in ("llama", "smollm2", "opt"):
        (pair,) = switch.parse_arguments(["--model", name, "--layout"]).pairs
        assert pair.measured.name == name
        assert pair.other.name != name


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--runs", "0"], "from 1 up"),
        (["--skip", "warm"], "no row 'warm'"),
        (["--json", "no/such/folder/file"], "cannot write"),
        (["--layout", "llama"], "comma"),
        (["--model", "a", "b", "c"], "one other"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        switch.parse_arguments(options)
    assert complaint in capsys.readouterr().err


def test_the_driver_stays_without_torch() -> None:
    check = "import sys, benchmarks.switch; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], check=False, timeout=60)
    assert done.returncode == 0


# ------------------------------------------------------------------ the chart


BARS = [
    chart.Bar("restart <plain>", 17.3, 16.0, 20.0),
    chart.Bar("resident", 0.9, 0.8, 1.1, ours=True),
    chart.Bar("copy", 0.043, 0.041, 0.05),
]


def drawn(bars: list[chart.Bar], caption: str = "a machine") -> ET.Element:
    text = chart.draw("Seconds & more", [chart.Group("smollm2", bars)], caption)
    return ET.fromstring(text)


def lengths(svg: ET.Element) -> list[float]:
    found = svg.findall(f"{SVG}rect")
    return [float(r.attrib["width"]) for r in found if "bar" in r.attrib["class"]]


def test_the_chart_says_every_label_and_number() -> None:
    texts = [each.text for each in drawn(BARS).iter(f"{SVG}text")]
    for text in ("Seconds & more", "smollm2", "restart <plain>", "17.3 s", "0.043 s"):
        assert text in texts


def test_nothing_is_drawn_outside_the_card() -> None:
    words = " · ".join(["a long machine"] * 30)
    svg = drawn(BARS, words)
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for each in svg.iter():
        for name in ("x", "x1", "x2"):
            assert 0 <= float(each.attrib.get(name, 0)) < width
        for name in ("y", "y1", "y2"):
            assert 0 <= float(each.attrib.get(name, 0)) < height
    texts = " ".join(each.text or "" for each in svg.iter(f"{SVG}text"))
    assert texts.count("a long machine") == 30


def test_bars_far_apart_are_logarithmic_and_all_show() -> None:
    svg = drawn(BARS)
    assert "logarithmic" in ET.tostring(svg, "unicode")
    long, middle, short = lengths(svg)
    assert long > middle > short > 10


def test_bars_near_each_other_are_in_proportion() -> None:
    svg = drawn([chart.Bar("a", 10.0, 10.0, 10.0), chart.Bar("b", 2.5, 2.5, 2.5)])
    assert "axis from zero" in ET.tostring(svg, "unicode")
    long, short = lengths(svg)
    assert long == pytest.approx(4 * short, abs=0.2)


@pytest.mark.parametrize("high", [0.0011, 0.9, 1.0, 3.0, 9.99, 10.0, 75.0, 199.0])
def test_a_linear_axis_has_a_few_round_ticks(high: float) -> None:
    axis = chart.axis([high / 3, high])
    assert not axis.logarithmic
    assert axis.ticks[0] == 0
    assert 2 <= len(axis.ticks) - 1 <= 5
    assert axis.ticks[-1] <= high


def test_only_rows_of_a_group_are_drawn() -> None:
    headings = [Heading("resident", "ours", "resident", "g"), Heading("x", "x", "x")]
    found = rows(headings, [Sample("resident", 1.0), Sample("x", 1.0)])
    (group,) = switch.groups(found)
    assert [(bar.label, bar.ours) for bar in group.bars] == [("ours", True)]


# ------------------------------------------------------------------ the machine


def test_a_machine_is_named_by_its_parts_not_by_its_name() -> None:
    line = machine.describe(machine.hardware(), machine.versions())
    assert platform.node() not in line.split()
    assert "/" not in line
    assert "python" in line


def test_proc_is_read() -> None:
    assert (
        machine.cpu_model("flags: x\nmodel name\t: EPYC 1\nmodel name: 2") == "EPYC 1"
    )
    assert machine.memory_gib("MemTotal:       25165824 kB\n") == 24.0


def test_a_large_copy_is_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contenders.COPY_BYTES", 1 << 20)
    assert 0 < copy_seconds(1 << 40) < 86_400
