"""Regimes: resumable cells, ratios to vLLM and to the best peer, losses first, the command."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from gimbal.commands import reproduce as command
from gimbal.core.errors import InputError
from gimbal.records.schema import RequestRecord
from gimbal.report.window import Window
from gimbal.sim.cells import CellResult
from reproduction import regimes
from reproduction.regimes import ARMS, REGIMES, Group, Plan, Regime
from reproduction.regimes_report import group_report, render, whole_report


@pytest.fixture
def plan(small_regime):
    """Two loads of a small trace."""
    return Plan((small_regime,), (0.5, 0.8), seeds=2, requests=30)


def files(directory):
    return {p.name: p.stat().st_mtime_ns for p in (directory / "cells").iterdir()}


def reports(plan, directory):
    return [group_report(group, plan) for group in regimes.run_regimes(plan, directory, 1)]


def test_a_stopped_run_continues_and_gives_the_same(plan, tmp_path, monkeypatch):
    whole = reports(plan, tmp_path / "whole")
    real, begun = regimes.run_cell, []

    def stopped(cell):
        begun.append(cell)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return real(cell)

    monkeypatch.setattr(regimes, "run_cell", stopped)
    with pytest.raises(KeyboardInterrupt):
        reports(plan, tmp_path / "cut")
    kept = files(tmp_path / "cut")
    assert len(kept) == 1 + 3
    monkeypatch.setattr(regimes, "run_cell", real)
    seen = []
    again = [
        group_report(group, plan)
        for group in regimes.run_regimes(plan, tmp_path / "cut", 1, lambda *n: seen.append(n))
    ]
    assert again == whole
    after = files(tmp_path / "cut")
    assert {name: after[name] for name in kept} == kept
    assert seen[0] == (4, 24)
    assert seen[-1] == (24, 24)
    more = dataclasses.replace(plan, seeds=3)
    reports(more, tmp_path / "cut")
    assert {name: files(tmp_path / "cut")[name] for name in after} == after


def test_what_is_kept_is_reported_without_running(plan, tmp_path):
    reports(dataclasses.replace(plan, loads=(0.8,)), tmp_path)
    before = files(tmp_path)
    groups = regimes.run_regimes(plan, tmp_path, 1, run=False)
    assert [group.load for group in groups] == [0.8]
    assert files(tmp_path) == before


def test_less_memory_is_another_cell(plan, tmp_path):
    one = dataclasses.replace(plan, loads=(0.5,), seeds=1)
    reports(one, tmp_path)
    before = files(tmp_path)
    scarce = dataclasses.replace(plan.regimes[0], kv_share=0.2)
    (group,) = regimes.run_regimes(dataclasses.replace(one, regimes=(scarce,)), tmp_path, 1)
    assert "with 20% of its KV memory" in group.cluster
    assert len(set(files(tmp_path)) - set(before)) == 1 + len(ARMS)


def test_with_prefill_apart_the_phases_are_in_the_tables(plan, tmp_path):
    apart = dataclasses.replace(plan.regimes[0], cluster=REGIMES["pd"].cluster)
    one = dataclasses.replace(plan, regimes=(apart,), loads=(0.5,), seeds=1)
    (own,) = reports(one, tmp_path)
    values = own["arms"]["gimbal-dp"]["values"]
    assert 1.0 < values["kv_wait_ms.mean"] <= values["kv_wait_ms.p99"]
    assert values["prefill_ms.mean"] + values["kv_wait_ms.mean"] < values["ttft_ms.mean"]
    assert "| from there to KV, mean (ms) |" in render(whole_report([(("c",), own)], one, {}))


def test_scarce_memory_is_a_fifth():
    ample, scarce = REGIMES["chat"].build(), REGIMES["reasoning"].build()
    _, profile = regimes.load_cluster(ample)
    assert scarce.kv_tokens == int(0.2 * profile.kv_tokens)
    assert (scarce.dp, scarce.max_num_seqs) == (ample.dp, ample.max_num_seqs)


def run(arm, repeat, ttft_s, preemptions=0):
    """One request a second, each with `ttft_s` and ten tokens a second after it."""
    records = tuple(
        RequestRecord(
            f"r{i}", arm, repeat, i, i, 10, 11, 11, i + ttft_s, i + ttft_s + 1.0, engine=0, index=i
        )
        for i in range(60)
    )
    none = dict.fromkeys(("mean", "p50", "p90", "p99"))
    even = {0: 60.0}
    return CellResult(arm, repeat, records, (), (), none, even, even, 9, 60.0, preemptions, 1.0)


def group(ttft_s, preemptions=None, seeds=5):
    results = [
        run(arm, seed, value * (1 + 0.01 * seed), (preemptions or {}).get(arm, 0))
        for seed in range(seeds)
        for arm, value in ttft_s.items()
    ]
    own = Regime("made", "made", "h100x4-paper")
    return Group(own, 0.9, 2.0, 1.8, "c", Window(10.0, 50.0), results, ("c0de",))


TTFT_S = {
    "vllm": 0.4,
    "gimbal-dp": 0.3,
    "lmetric": 0.35,
    "llm-d": 0.2,
    "dynamo": 0.6,
    "ideal-pool": 0.15,
}


def test_the_best_peer_is_found_for_each_metric_and_losses_lead():
    plan = Plan(seeds=5)
    own = group_report(group(TTFT_S, {"vllm": 3, "gimbal-dp": 7, "lmetric": 8}), plan)
    assert own["best_peer"]["ttft_ms.mean"] == "llm-d"
    assert own["to_vllm"]["gimbal-dp"]["ttft_ms.mean"]["ratio"] == pytest.approx(0.75)
    assert own["to_best_peer"]["ttft_ms.mean"]["ratio"] == pytest.approx(1.5)
    found = {(row["metric"], row["to"]): row["lost"] for row in own["behind"]}
    assert found["ttft_ms.mean", "llm-d"]
    assert ("ttft_ms.mean", "vllm") not in found
    assert not any(metric == "tpot_ms.mean" for metric, _ in found), "even in TPOT"
    counts = {row["to"]: (row["ours"], row["theirs"]) for row in own["behind"] if "ours" in row}
    assert counts == {"vllm": (35, 15), "llm-d": (35, 0)}
    text = render(whole_report([(("c0de",), own)], plan, {}))
    assert text.index("Where Gimbal loses: 3 of 12") < text.index("## In short")
    assert "| made | 0.9 | mean TTFT | llm-d | 1.50 [1.50, 1.50]* |" in text
    assert "| made | 0.9 | preemptions | vllm | 35 instead of 15 |" in text
    assert "0.75 / 1.50 / 40%" in text
    assert "| backlog | bounded | bounded |" in text


def test_a_share_of_what_can_be_won_is_given_where_there_is_something_to_win():
    own = group_report(group(TTFT_S), Plan(seeds=5))
    assert own["won"]["ttft_ms.mean"] == pytest.approx((0.4 - 0.3) / (0.4 - 0.15))
    assert own["won"]["tpot_ms.mean"] is None, "all are alike"
    worse = group_report(group({**TTFT_S, "gimbal-dp": 0.45}), Plan(seeds=5))
    assert worse["won"]["ttft_ms.mean"] == pytest.approx(-0.2)
    behind = group_report(group({**TTFT_S, "ideal-pool": 0.41}), Plan(seeds=5))
    assert behind["won"]["ttft_ms.mean"] is None


def test_throughput_is_better_when_it_is_higher():
    slow = {**TTFT_S, "gimbal-dp": 30.0}
    own = group_report(group(slow), Plan(seeds=5))
    row = next(r for r in own["behind"] if (r["metric"], r["to"]) == ("throughput_rps", "vllm"))
    assert row["ratio"] < 1


def test_few_seeds_give_no_interval_and_lose_nothing():
    plan = Plan(seeds=2)
    own = group_report(group(TTFT_S, seeds=2), plan)
    assert [row["lost"] for row in own["behind"] if row["metric"] == "ttft_ms.mean"] == [False]
    text = render(whole_report([(("c0de",), own)], plan, {}))
    assert "there are no intervals" in " ".join(text.split())
    assert "Where Gimbal loses: 0 of 12" in text


def invoke(*arguments):
    return CliRunner().invoke(command.command, ["regimes", *arguments])


def test_the_command_writes_tables_and_says_what_is_left_out(plan, tmp_path, monkeypatch):
    absent = Regime("absent", "azure-conv", "h100x4-paper")
    monkeypatch.setattr("gimbal.workloads.load.data_directories", lambda: [tmp_path])
    monkeypatch.setattr(regimes, "REGIMES", {"small": plan.regimes[0], "absent": absent})
    out = tmp_path / "out"
    size = ("--requests", "20", "--seeds", "1", "--loads", "0.5", "--jobs", "1", "--out", str(out))
    result = invoke(*size)
    assert result.exit_code == 0, result.output
    assert "absent: left out" in result.stderr
    assert result.stdout.startswith("# Regimes, simulated")
    text = (out / "regimes.md").read_text()
    assert text.index("Where Gimbal loses") < text.index("## small, load 0.5")
    report = json.loads((out / "regimes.json").read_text())
    assert report["seeds"] == [11]
    assert [own["regime"] for own in report["groups"]] == ["small"]
    asked = invoke(*size, "--regimes", "absent")
    assert isinstance(asked.exception, InputError)


def test_the_plot_has_a_line_for_every_arm(plan, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(regimes, "REGIMES", {"small": plan.regimes[0]})
    size = ("--requests", "20", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path / "out"))
    plot = tmp_path / "plot.svg"
    result = invoke(*size, "--loads", "0.5,0.8", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    text = plot.read_text()
    assert all(text.count(f">{arm}<") == 1 for arm in ARMS)
    assert all(f"mean {name}, ms" in text for name in ("TTFT", "TPOT", "E2E"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kept", "--regimes", "chat"), "nothing of chat is finished"),
        (("--regimes", "chatt"), "did you mean 'chat'"),
        (("--loads", "0.7,x"), "--loads 'x'"),
        (("--loads", "0"), "--loads '0'"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    result = invoke(*arguments, "--out", str(tmp_path))
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
