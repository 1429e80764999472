"""The capacity run against a made-up server with a known capacity."""

from typing import Any

import pytest

from gimbal.bench.capacity import measure_capacity
from gimbal.bench.client import ClientResult, ClientUsage, Replay
from gimbal.bench.client_process import ReplayJob
from gimbal.bench.session import BenchOptions, BenchSession
from gimbal.workloads import TraceRequest, WorkloadOptions, build_workload, load_trace
from gimbal.workloads.prompts import uniform_vocabulary
from gimbal.workloads.trace import make_trace


def job(count: int = 60) -> ReplayJob:
    trace = make_trace("t", [TraceRequest(i * 0.3, 10, 2) for i in range(count)])
    return ReplayJob("http://x", "m", trace, uniform_vocabulary(0, 9), (0,), "cap")


def server(capacity_rps: float, latency_s: float = 1.0):
    """Replays as a server would that ends one request every 1/capacity seconds, in order."""

    def replay(job: ReplayJob) -> Replay:
        free, results = 0.0, []
        last = job.trace.requests[-1].arrival_s
        for index, request in enumerate(job.trace.requests):
            free = max(free, request.arrival_s) + 1 / capacity_rps
            end = free + latency_s
            aborted = end > last + job.grace_s
            result = ClientResult(f"{index}", request.arrival_s, "aborted" if aborted else "ok")
            result.ended_s = min(end, last + job.grace_s)
            result.token_times_s = [t for t in (free, end) if t <= last + job.grace_s]
            results.append(result)
        return Replay(results, ClientUsage(0.1, 1.0, 1, 1, 0.0))

    return replay


@pytest.mark.parametrize("latency_s", [0.5, 20.0])
@pytest.mark.parametrize("capacity", [0.5, 4.0, 30.0])
def test_finds_the_capacity(capacity: float, latency_s: float) -> None:
    """Answers that take long begin a ramp, and end in none of the first seconds."""
    said: list[str] = []
    found = measure_capacity(job(), server(capacity, latency_s), say=said.append)
    assert found.rate_rps == pytest.approx(capacity, rel=0.15)
    assert found.stay_s > latency_s
    assert 2 <= len(said) <= 11
    assert any("piles up" in text for text in said)


def test_a_server_whose_backlog_always_grows() -> None:
    def replay(job: ReplayJob) -> Replay:
        found = server(5.0)(job)
        if "probe" in job.prefix:
            for result in found.results:
                result.status, result.token_times_s = "aborted", []
        return found

    with pytest.raises(RuntimeError, match="no rate above"):
        measure_capacity(job(), replay)


def test_prefixes_are_shared_as_far_as_in_a_turn_and_not_beyond() -> None:
    blocks = (7,), (7, 8), (), (7,)
    rows = [TraceRequest(i * 0.3, 100, 2, prefix_blocks=b) for i, b in enumerate(blocks)]
    trace = make_trace("t", rows, prefix_block_tokens=50)
    shared = ReplayJob("http://x", "m", trace, uniform_vocabulary(0, 9), (0,), "cap")
    runs = []

    def replay(job: ReplayJob) -> Replay:
        runs.append([r.prefix_blocks for r in job.trace.requests])
        return server(1.0)(job)

    measure_capacity(shared, replay, span_s=10.0, turn_requests=lambda rps: 3)
    overload = runs[1]
    assert len(overload) > 60
    stretches = [overload[i : i + 3] for i in range(0, len(overload), 3)]
    names = [{name for blocks in stretch for name in blocks} for stretch in stretches]
    assert overload[0][0] == overload[1][0], "shared within a turn"
    assert not any(a & b for i, a in enumerate(names) for b in names[:i])


def test_nothing_completes() -> None:
    def replay(job: ReplayJob) -> Replay:
        result = ClientResult("0", 0.0, "failed", error="HTTP 400: too long")
        return Replay([result], ClientUsage(0, 1, 0, 0, 0))

    with pytest.raises(RuntimeError, match="too long"):
        measure_capacity(job(), replay)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_a_load_is_a_share_of_the_capacity_whatever_times_are_scaled_by(scale: float) -> None:
    workload = WorkloadOptions(scale_time=scale, requests=400)
    options = BenchOptions(load_trace("burst"), workload, load=0.5, capacity_rps=20.0)
    unused: Any = None
    session = BenchSession(options, [], unused, unused, unused, unused)
    session.settle_rate(unused, unused)
    trace = build_workload(options.trace, session.sized_workload(), 0)
    assert len(trace) / trace.span_s == pytest.approx(10.0, rel=0.02)
