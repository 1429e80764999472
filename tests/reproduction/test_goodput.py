"""Goodput of the regimes: few loads, bounds, losses and missed aims first, the command, plots."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from gimbal.commands import reproduce as command
from gimbal.core.errors import InputError
from reproduction import goodput, regimes
from reproduction.goodput import ARMS, bounds_of, estimate, figures, walk
from reproduction.goodput_report import render
from reproduction.plots import middle_and_band

LOADS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)


def shares(crossing, seeds=5):
    """All requests keep the limits below the load `crossing`, four fifths from there on."""
    return lambda load: [
        1.0 if load < crossing * (1 + seed / 100) else 0.8 for seed in range(seeds)
    ]


def walked(crossings):
    """Shares by arm of arms that fail from those loads on, and the loads that were asked for."""
    asked = []

    def shares_at(load, names):
        asked.append((load, tuple(names)))
        return {name: shares(crossings[name])(load) for name in names}

    return walk(LOADS, shares_at), asked


CROSSINGS = {"vllm": 0.4, "gimbal-dp": 0.8, "lmetric": 0.6, "llm-d": 2.0, "dynamo": 0.05}


def test_an_arm_is_run_only_where_its_shares_are_crossed():
    found, asked = walked(CROSSINGS)
    loads = {name: list(own) for name, own in found.items()}
    assert loads == {
        "vllm": [0.3, 0.5, 0.7],
        "gimbal-dp": [0.7, 0.9],
        "lmetric": [0.5, 0.7],
        "llm-d": [0.7, 0.9, 1.1],
        "dynamo": [0.1, 0.3, 0.5, 0.7],
    }
    assert asked[0] == (0.7, ARMS)


def test_a_load_that_is_not_to_be_had_is_passed_by():
    def shares_at(load, names):
        there = [name for name in names if name != "vllm" and load not in (0.5, 0.1)]
        return {name: shares(CROSSINGS[name])(load) for name in there}

    found = walk(LOADS, shares_at)
    assert found["vllm"] == {}
    assert list(found["lmetric"]) == [0.3, 0.7]
    own = figures(found, 10.0)
    assert own["rates"]["vllm"]["99%"]["value"] is None
    lowest = {"value": pytest.approx(3.0), "low": None, "high": None, "mark": "<="}
    assert own["rates"]["dynamo"]["99%"] == lowest
    assert own["to_vllm"]["99%"]["value"] is None


def test_a_bound_makes_a_bound_and_the_same_way_twice_makes_nothing():
    exact, more, less = [(2.0, "")] * 6, [(4.0, ">=")] * 6, [(1.0, "<=")] * 6
    bound = {"value": pytest.approx(4.0), "low": None, "high": None, "mark": ">="}
    assert estimate(more) == bound
    assert estimate(more, less) == bound
    assert estimate(exact, less)["mark"] == ">="
    assert estimate(less, exact)["mark"] == "<="
    assert estimate(more, more)["value"] is None
    assert estimate(exact, exact) == {"value": 1.0, "low": 1.0, "high": 1.0, "mark": ""}
    assert estimate([*exact[:5], (4.0, ">=")])["low"] is None, "a bound without one of the seeds"


def test_the_interval_is_the_jackknifes():
    """Of a mean the jackknife's error is the usual one: here the rate is linear in the shares."""
    seeds = np.array([0.90, 0.91, 0.92, 0.93, 0.94])
    bounds = bounds_of({0.5: [1.0] * 5, 1.0: seeds.tolist()}, 10.0, 0.99)
    logs = np.log([rate for rate, _ in bounds])
    assert bounds[0][0] == pytest.approx(5.0 + 5.0 * 0.01 / 0.08)
    found = estimate(bounds)
    error = (4 / 5 * ((logs[1:] - logs[1:].mean()) ** 2).sum()) ** 0.5
    assert np.log(found["high"] / found["value"]) == pytest.approx(2.776 * error, rel=1e-3)
    assert estimate(bounds, bounds)["high"] == pytest.approx(1.0)
    assert estimate(bounds_of({0.5: [1.0] * 2, 1.0: [0.9, 0.8]}, 10.0, 0.99))["low"] is None


