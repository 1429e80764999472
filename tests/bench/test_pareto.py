"""The front of TTFT against TPOT, as `benchmarks/pareto.py` finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pareto


def test_front_keeps_what_nobody_dominates() -> None:
    rows = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.0, 4.0), "d": (5.0, 1.0), "e": (6.0, 6.0)}
    points = [pareto.Point(name, *row) for name, row in rows.items()]
    assert [p.name for p in pareto.front(points)] == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("ttft", "tpot", "expected"),
    [(1.5, 1.5, True), (0.5, 9.0, True), (2.0, 2.0, False), (3.0, 2.0, False), (2.5, 1.9, True)],
)
def test_outside_is_strict(ttft: float, tpot: float, expected: bool) -> None:
    others = [pareto.Point("x", 2.0, 2.0), pareto.Point("y", 1.0, 4.0)]
    assert pareto.outside(pareto.Point("ours", ttft, tpot), others) is expected


def test_several_files_are_compared_by_their_own_vllm(tmp_path: Path) -> None:
    paths = []
    for index, (base, other) in enumerate(((10.0, 5.0), (20.0, 30.0))):
        arms = {
            name: {"ttft_ms": {"mean": value, "p99": 2 * value}, "tpot_ms": {"mean": value}}
            for name, value in (("vllm", base), ("budget-128", other))
        }
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(json.dumps({"arms": arms}))
    both = {p.name: (p.ttft, p.tpot) for p in pareto.read(paths, "mean")}
    assert both == {"vllm": (1.0, 1.0), "budget-128": (1.0, 1.0)}  # the mean of 0.5 and 1.5
    one = {p.name: p.ttft for p in pareto.read(paths[:1], "p99")}
    assert one == {"vllm": 20.0, "budget-128": 10.0}
    assert [p.name for p in pareto.read(paths, "mean", ["budget-128"])] == ["vllm"]
