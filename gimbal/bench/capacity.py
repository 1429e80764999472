"""How many requests per second a server can do of a given workload: what ``--load`` is a share of.

Two short phases. A burst of a few requests gives a crude rate c0: 80 % of them by the time those
take (the last few may be long outputs that say nothing about rates). Then the workload arrives at
twice c0 for `SPAN_S` seconds; capacity is the number of requests that end well in the last 70 %
of that time, divided by it: by then prefill and decode are mixed as in steady work, and the queue
is never empty. If the server kept up (more than 90 % of the arrival rate) it was not overloaded,
and the second phase is run again at twice the rate.

Prompts that share prefixes find the more of them cached the longer a run is. A measured turn begins
with empty caches and has so many requests; the overload is therefore cut into stretches of that
many, and no prefix is shared beyond its stretch.

Outputs longer than the span never end within it, so the decode batch is a little below its steady
size and the figure a little high for traces with very long outputs.
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
ATTEMPTS = 3


def measure_capacity(
    job: ReplayJob,
    replay: Callable[[ReplayJob], Replay],
    span_s: float = SPAN_S,
    turn_requests: Callable[[float], int] | None = None,
) -> float:
    """Requests per second that the server of `job` completes of its trace.

    Args:
        job: what to replay, and where.
        replay: runs a job; it is passed in so that a test can do without a server.
        span_s: arrivals of the overload.
        turn_requests: requests of a turn at a server that can do so many per second; without it
            prefixes are shared as far as `job.trace` goes.

    Raises RuntimeError when nothing completes.
    """
    trace = job.trace
    now = replace(trace, requests=tuple(replace(r, arrival_s=0.0) for r in trace.requests))
    few = replace(now, requests=now.requests[:BURST_REQUESTS])
    burst = replay(replace(job, trace=few, prefix=f"{job.prefix}-burst", grace_s=span_s))
    crude = crude_rate(burst.results)
    stretch = len(trace) if turn_requests is None else turn_requests(crude)
    rate = OVERLOAD * crude
    for attempt in range(ATTEMPTS):
        overload = set_rate(_repeated(trace, max(2, round(rate * span_s)), stretch), rate)
        run = replay(
            replace(
                job,
                trace=overload,
                prefix=f"{job.prefix}-over{attempt}",
                salt=(*job.salt, attempt + 1),
                grace_s=0.0,
            )
        )
        measured = steady_rate(run.results, overload.span_s)
        if measured < 0.9 * rate:
            break
        rate *= OVERLOAD
    if measured <= 0:
        raise RuntimeError(f"no request of the capacity run ended within {span_s:g} s")
    return measured


def crude_rate(results: Sequence[ClientResult]) -> float:
    """Four fifths of the completed requests of a burst, by the time they took."""
    ends = sorted(r.ended_s for r in results if r.status == "ok")
    if not ends:
        errors = sorted({str(r.error) for r in results})
        raise RuntimeError(f"no request of the capacity run completed: {'; '.join(errors)[:300]}")
    count = max(1, int(0.8 * len(ends)))
    return count / ends[count - 1]


def steady_rate(results: Sequence[ClientResult], span_s: float) -> float:
    """Requests that ended well in the last 70 % of the arrival span, by that time."""
    begin = STEADY_FROM * span_s
    ended = [r for r in results if r.status == "ok" and begin < r.ended_s <= span_s]
    return len(ended) / (span_s - begin) if span_s > 0 else 0.0


def _repeated(trace: Trace, count: int, stretch: int) -> Trace:
    """The first `count` requests; a shorter trace starts over, after its own mean gap.

    Every `stretch` requests the prefix blocks get other names: nothing is shared across.
    """
    rows: list[TraceRequest] = []
    shift = 0.0
    gap = trace.span_s / max(1, len(trace) - 1)
    while len(rows) < count:
        rows += [replace(r, arrival_s=r.arrival_s + shift) for r in trace.requests]
        shift = rows[-1].arrival_s + gap
    names = 1 + max((max(r.prefix_blocks, default=0) for r in trace.requests), default=0)
    length = max(1, min(stretch, len(trace)))
    return replace(
        trace,
        requests=tuple(
            replace(r, prefix_blocks=tuple(b + i // length * names for b in r.prefix_blocks))
            for i, r in enumerate(rows[:count])
        ),
    )
