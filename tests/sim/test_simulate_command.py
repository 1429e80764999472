"""``gimbal simulate`` end to end, small."""

import json
from functools import partial

import pytest
from click.testing import CliRunner

from gimbal.commands.simulate import command
from gimbal.core.errors import InputError
from gimbal.sim import capacity
from gimbal.workloads.scenario import load_scenario, scenario_names


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": i * 0.02, "prompt_tokens": 200 + 37 * i % 900, "output_tokens": 5 + i % 40}
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def simulate(*arguments):
    return CliRunner().invoke(command, arguments, catch_exceptions=True)


def test_same_seed_same_bytes_and_records_on_disk(trace, tmp_path):
    arguments = ("--trace", trace, "--arms", "vllm-no-eplb,gimbal-dp", "--repeat", "2", "--json")
    arguments += ("--settle", "0")
    first = simulate(*arguments, "--out", str(tmp_path / "run"))
    second = simulate(*arguments, "--jobs", "1")
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    report = json.loads(first.stdout)
    assert report["arms"]["gimbal-dp"]["completed"] == 240
    assert set(report["ratios"]) == {"gimbal-dp/vllm-no-eplb"}
    assert len((tmp_path / "run" / "requests.jsonl").read_text().splitlines()) == 480


def test_load_sets_the_rate_from_the_simulated_capacity(trace, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find = partial(capacity.find_capacity, requests=200)
    monkeypatch.setattr(capacity, "find_capacity", find)
    arguments = ("--trace", trace, "--arms", "vllm-no-eplb", "--load", "0.5", "--json")
    first = simulate(*arguments)
    report = json.loads(first.stdout)
    assert report["rate_rps"] == pytest.approx(0.5 * report["capacity_rps"], rel=0.01)
    # With scaled times too it is the rate at which requests come.
    scaled = json.loads(simulate(*arguments, "--scale-time", "0.25").stdout)
    assert scaled["rate_rps"] == pytest.approx(0.5 * scaled["capacity_rps"], rel=0.01)
    assert scaled["capacity_rps"] == pytest.approx(report["capacity_rps"], rel=0.2)
    # What was found is kept, and asked for again only where the question is the same.
    monkeypatch.setattr(capacity, "find_capacity", None)
    assert simulate(*arguments).stdout == first.stdout
    assert isinstance(simulate(*arguments, "--seed", "1").exception, TypeError)


def test_what_is_measured_lies_within_arrivals_that_go_on(trace, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--trace", trace, "--requests", "200", "--arms", "vllm-no-eplb,gimbal-dp")
    arguments += ("--jobs", "1")
    result = simulate(*arguments, "--json", "--out", str(folder))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    begin, end = report["window"]["begin_s"], report["window"]["end_s"]
    records = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    for name, arm in report["arms"].items():
        own = [r for r in records if r["arm"] == name]
        measured = [r for r in own if begin <= r["arrival_s"] < end]
        assert arm["requests"] == arm["completed"] == len(measured) == pytest.approx(200, abs=2)
        done = [r["last_token_s"] for r in own if r["last_token_s"] is not None]
        inside = sum(begin <= t < end for t in done)
        assert arm["throughput_rps"] == pytest.approx(inside / (end - begin))
        assert max(r["last_token_s"] for r in measured) < max(r["arrival_s"] for r in own) + 0.1
        assert arm["backlog"]["bounded"]
    shown = simulate(*arguments).stdout
    assert "bounded" in shown
    assert "arrivals that go on" in shown


def test_the_window_holds_the_requests_asked_for_when_times_are_scaled(trace):
    arguments = ("--trace", trace, "--requests", "100", "--arms", "vllm-no-eplb", "--settle", "2")
    arguments += ("--rate", "4", "--scale-time", "0.5", "--jobs", "1", "--json")
    result = simulate(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    window = report["window"]
    assert window["end_s"] - window["begin_s"] == pytest.approx(100 / 8.0)
    assert report["arms"]["vllm-no-eplb"]["requests"] == pytest.approx(100, abs=15)


def test_an_overload_says_that_it_is_none_of_a_steady_state(trace):
    overload = ("--trace", trace, "--requests", "4000", "--rate", "3000", "--settle", "1")
    shown = simulate(*overload, "--arms", "vllm-no-eplb").stdout
    assert "grows" in shown
    assert "warning: vllm-no-eplb: not in steady state" in shown


def test_the_table_is_printed(trace):
    assert "TTFT mean" in simulate("--trace", trace, "--arms", "vllm-no-eplb").stdout


def test_what_was_assumed_of_a_trace_is_said_beside_the_result(tmp_path):
    row = {"timestamp": 5.0, "input_length": 100, "output_length": 5, "hash_ids": [1, 2]}
    rows = [row | {"timestamp": 5.0 + 0.02 * i} for i in range(4)]
    path = tmp_path / "trace"
    path.write_text(json.dumps(rows))
    options = ("--trace-block-size", "64", "--trace-time-unit", "s")
    options += ("--arms", "vllm-no-eplb", "--json")
    result = simulate("--trace", str(path), *options, "--settle", "0")
    note = "read as Mooncake: times in s, prefix blocks of 64 tokens"
    assert result.stderr == f"{path}: {note}\n"
    assert "the trace has 4: it is repeated" in simulate("--trace", str(path), *options).stderr
    assert json.loads(result.stdout)["rate_rps"] == pytest.approx(50.0)


def test_a_newcomer_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr("gimbal.workloads.load.data_directories", lambda: [tmp_path])
    result = simulate("--requests", "40", "--rate", "50", "--arms", "vllm-no-eplb", "--json")
    assert result.exit_code == 0, result.output
    arm = json.loads(result.stdout)["arms"]["vllm-no-eplb"]
    assert arm["completed"] == arm["requests"] > 0


def test_scenarios_are_listed():
    listed = simulate("--list").stdout
    for name in scenario_names():
        assert f" {name} " in listed
        assert load_scenario(name).description in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "chta"), "scenarios: agent, burst, chat, documents, reasoning"),
        (("--trace", "chat", "--trace-block-size", "16"), "a scenario; --trace-block-size"),
        (("--arms", "gimbl"), "unknown arm"),
        (("--cluster", "h100x5"), "unknown cluster"),
        (("--load", "0"), "expected a number > 0"),
        (("--load", "1", "--rate", "2"), "give one"),
        (("--repeat", "0"), "whole number"),
    ],
)
def test_bad_input(trace, arguments, message):
    result = simulate("--trace", trace, *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
