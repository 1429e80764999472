"""``gimbal simulate`` end to end, small."""

import json

import pytest
from click.testing import CliRunner

from gimbal.commands.simulate import command
from gimbal.core.errors import InputError
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
    first = simulate(*arguments, "--out", str(tmp_path / "run"))
    second = simulate(*arguments, "--jobs", "1")
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    report = json.loads(first.stdout)
    assert report["arms"]["gimbal-dp"]["completed"] == 240
    assert set(report["ratios"]) == {"gimbal-dp/vllm-no-eplb"}
    assert len((tmp_path / "run" / "requests.jsonl").read_text().splitlines()) == 480


def test_load_sets_the_rate_from_the_simulated_capacity(trace):
    result = simulate("--trace", trace, "--arms", "vllm-no-eplb", "--load", "0.5", "--json")
    report = json.loads(result.stdout)
    assert report["rate_rps"] == pytest.approx(0.5 * report["capacity_rps"], rel=0.01)


def test_the_table_is_printed(trace):
    assert "TTFT mean" in simulate("--trace", trace, "--arms", "vllm-no-eplb").stdout


def test_what_was_assumed_of_a_trace_is_said_beside_the_result(tmp_path):
    row = {"timestamp": 5.0, "input_length": 100, "output_length": 5, "hash_ids": [1, 2]}
    rows = [row | {"timestamp": 5.0 + 0.02 * i} for i in range(4)]
    path = tmp_path / "trace"
    path.write_text(json.dumps(rows))
    options = ("--trace-block-size", "64", "--trace-time-unit", "s")
    result = simulate("--trace", str(path), *options, "--arms", "vllm-no-eplb", "--json")
    note = "read as Mooncake: times in s, prefix blocks of 64 tokens"
    assert result.stderr == f"{path}: {note}\n"
    assert json.loads(result.stdout)["rate_rps"] == pytest.approx(50.0)


def test_a_newcomer_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr("gimbal.workloads.load.data_directories", lambda: [tmp_path])
    result = simulate("--requests", "40", "--rate", "50", "--arms", "vllm-no-eplb", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["arms"]["vllm-no-eplb"]["completed"] == 40


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
