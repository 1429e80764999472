"""The options about arms, which ``gimbal bench`` and ``gimbal simulate`` share."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gimbal.bench.echo import EchoOptions, echo_server
from gimbal.commands import bench, simulate
from gimbal.core.errors import InputError
from gimbal.records.store import RunReader

QUEUE_ARMS = "examples/arms-queue.yaml"
BOTH = pytest.mark.parametrize("command", [bench.command, simulate.command], ids=["bench", "sim"])


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": i * 0.02, "prompt_tokens": 100 + 37 * i % 900, "output_tokens": 2 + i % 5}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def invoke(command: click.Command, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def simulated(trace: str, *arguments: str) -> dict:
    return json.loads(
        invoke(simulate.command, "--trace", trace, "--jobs", "1", *arguments, "--json")
    )


def test_one_file_runs_the_same_arms_on_a_server_and_in_the_simulator(
    tmp_path: Path, trace: str
) -> None:
    chosen = ["--trace", trace, "--arms-file", QUEUE_ARMS, "--arms", "vllm,overtake-5"]
    invoke(simulate.command, *chosen, "--jobs", "1", "--out", str(tmp_path / "simulated"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with echo_server(EchoOptions(tick_s=0.001)) as url:
        options = [*chosen, "--url", url, "--model-dir", str(model), "--warm-up", "0"]
        invoke(bench.command, *options, "--out", str(tmp_path / "measured"))
    arms = [RunReader(tmp_path / name).info().arms for name in ("simulated", "measured")]
    assert arms[0] == arms[1]
    assert list(arms[0]) == ["vllm", "overtake-5"]
    assert arms[0]["overtake-5"]["config"]["queue"] == {"options": {"overtake_factor": 5}}


def test_without_names_vllm_and_the_file_s_arms_run(tmp_path: Path, trace: str) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text("b: {levels: [queue], queue_ordering: sjf}\na: {}\n")
    report = simulated(trace, "--arms-file", str(file))
    assert list(report["arms"]) == ["vllm", "b", "a"]
    assert set(report["ratios"]) == {"b/vllm", "a/vllm"}


def test_the_arm_gimbal_answers_for_its_configuration(tmp_path: Path, trace: str) -> None:
    file = tmp_path / "gimbal.yaml"
    file.write_text("levels: [dispatch]\ndispatch: {policy: round-robin}\n")
    report = simulated(
        trace, "--arms", "vllm,gimbal,round-robin,gimbal-queue", "--gimbal-config", str(file)
    )["arms"]
    assert report["gimbal"] == report["round-robin"]
    assert report["gimbal"] != report["gimbal-queue"]
    by_level = simulated(trace, "--arms", "vllm,gimbal", "--levels", "none")["arms"]
    assert by_level["gimbal"] == by_level["vllm"]


def test_a_policy_by_its_class_is_an_arm(
    tmp_path: Path, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_first.py").write_text(
        "import numpy as np\n\n\nclass First:\n"
        "    def costs(self, request, loads):\n        return np.arange(len(loads.board) * 1.0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "arms.yaml"
    file.write_text("first: {levels: [dispatch], policy: 'their_first:First'}\n")
    arms = simulated(trace, "--arms-file", str(file))["arms"]
    assert arms["first"]["requests_by_engine"] != arms["vllm"]["requests_by_engine"]
    assert arms["first"]["completed"] == 40


@BOTH
def test_the_list_describes_every_arm(command: click.Command, tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text("own: {description: a thing of mine}\n")
    lines = invoke(command, "--list", "--arms-file", str(file)).splitlines()
    assert any(line.split() == ["own", "a", "thing", "of", "mine"] for line in lines)
    assert any(line.startswith("  vllm ") and "EPLB" in line for line in lines)
    assert any(line.startswith(" *moe-tuner ") for line in lines)
    assert any("h100x4-paper" in line for line in lines) == (command is simulate.command)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arms", "vllm,vllm"), "'vllm' is named twice"),
        (("--arms", "gimbal-dispatch-queue"), "did you mean 'gimbal-dp'"),
        (("--levels", "que"), "unknown level 'que'"),
        (("--seed", "-1"), "--seed -1: expected a whole number >= 0"),
        (("--repeat", "0"), "--repeat 0: expected a whole number >= 1"),
        (("--load", "nan"), "--load 'nan': expected a number > 0"),
        (("--arms-file", "BINARY"), "BINARY: cannot be read: not UTF-8 text"),
        (("--arms-file", "none.yaml"), "none.yaml: no such file"),
        (("--gimbal-config", "BINARY"), "BINARY: cannot be read: not UTF-8 text"),
        (("--gimbal-config", "BAD"), "did you mean 'queue'"),
    ],
)
def test_bad_input_is_one_line(
    command: click.Command, arguments: tuple[str, str], message: str, trace: str, tmp_path: Path
) -> None:
    (tmp_path / "BINARY").write_bytes(b"\xff\x00\xfe")
    (tmp_path / "BAD").write_text("quue: {}\n")
    name, value = arguments
    given = [name, str(tmp_path / value) if value.isupper() else value]
    if command is bench.command:
        given.append("--demo")
    with pytest.raises(InputError) as caught:
        invoke(command, "--trace", trace, *given, "--out", str(tmp_path / "run"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--demo", "--arms", "vllm,moe-tuner"), "'moe-tuner' is for `gimbal simulate` only"),
        (("--url", "http://127.0.0.1:9", "--arms", "vllm-no-eplb"), "a server of its own"),
    ],
)
def test_bench_refuses_what_a_server_cannot_do(
    arguments: tuple[str, ...], message: str, trace: str
) -> None:
    with pytest.raises(InputError, match=message):
        invoke(bench.command, "--trace", trace, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "0"), "--jobs 0: expected a whole number >= 1"),
        (("--jobs", "-2"), "--jobs -2"),
        (("--arms-file", "arms.yaml"), "arm a: the simulator does not understand '--block-size'"),
    ],
)
def test_simulate_refuses_what_it_cannot_do(
    arguments: tuple[str, str], message: str, trace: str, tmp_path: Path
) -> None:
    (tmp_path / "arms.yaml").write_text("a: {flags: --block-size 32}\n")
    name, value = arguments
    given = str(tmp_path / value) if name == "--arms-file" else value
    with pytest.raises(InputError, match=message):
        invoke(simulate.command, "--trace", trace, name, given)
