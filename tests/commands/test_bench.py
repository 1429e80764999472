"""``gimbal bench`` from the command line, against an echo server, and its refusals."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gimbal.bench.echo import EchoOptions, echo_server
from gimbal.commands.bench import command
from gimbal.core.errors import InputError
from gimbal.records.store import RunReader

TRACE = '{"arrival_s": %s, "prompt_tokens": 40, "output_tokens": %d, "prefix_blocks": [1, 2]}\n'


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(TRACE % (i * 0.02, 3 + i % 3) for i in range(20)))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300}))
    return str(folder)


def test_json_and_records_of_two_arms(tmp_path: Path, trace: str, model: str) -> None:
    out = tmp_path / "run"
    with echo_server(EchoOptions(tick_s=0.01)) as url:
        options = ["--url", url, "--trace", trace, "--model-dir", model, "--out", str(out)]
        options += ["--arms", "vllm,lmetric", "--repeat", "2", "--requests", "15", "--json"]
        options += ["--warm-up", "2", "--slo", "ttft_ms=5000", "--seed", "3"]
        result = CliRunner().invoke(command, options, catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    for arm in report["arms"].values():
        assert (arm["requests"], arm["completed"], arm["rejected"], arm["failed"]) == (30, 30, 0, 0)
        assert set(arm["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
        assert arm["goodput_rps"] == arm["throughput_rps"] > 0
    assert set(report["ratios"]) == {"lmetric/vllm"}
    assert report["seed"] == 3
    assert report["client"]["cpu_us_per_token"] > 0
    assert report["environment"]["cores"]
    reader = RunReader(out)
    records = reader.requests()
    assert len(records) == 60
    assert [(row["arm"], row["repeat"]) for row in reader.info().runs] == [
        ("vllm", 0), ("lmetric", 0), ("lmetric", 1), ("vllm", 1),
    ]  # fmt: skip
    assert reader.info().result == report
    # The same requests in both arms of a repeat.
    by_run = {
        (arm, repeat): [(r.index, r.arrival_s, r.prompt_tokens, r.output_tokens) for r in rows]
        for arm in ("vllm", "lmetric")
        for repeat in (0, 1)
        if (rows := [r for r in records if (r.arm, r.repeat) == (arm, repeat)])
    }
    assert by_run["vllm", 0] == by_run["lmetric", 0]
    assert by_run["vllm", 1] == by_run["lmetric", 1]


def test_a_single_server_as_it_is_with_a_load(tmp_path: Path, trace: str, model: str) -> None:
    with echo_server(EchoOptions(tick_s=0.01)) as url:
        options = ["--url", url, "--trace", trace, "--model-dir", model, "--load", "0.5"]
        options += ["--capacity", "40", "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(command, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert "arrivals: 20.00 requests/s (load 0.5 of 40.00)" in result.stdout
    assert "us of CPU per token" in result.stdout


def test_a_turn_is_measured_within_arrivals_that_go_on(
    tmp_path: Path, trace: str, model: str
) -> None:
    out = tmp_path / "run"
    with echo_server(EchoOptions(tick_s=0.01)) as url:
        options = ["--url", url, "--trace", trace, "--model-dir", model, "--out", str(out)]
        options += ["--requests", "25", "--rate", "50", "--settle", "0.4", "--warm-up", "0"]
        result = CliRunner().invoke(command, [*options, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["window"] == pytest.approx({"begin_s": 0.4, "end_s": 0.9})
    arm, records = report["arms"]["server"], RunReader(out).requests()
    assert len(records) == 65, "a trace of 20 requests goes round"
    assert arm["requests"] == arm["completed"] == 25
    assert arm["backlog"]["residence_p99_s"] > 0
    assert arm["duration_s"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of"),
        (["--url", "http://127.0.0.1:9", "--demo"], "give one of"),
        (["--demo", "--arms", "vlm"], "did you mean 'vllm'"),
        (["--demo", "--load", "0.9", "--rate", "3"], "give one"),
        (["--demo", "--load", "-1"], "--load -1"),
        (["--demo", "--repeat", "0"], "--repeat 0"),
        (["--demo", "--slo", "ttft=3"], "did you mean"),
        (["--demo", "--trace", "nothing.csv"], "no such file"),
        (["--demo", "--max-prompt", "0"], "--max-prompt 0"),
        (["--url", "http://127.0.0.1:9"], "no OpenAI server answers"),
    ],
)
def test_refusals(tmp_path: Path, trace: str, options: list[str], message: str) -> None:
    given = [*options, "--out", str(tmp_path / "run")]
    if "--trace" not in options:
        given += ["--trace", trace]
    with pytest.raises(InputError) as caught:
        CliRunner().invoke(command, given, catch_exceptions=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plots_the_workload(tmp_path: Path, trace: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    result = CliRunner().invoke(command, ["--trace", trace, "--plot-trace", str(path)])
    assert result.exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
