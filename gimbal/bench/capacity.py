"""How many requests per second a server can do of a given workload: what ``--load`` is a share of.

Two short phases. A burst of a few requests gives a crude rate c0 (their number by the time they
take). Then the workload arrives at twice c0 for about `SPAN_S` seconds, which overloads the
server; capacity is the number of requests that end in the last 70 % of that time, divided by it:
by then prefill and decode are mixed as in steady work, and the queue is never empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from gimbal.bench.client import ClientResult, Replay
from gimbal.bench.client_process import ReplayJob
from gimbal.workloads import Trace, TraceRequest
from gimbal.workloads.transform import set_rate

BURST_REQUESTS = 48
SPAN_S = 30.0
OVERLOAD = 2.0
STEADY_FROM = 0.3


def measure_capacity(
    job: ReplayJob, replay: Callable[[ReplayJob], Replay], span_s: float = SPAN_S
) -> float:
    """Requests per second that the server of `job` completes of its trace.

    `replay` runs a job; it is passed in so that a test can do without a server. Raises
    RuntimeError when nothing completes.
    """
    trace = job.trace
    now = replace(trace, requests=tuple(replace(r, arrival_s=0.0) for r in trace.requests))
    few = replace(now, requests=now.requests[:BURST_REQUESTS])
    burst = replay(replace(job, trace=few, prefix=f"{job.prefix}-burst"))
    done = [r for r in burst.results if r.status == "ok"]
    if not done:
        errors = {r.error for r in burst.results}
        raise RuntimeError(f"no request of the capacity run completed: {sorted(map(str, errors))}")
    crude = len(done) / max(r.ended_s for r in done)
    rate = OVERLOAD * crude
    count = max(2, round(rate * span_s))
    overload = set_rate(_repeated(trace, count), rate)
    run = replay(
        replace(job, trace=overload, prefix=f"{job.prefix}-over", salt=(*job.salt, 1), grace_s=0.0)
    )
    return max(steady_rate(run.results, overload.span_s), crude * 0.1)


def steady_rate(results: Sequence[ClientResult], span_s: float) -> float:
    """Requests that ended well in the last 70 % of the arrival span, by that time."""
    begin = STEADY_FROM * span_s
    ended = [r for r in results if r.status == "ok" and begin < r.ended_s <= span_s]
    return len(ended) / (span_s - begin) if span_s > 0 else 0.0


def _repeated(trace: Trace, count: int) -> Trace:
    """The first `count` requests; a shorter trace starts over, after its own mean gap."""
    rows: list[TraceRequest] = []
    shift = 0.0
    gap = trace.span_s / max(1, len(trace) - 1)
    while len(rows) < count:
        rows += [replace(r, arrival_s=r.arrival_s + shift) for r in trace.requests]
        shift = rows[-1].arrival_s + gap
    # The starting-over copies share their prefixes with the first pass, as their hash ids say,
    # and nothing else: the rest of a prompt depends on its position.
    return replace(trace, requests=tuple(rows[:count]))
