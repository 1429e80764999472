"""The highest rate at which requests keep their limits."""

import json
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner

from gimbal.commands.goodput import command
from gimbal.sim import capacity
from gimbal.sim.goodput import highest_rate, rate_of

RATES = np.array([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0, 1.0, 0.9, 0.5], 2.5),
        ([1.0, 0.94, 1.0, 0.5], 1 + 5 / 6),  # what fails once is not passed by what comes later
        ([0.9, 1.0, 1.0, 1.0], 0.0),
        ([1.0, 1.0, 1.0, 0.96], None),
        ([0.95, 0.95, 0.95, 0.0], 3.0),
    ],
)
def test_the_highest_rate_lies_where_the_share_is_crossed(shares, expected):
    assert highest_rate(RATES, np.array(shares), 0.95) == pytest.approx(expected)


def test_intervals_are_over_five_repeats_or_more_and_ratios_are_paired():
    few = rate_of([1.0, 3.0])
    assert (few["value"], few["low"]) == (2.0, None)
    base = [10.0, 20.0, 40.0, 10.0, 20.0]
    same = rate_of([2 * rate for rate in base], base)
    assert list(same.values()) == pytest.approx([2.0, 2.0, 2.0])
    mean = rate_of(base)
    assert mean["low"] < mean["value"] == 20.0 < mean["high"]
    assert rate_of([1.0, None])["value"] is None
    assert rate_of([1.0, 2.0], [1.0, 0.0])["value"] is None


def test_the_command_finds_a_rate_between_good_and_bad(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find = partial(capacity.find_capacity, requests=200)
    monkeypatch.setattr(capacity, "find_capacity", find)
    trace, plot = tmp_path / "trace.jsonl", tmp_path / "goodput.svg"
    rows = [
        {"arrival_s": i * 0.02, "prompt_tokens": 2000 + 37 * i % 900, "output_tokens": 5}
        for i in range(120)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--trace", str(trace), "--requests", "200", "--arms", "vllm-no-eplb,round-robin"]
    arguments += ["--slo", "ttft_ms=600", "--loads", "0.3,0.9,1.5", "--jobs", "1"]
    result = CliRunner().invoke(command, [*arguments, "--plot", str(plot), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    low, *_, high = report["rates_rps"]
    own = report["arms"]["vllm-no-eplb"]
    assert own["attained"][0] > 0.99 > own["attained"][-1]
    assert low < own["rate_rps"]["99%"]["value"] <= own["rate_rps"]["90%"]["value"] < high
    assert own["ratio"]["99%"] == {"value": 1.0, "low": None, "high": None}
    assert plot.read_text().count("<polyline") == 2
    shown = CliRunner().invoke(command, arguments).stdout
    assert "round-robin" in shown
    assert "ttft_ms <= 600" in shown