def made(crossings, regime="chat"):
    """A report of one regime whose arms fail from those loads on."""
    found, _ = walked(crossings)
    own = {
        "regime": regime,
        "cluster": "c",
        "slo": {"ttft_ms": 30_000.0, "tpot_ms": 300.0},
        "capacity_rps": 10.0,
        "code": ["c0de"],
        "attained": found,
        **figures(found, 10.0),
    }
    return {"seeds": [11, 12, 13, 14, 15], "regimes": [own]}


def test_losses_come_first_then_what_misses_the_aim():
    text = render(made({**CROSSINGS, "llm-d": 1.0}))
    assert text.index("## Where Gimbal loses") < text.index("## Highest rates")
    first = next(line for line in text.splitlines() if line.startswith("| chat"))
    assert first.startswith("| chat | 99% | llm-d |")
    assert "*" in first
    assert "| 1.5 / 1.1 |" in text
    near = render(made({**CROSSINGS, "vllm": 0.6, "llm-d": 0.4}))
    assert "0 of 4 comparisons lost" in near
    rows = [line for line in near.splitlines() if line.startswith("| chat | 99% | vllm | 1.39")]
    assert rows[0].endswith("| 1.5 |")


def test_more_than_all_loads_that_were_run_is_no_loss():
    text = render(made({**CROSSINGS, "gimbal-dp": 2.0, "llm-d": 0.4}))
    assert "0 of 4 comparisons lost" in text
    assert ">= 11 |" in text


def test_bands_are_intervals_over_five_seeds_or_more():
    mean, low, high = middle_and_band(np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [2.0] * 5]))
    assert mean.tolist() == [3.0, 2.0]
    assert (low[0], high[0]) == pytest.approx((3.0 - 1.963, 3.0 + 1.963), abs=0.001)
    assert (low[1], high[1]) == (2.0, 2.0)
    few = middle_and_band(np.array([[1.0, 2.0]]))
    assert [line.tolist() for line in few] == [[1.5]] * 3


@pytest.fixture
def small(small_regime, monkeypatch):
    """One small regime, and no other."""
    own = {"small": small_regime}
    monkeypatch.setattr(regimes, "REGIMES", own)
    return own


def invoke(*arguments):
    return CliRunner().invoke(command.command, arguments)


def test_the_command_shares_its_cells_with_the_regimes(small, tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out", tmp_path / "goodput.svg"
    size = ("--requests", "20", "--seeds", "1", "--jobs", "1", "--out", str(out))
    assert invoke("regimes", *size, "--loads", "0.7").exit_code == 0
    before = set((out / "cells").iterdir())
    wide = ("--slo", "ttft_ms=60000")
    kept = invoke("goodput", *size, *wide, "--kept", "--plot", str(plot))
    assert kept.exit_code == 0, kept.output
    assert set((out / "cells").iterdir()) == before
    assert "| small | 99% | >= 28 | >= 28 |" in kept.stdout
    assert kept.stdout == (out / "goodput.md").read_text() + "\n"
    assert plot.read_text().count(">vllm<") == 1
    more = invoke("goodput", *size, *wide, "--loads", "0.7,0.9", "--json")
    assert more.exit_code == 0, more.output
    report = json.loads(more.stdout)
    assert report["regimes"][0]["slo"] == {"ttft_ms": 60000.0}
    assert len(set((out / "cells").iterdir()) - before) == len(ARMS)
    assert report["regimes"][0]["attained"]["vllm"] == {"0.7": [1.0], "0.9": [1.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loads", "0.7,0.5"), "expected ascending"),
        (("--slo", "tfft_ms=3"), "did you mean 'ttft_ms'"),
        (("--plot", "goodput.gif"), "ends in .svg or .png"),
        (("--regimes", "smal"), "did you mean 'small'"),
        (("--regimes", "small"), "--regimes small: it has no limits of its own, give --slo"),
    ],
)
def test_bad_input(small, tmp_path, arguments, message):
    result = invoke("goodput", *arguments, "--out", str(tmp_path))
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_what_has_no_limits_is_left_out_before_anything_runs(small, tmp_path, monkeypatch):
    limited = dataclasses.replace(small["small"], name="limited")
    monkeypatch.setitem(small, "limited", limited)
    monkeypatch.setitem(goodput.TARGETS, "limited", goodput.TARGETS["chat"])
    size = ("--requests", "20", "--seeds", "1", "--loads", "0.7", "--jobs", "1")
    result = invoke("goodput", *size, "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert "small: left out: it has no limits of its own" in result.stderr
    assert [own["regime"] for own in json.loads(result.stdout)["regimes"]] == ["limited"]
