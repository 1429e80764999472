"""Dispatch on a running server: visible, switchable, and never at the price of a request."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from gimbal.workloads.reader import read_trace
from gimbal.workloads.recorder import IDLE_S
from tests.live.client import OUTPUT_TOKENS, burst, call
from tests.live.conftest import operated

pytestmark = pytest.mark.live
TRACES = Path(tempfile.gettempdir()) / f"gimbal-live-traces-{os.getpid()}"
RECORDED = f'{{"gimbal": {{"admin": true, "trace_records": "{TRACES}"}}}}'


def engine_process(server: Any, rank: int) -> int:
    from gimbal.vllm_plugin.serve.processes import descendants_of

    for pid in descendants_of(server.pid):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        if f"EngineCore_DP{rank}".encode() in title:
            return pid
    raise AssertionError(f"no process of engine {rank}")


def status(server: Any) -> dict[str, Any]:
    found: dict[str, Any] = call(f"{server.root}/gimbal/status")
    return found


def settle(server: Any) -> dict[str, Any]:
    """The status once nothing is outstanding and the gauges have caught up."""
    deadline = time.monotonic() + 60
    while True:
        time.sleep(0.6)
        found = status(server)
        left = [e["inflight_requests"] + e["unacknowledged_tokens"] for e in found["engines"]]
        if not any(left) or time.monotonic() > deadline:
            assert not any(left), f"outstanding for ever: {left}"
            return found


def the_page(server: Any) -> dict[str, Any]:
    """What the live page is told once latencies have been read: every ten seconds."""
    deadline = time.monotonic() + 60
    while True:
        found: dict[str, Any] = call(f"{server.root}/gimbal/view")
        if any(sample.get("ttft", [None])[0] for sample in found["samples"]):
            return found
        assert time.monotonic() < deadline, "no latency in the history"
        time.sleep(1.0)


def test_decisions_and_signals_are_in_the_metrics(server: Any) -> None:
    before = server.total("gimbal_dispatch_decisions_total", policy="gimbal")
    burst(server, 24)
    settle(server)
    assert server.total("gimbal_dispatch_decisions_total", policy="gimbal") - before == 24
    assert server.total("gimbal_dispatch_decision_seconds_count") >= 24
    assert server.total("gimbal_signal_age_seconds_count") >= 24
    for engine in ("0", "1"):
        assert server.total("gimbal_engine_snapshots_total", engine=engine) > 10
        assert server.total("gimbal_engine_kv_blocks", engine=engine) > 0
        assert server.total("gimbal_engine_step_time_seconds", engine=engine) > 0
        assert server.total("gimbal_engine_prefill_seconds_per_token", engine=engine) > 0
        assert 0 <= server.total("gimbal_engine_decode_seconds_per_request", engine=engine) < 1
    assert server.total("gimbal_fallback_total") == 0
    terms = [s for s in server.metrics() if s.startswith("gimbal_dispatch_cost_seconds{")]
    assert any('term="queue"' in sample for sample in terms)


@operated
def test_an_operator_compares_policies_on_one_server(server: Any) -> None:
    for policy in ("round-robin", "vllm", "gimbal"):
        call(f"{server.root}/gimbal/control", {"policy": policy, "reset": True})
        before = server.total("gimbal_dispatch_decisions_total", policy=policy)
        burst(server, 8)
        assert server.total("gimbal_dispatch_decisions_total", policy=policy) - before == 8
    with pytest.raises(urllib.error.HTTPError) as error:
        call(f"{server.root}/gimbal/control", {"policy": "gimball"})
    assert error.value.code == 400
    assert "did you mean 'gimbal'" in error.value.read().decode()


@operated
def test_a_stopped_engine_loses_no_request(server: Any) -> None:
    before = server.total("gimbal_fallback_total", level="dispatch", reason="stale")
    pid = engine_process(server, 1)

    def stop_for_5_s() -> None:
        time.sleep(1.0)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5.0)
        os.kill(pid, signal.SIGCONT)

    burst(server, 80, rate=10, meanwhile=stop_for_5_s)
    after = server.total("gimbal_fallback_total", level="dispatch", reason="stale")
    assert after > before, "five seconds without a snapshot went unnoticed"
    settle(server)
    burst(server, 8)
    assert server.total("gimbal_fallback_total", level="dispatch", reason="stale") == after
    assert not status(server)["dispatch"]["switched_itself_off"]


@operated
def test_a_deleted_board_loses_no_request(server: Any) -> None:
    path = Path(status(server)["board"]["path"])

    def delete() -> None:
        time.sleep(1.0)
        path.unlink()

    burst(server, 60, rate=15, meanwhile=delete)
    burst(server, 8)
    found = settle(server)
    assert found["board"]["recoveries"] >= 1
    assert path.exists()
    assert all(engine["age_us"] is not None for engine in found["engines"])


@pytest.mark.server("--additional-config", RECORDED, "--api-server-count", "2")
def test_two_api_servers_share_one_board_and_record_one_trace(
    server: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: shutil.rmtree(TRACES))
    burst(server, 40)
    deadline = time.monotonic() + 60
    while server.total("gimbal_unacknowledged_tokens") or server.total("gimbal_inflight_tokens"):
        assert time.monotonic() < deadline, "outstanding for ever"
        time.sleep(0.2)
    assert server.total("gimbal_dispatch_decisions_total", policy="gimbal") == 40
    assert server.total("gimbal_unacknowledged_tokens") == 0
    assert server.total("gimbal_inflight_tokens") == 0
    assert server.total("gimbal_engine_snapshots_total", engine="1") > 10
    found = the_page(server)
    assert found["front_ends"] == 2
    assert sum(found["decisions"].values()) == 40
    newest = found["recent"][0]
    assert newest["terms"][0] == "queue"
    assert newest["cost"] == pytest.approx(sum(newest["cost_by_term"]), abs=1.0)
    assert {newest["engine"], newest["runner_up"]} == {0, 1}
    call(f"{server.root}/gimbal/control", {"policy": "round-robin"})
    burst(server, 20)
    assert server.total("gimbal_dispatch_decisions_total", policy="round-robin") == 20
    time.sleep(3 * IDLE_S)
    files = sorted(TRACES.glob("trace-*.jsonl"))
    assert len(files) == 2
    together = tmp_path / "together.jsonl"
    together.write_text("".join(file.read_text() for file in files))
    trace = read_trace(together)
    assert [r.output_tokens for r in trace.requests] == [OUTPUT_TOKENS] * 60
    assert 0.0 < trace.span_s < 120.0
    long = [r for r in trace.requests if r.prompt_tokens > 100]
    assert len(long) == 15
    blocks = [len(r.prefix_blocks) for r in long]
    assert blocks == [r.prompt_tokens // trace.prefix_block_tokens for r in long]
    # Of 40 and 20 prompts the latter 20 are among the former.
    assert len({r.prefix_blocks for r in long}) == 10


def test_without_admin_nobody_switches_anything(server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        call(f"{server.root}/gimbal/control", {"policy": "vllm"})
    assert error.value.code == 403
    burst(server, 4)
    assert status(server)["policies"]["dispatch"] == "gimbal"
