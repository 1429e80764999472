"""The reproduction: resumable cells, invalidation, losses, and the command."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from gimbal.commands import reproduce as command
from gimbal.core.errors import InputError
from gimbal.report import arms
from gimbal.workloads.load import data_directories
from reproduction import matrix as reproduce
from reproduction import paper
from reproduction.matrix import Matrix, Task

SMALL = Matrix(("today",), ("random",), (0.9,), ("vllm", "gimbal-dp"), 1, 30, "", 200)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": i * 0.05, "prompt_tokens": 60 + 41 * i % 700, "output_tokens": 2 + i % 9}
        for i in range(250)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def matrix(trace, **changes):
    return dataclasses.replace(SMALL, trace=trace, **changes)


def files(directory):
    return {p.name: p.stat().st_mtime_ns for p in (directory / "cells").iterdir()}


def test_a_stopped_run_continues_and_gives_the_same(trace, tmp_path):
    whole = list(reproduce.run_matrix(matrix(trace), tmp_path / "whole", 1))
    interrupted = reproduce.run_matrix(matrix(trace), tmp_path / "cut", 1)
    for _ in range(2):
        next(interrupted)
    interrupted.close()
    kept = files(tmp_path / "cut")
    assert 0 < len(kept) < len(whole)
    (tmp_path / "cut" / "cells" / "left.123.tmp").write_text('{"half": ')
    seen = []
    rest = list(reproduce.run_matrix(matrix(trace), tmp_path / "cut", 1, lambda *n: seen.append(n)))
    assert [r for _, r in rest] == [r for _, r in whole]
    after = files(tmp_path / "cut")
    assert {name: after[name] for name in kept} == kept
    assert seen[-1] == (len(whole), len(whole))


def test_a_changed_definition_runs_only_its_own_cells_again(trace, tmp_path, monkeypatch):
    list(reproduce.run_matrix(matrix(trace), tmp_path, 1))
    before = files(tmp_path)
    own = arms.get_arm("gimbal-dp")
    changed = dataclasses.replace(own, config={**own.config, "queue": {"ordering": "sjf"}})
    monkeypatch.setitem(arms.ARMS, "gimbal-dp", changed)
    list(reproduce.run_matrix(matrix(trace), tmp_path, 1))
    new = set(files(tmp_path)) - set(before)
    assert len(new) == 1
    assert "gimbal-dp" in next(iter(new))


@pytest.mark.parametrize(
    "change", [{"load": 0.8}, {"seed": 1001}, {"requests": 31}, {"capacity_rps": 9.0}]
)
def test_a_cell_is_named_after_everything_that_defines_it(trace, change):
    task = Task("d", trace, "today", "random", 30, "vllm", 0.9, 1000, 10.0)
    assert dataclasses.replace(task, **change).path != task.path
    assert dataclasses.replace(task, directory="e").path.name == task.path.name


def test_tuning_seeds_are_not_reported(trace, tmp_path):
    full = Matrix()
    reported = {reproduce.FIRST_SEED + i for i in range(full.seeds)}
    tuned = {task.seed for task in reproduce.capacity_tasks(full, tmp_path)}
    assert not reported & tuned
    assert full.seeds >= 5
    assert (full.loads[0], full.loads[-1], len(full.distributions)) == (0.3, 1.2, 5)


def cell(ttft, tpot=10.0, p99=None, rate=5.0):
    return {
        "ttft_mean_ms": ttft,
        "tpot_mean_ms": tpot,
        "ttft_p99_ms": p99 or 3 * ttft,
        "throughput_rps": rate,
    }


def cells(**arms):
    return {
        name.replace("_", "-"): {("today", "random", 0.9, s): v for s, v in enumerate(values)}
        for name, values in arms.items()
    }


def judged(**arms):
    rows = paper.comparisons(cells(**arms))
    return {(row["baseline"], row["metric"]): row for row in rows}


def test_losses_are_found_in_the_right_direction_worst_first():
    rows = judged(
        gimbal=[cell(90, tpot=11, rate=4.5), cell(80, tpot=10.9, rate=4.51)],
        vllm=[cell(100), cell(100)],
        vllm_legacy=[cell(85), cell(85)],
    )
    assert rows["vllm", "ttft_mean_ms"]["verdict"] == "even", "two seeds that far apart"
    assert rows["vllm", "tpot_mean_ms"]["verdict"] == "lost"
    assert rows["vllm", "throughput_rps"]["verdict"] == "lost"
    found = [(row["metric"], row["verdict"]) for row in paper.losses(rows.values())]
    assert found[:4] == [("throughput_rps", "lost")] * 2 + [("tpot_mean_ms", "lost")] * 2
    assert ("ttft_mean_ms", "even") not in found, "the mean of 90 and 80 is just below 85"


def test_a_win_and_an_even_comparison_are_no_losses():
    rows = judged(
        gimbal=[cell(50), cell(51), cell(49)],
        vllm=[cell(100)] * 3,
        vllm_legacy=[cell(50.01), cell(51.01), cell(49.01)],
    )
    assert rows["vllm", "ttft_mean_ms"]["verdict"] == "won"
    assert rows["vllm-legacy", "ttft_mean_ms"]["verdict"] == "even", "under a thousandth"
    assert paper.losses(rows.values()) == []


def test_one_seed_gives_no_verdict():
    rows = judged(gimbal=[cell(200)], vllm=[cell(100)], vllm_legacy=[cell(100)])
    row = rows["vllm", "ttft_mean_ms"]
    assert (row["verdict"], row["behind"], row["low"]) == ("even", True, None)


def test_the_interval_is_students():
    low, high = paper.paired_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)


def test_change_is_the_geometric_mean_over_pairs():
    table = cells(gimbal=[cell(50), cell(200)], vllm=[cell(100), cell(100)])
    change = paper.change(table, "gimbal", "vllm", "ttft_mean_ms", table["vllm"])
    assert change["change"] == pytest.approx(0.0, abs=1e-12)
    assert change["low"] == pytest.approx(-0.5)
    assert change["high"] == pytest.approx(1.0)


def test_the_knee_is_where_vllm_begins_to_climb():
    own = {("today", "random", at, 0): cell(1, p99=p) for at, p in ((0.3, 10), (0.9, 14), (1, 16))}
    assert paper.knee_load({"vllm": own}, "today", "vllm") == 1


def invoke(*arguments):
    return CliRunner().invoke(command.command, ["paper", *arguments])


@pytest.mark.slow
@pytest.mark.skipif(
    not any((d / "burstgpt_derived").is_dir() for d in data_directories()), reason="no BurstGPT"
)
def test_the_command_writes_table_json_and_runs_for_the_report(tmp_path, monkeypatch):
    from gimbal.report.report import write_report
    from reproduction.report import write_reproduction

    searched = []

    def capacity(_bed, traffic, requests):  # the search itself: tests/sim/test_capacity.py
        searched.append(len(traffic(9.0, requests)))
        return SimpleNamespace(rate_rps=9.0)

    monkeypatch.setattr(reproduce, "find_capacity", capacity)
    arguments = ("--quick", "--requests", "20", "--seeds", "1", "--jobs", "1")
    result = invoke(*arguments, "--scenarios", "today", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.md").read_text()
    assert text.index("Where Gimbal loses") < text.index("## today")
    assert "paper: gimbal/vllm-legacy | -42.9 %" in text
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["cells"] == 5 * 3 * 9
    assert len(searched) == 5, "a capacity for each distribution"
    assert "What staying within CUDA graphs adds" in text
    assert write_report(tmp_path / "today").exists()
    page = write_reproduction(tmp_path).read_text()
    assert page.index("Where Gimbal loses") < page.index("today: TTFT mean")
    assert "Ablation at that load" in page
    assert list((tmp_path / "plots").glob("today-ttft-mean*.svg"))


def test_bad_input(tmp_path):
    result = invoke("--scenarios", "tody", "--out", str(tmp_path))
    assert isinstance(result.exception, InputError)
    assert "did you mean 'today'" in str(result.exception)
