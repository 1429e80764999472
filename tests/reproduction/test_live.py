"""The live matrix against echo servers: shared servers, what is kept, and continuing."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gimbal.bench.servers import ServerPool
from gimbal.bench.session import BenchOptions
from gimbal.core.errors import InputError
from gimbal.records.schema import RunInfo
from gimbal.records.store import RunReader
from gimbal.workloads import TraceRequest, WorkloadOptions
from gimbal.workloads.prompts import uniform_vocabulary
from gimbal.workloads.trace import make_trace
from reproduction.command import command
from reproduction.live import ARMS, LiveMatrix, LiveRun

# An echo server that writes one rearrangement where its configuration asks for records.
FAKE = """
import asyncio, json, pathlib, sys
from gimbal.bench.echo import EchoOptions, serve
words = sys.argv[1:]
config = json.loads(words[words.index("--additional-config") + 1])["gimbal"]
records = config.get("placement", {}).get("records")
port = int(words[words.index("--port") + 1])
async def main():
    server = asyncio.create_task(serve(EchoOptions(tick_s=0.01), port))
    await asyncio.sleep(0.3)
    if records:
        row = dict(time_s=1.0, committed=True, reason="", predicted_gain_us_per_step=5.0,
                   predicted_stall_us=1.0, realized_gain_us_per_step=4.0, stall_us=1.0,
                   moved_slots=2, received_experts=2, balance_before=0.8, balance_after=0.9,
                   local_share_before=None, local_share_after=None)
        folder = pathlib.Path(records)
        folder.mkdir(parents=True)
        (folder / "rebalances.jsonl").write_text(json.dumps(row) + chr(10))
    await server
asyncio.run(main())
"""
ROWS = [TraceRequest(i * 0.02, 20, 4) for i in range(40)]
THREE = ("vllm-legacy", "vllm", "gimbal-ep")


def live_run(
    directory: Path,
    said: list[str],
    arms=THREE,
    stop_before: str = "",
    resident: int = 1,
    repeats: int = 1,
) -> LiveRun:
    directory.mkdir(exist_ok=True)
    script = directory / "fake.py"
    script.write_text(FAKE)
    trace = make_trace("t", ROWS)
    options = BenchOptions(
        trace, WorkloadOptions(requests=10), repeats=repeats, warm_up=0, capacity_rps=50.0
    )

    def say(text: str) -> None:
        said.append(text)
        if stop_before and stop_before in text:
            raise KeyboardInterrupt

    pool = ServerPool((), directory, resident, say, (sys.executable, str(script)))
    info = RunInfo("bench", (), 0, 1, {"name": "t"}, {}, {})
    return LiveRun(
        LiveMatrix(options, (0.5, 0.9), arms),
        directory,
        pool,
        lambda _endpoint: uniform_vocabulary(0, 100),
        info,
        say,
    )


def turns(said: list[str]) -> list[str]:
    return [line.partition(" (turn ")[0] for line in said if line.startswith("load ")]


@pytest.mark.slow
def test_a_stopped_matrix_continues_and_ends_with_a_report_per_load(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        live_run(tmp_path, said, stop_before="load 0.9: vllm,").run()
    done = turns(said)[:-1]
    assert len(done) == 3
    again: list[str] = []
    paths = live_run(tmp_path, again).run()
    assert sorted(done + turns(again)) == sorted(
        f"load {load:g}: {arm}, repeat 1" for load in (0.5, 0.9) for arm in THREE
    )
    for load, path in zip((0.5, 0.9), paths, strict=True):
        reader = RunReader(path)
        result = reader.info().result
        assert result is not None
        assert result["rate_rps"] == 50.0 * load
        assert {name: arm["completed"] for name, arm in result["arms"].items()} == dict.fromkeys(
            THREE, 10
        )
        assert set(result["ratios"]) == {"vllm-legacy/vllm", "gimbal-ep/vllm"}
        assert len(reader.requests()) == 30


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1, 2])
def test_arms_take_turns_where_their_servers_are_alive_together(
    tmp_path: Path, resident: int
) -> None:
    said: list[str] = []
    arms = ("vllm", "gimbal-ep")
    live_run(tmp_path, said, arms, resident=resident, repeats=2).run()
    orders = {
        1: ["vllm 1", "vllm 2", "gimbal-ep 1", "gimbal-ep 2"],
        2: ["vllm 1", "gimbal-ep 1", "gimbal-ep 2", "vllm 2"],
    }
    seen = [line for line in turns(said) if line.startswith("load 0.5")]
    assert seen == [
        f"load 0.5: {name}, repeat {repeat}" for name, repeat in map(str.split, orders[resident])
    ]
    assert sum(line.startswith("server") for line in said) == 2


@pytest.mark.slow
def test_rearrangements_land_in_the_run_under_their_arm(tmp_path: Path) -> None:
    said: list[str] = []
    run = live_run(tmp_path, said, arms=("gimbal-ep",))
    (path, _) = run.run()
    assert [(r.arm, r.predicted_gain_us_per_step) for r in RunReader(path).rebalances()] == [
        ("gimbal-ep", 5.0)
    ]


def test_arms_that_place_experts_have_servers_of_their_own() -> None:
    options = BenchOptions(make_trace("t", ROWS), WorkloadOptions())
    groups = [
        [arm.name for arm in arms] for arms in LiveMatrix(options, arms=ARMS).specs().values()
    ]
    assert groups == [
        ["vllm-legacy", "vllm", "gimbal-dp"],
        ["gimbal-ep"],
        ["gimbal-no-feedback"],
        ["gimbal"],
    ]
    specs = list(LiveMatrix(options, arms=ARMS).specs())
    assert [spec.shared for spec in specs] == [True, False, False, False]
    assert json.loads(specs[1].config_json)["levels"] == ["placement"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loads", "a"), "--loads 'a': expected a number > 0"),
        (("--loads", "0"), "--loads '0': expected a number > 0"),
        (("--repeat", "0"), "--repeat 0"),
        (("--resident", "0"), "--resident 0"),
        (("--max-output", "0"), "--max-output 0"),
        (("--arms", "gimball"), "unknown arm 'gimball'"),
    ],
)
def test_bad_input(arguments, message, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(command, ["live", "--out", str(out), *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not out.exists()
