"""Whatever a run's files and a user's YAML hold: a page and arms, or one line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.core.config import parse_config
from gimbal.core.config_sources import read_config_file
from gimbal.core.cost.profile import load_profile
from gimbal.core.cost.step import pack
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord, RunInfo
from gimbal.records.store import RunWriter
from gimbal.report.arms_file import read_arms, select_arms
from gimbal.report.metrics import Slo, balance, summarize
from gimbal.report.report import write_report
from gimbal.sim.cluster import load_cluster
from tests.mutations import EXAMPLES, mutated, read_or_refuse

CONFIG = b"""levels: [dispatch, queue, placement, feedback]
board_port: 7
dispatch: {policy: gimbal, options: {session_patience: 3}, max_signal_age_ms: 200.0}
queue: {ordering: sjf, max_wait_s: 5, pass_steps: 3}
placement: {placer: swift, options: {max_swaps: 3}, alpha: 1.5, profile: cpu-demo}
"""
ARMS = b"""base: &base {levels: [queue], queue_ordering: sjf, flags: --max-num-seqs 4}
own:
  <<: *base
  config: {queue: {max_wait_s: 5}}
  simulated: {pressure: owner}
"""
CLUSTER = b"""profile: cpu-demo
dp: 2
tp: 1
max_num_batched_tokens: 512
kv_tokens: 4096
stats_interval_ms: 100.0
routing: even
"""


@EXAMPLES
@given(data=st.data())
def test_configurations(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(st.one_of(st.binary(max_size=100), mutated(CONFIG)))
    read_or_refuse(
        lambda path: parse_config(read_config_file(path), str(path)),
        tmp_path / "gimbal.yaml",
        content,
    )


@EXAMPLES
@given(data=st.data())
def test_arms(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(st.one_of(st.binary(max_size=100), mutated(ARMS)))
    path = tmp_path / "arms.yaml"
    arms = read_or_refuse(read_arms, path, content)
    if arms:
        for arm in arms.values():
            arm.to_json()
        read_or_refuse(lambda file: select_arms(file=file), path, content)


@EXAMPLES
@given(data=st.data())
def test_clusters(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(st.one_of(st.binary(max_size=100), mutated(CLUSTER)))
    read = read_or_refuse(load_cluster, tmp_path / "c.yaml", content)
    if read is not None:
        cluster, profile = read
        assert cluster.ranks >= 1
        assert math.isfinite(cluster.stats_interval_ms)
        assert profile.name


@EXAMPLES
@given(data=st.data())
def test_profiles(tmp_path: Path, data: st.DataObject) -> None:
    from gimbal.core.cost import profile as module

    good = (Path(module.__file__).parent / "profiles" / "cpu-demo.yaml").read_bytes()
    content = data.draw(st.one_of(st.binary(max_size=100), mutated(good)))
    profile = read_or_refuse(load_profile, tmp_path / "p.yaml", content)
    if profile is not None:
        assert np.isfinite(pack(profile)).all()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with one of every file that a page is made from."""
    requests = [
        RequestRecord(
            f"{i}", "vllm", 0, i * 0.1, i * 0.1, 30, 2, 2, i + 0.2, i + 0.4, (i + 0.2, i + 0.4), i,
            index=i,
        )
        for i in range(2)
    ]  # fmt: skip
    arm = summarize([requests], Slo()) | {"balance": balance({0: 3.0, 1: 5.0})}
    ratio = {"ratio": 1.1, "low": 0.9, "high": None}
    many = dict.fromkeys(("mean", "p50", "p90", "p99"), ratio)
    ratios = dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"), many) | dict.fromkeys(
        ("throughput_rps", "output_tokens_per_s", "goodput_rps"), ratio
    )
    result = {"arms": {"vllm": arm}, "ratios": {"a/vllm": ratios}, "rate_rps": 2.0}
    info = RunInfo("simulate", ("simulate",), 0, 1, {"name": "t"}, {"vllm": {}}, {}, result=result)
    with RunWriter(tmp_path, info) as writer:
        writer.write(requests)
        writer.write(
            [RebalanceRecord(1.0, True, "g", 5.0, 6.0, 4.0, 7.0, 4, 3, 1.5, 1.1, 0.1, 0.4, "vllm")]
        )
        writer.write([PlacementRecord(2.0, True, ((1.5, 0.5),), ((0, 1),), ((1, 0),), "vllm")])
    return tmp_path


@pytest.mark.parametrize(
    "name", ["run.json", "requests.jsonl", "rebalances.jsonl", "placements.jsonl"]
)
@EXAMPLES
@given(data=st.data())
def test_pages(run: Path, name: str, data: st.DataObject) -> None:
    path = run / name
    good = path.with_suffix(".good")
    if not good.exists():
        assert write_report(run).exists()
        good.write_bytes(path.read_bytes())
    content = data.draw(mutated(good.read_bytes()))
    page = read_or_refuse(lambda file: write_report(file.parent), path, content)
    assert page is None or page.read_text(encoding="utf-8").startswith("<!doctype html>")
