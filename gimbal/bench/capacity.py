"""How many requests per second a server can do of a given workload: what ``--load`` is a share of.

Capacity is the largest rate at which the backlog stays bounded (`gimbal.report.window`), as in the
simulator. A burst of a few requests gives a crude rate: 80 % of them by the time those take (the
last few may be long outputs that say nothing about rates). From there on the workload arrives for
`SPAN_S` seconds, `LEAST_REQUESTS` requests, or four times as long as 99 % of them stayed at the
last rate that was sustained, whichever is longest; its backlog is judged over the second half. A
rate that is sustained is doubled, one that is not is halved, and the bracket is bisected to 10 %.

Prompts that share prefixes find the more of them cached the longer a run is. A measured turn begins
with empty caches and has so many requests; a probe is therefore cut into stretches of that many,
and no prefix is shared beyond its stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gimbal.bench.client import ClientResult, Replay
from gimbal.bench.client_process import ReplayJob
from gimbal.records.schema import RequestRecord
from gimbal.report.window import Backlog, Window, backlog_of, residence_s
from gimbal.workloads import Trace, TraceRequest
from gimbal.workloads.transform import set_rate

BURST_REQUESTS = 48
SPAN_S = 30.0
LEAST_REQUESTS = 60
STAYS, LEAST_STAYS = 4.0, 2.0
"""Length of a probe in P99s of the time that requests stay; with less than the second it may show
nothing but how a server fills."""
LONGEST = 16.0
"""Of a probe that fills, in spans."""
OVERLOADED = 0.2
PRECISION = 1.1
MOST_PROBES = 16


class Capacity(NamedTuple):
    """The largest rate that was sustained, and the P99 of the seconds that requests stay at it."""

    rate_rps: float
    stay_s: float


def measure_capacity(
    job: ReplayJob,
    replay: Callable[[ReplayJob], Replay],
    span_s: float = SPAN_S,
    turn_requests: Callable[[float], int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Capacity:
    """Requests per second that the server of `job` sustains of its trace.

    Args:
        job: what to replay, and where.
        replay: runs a job; it is passed in so that a test can do without a server.
        span_s: least arrivals of a probe.
        turn_requests: requests of a turn at a server that can do so many per second; without it
            prefixes are shared as far as `job.trace` goes.
        say: gets one line about each probe.

    Raises RuntimeError when nothing completes, or no rate is sustained.
    """
    trace = job.trace
    now = replace(trace, requests=tuple(replace(r, arrival_s=0.0) for r in trace.requests))
    few = replace(now, requests=now.requests[:BURST_REQUESTS])
    burst = replay(replace(job, trace=few, prefix=f"{job.prefix}-burst", grace_s=span_s))
    rate = crude = crude_rate(burst.results)
    stretch = len(trace) if turn_requests is None else turn_requests(crude)
    best, limit, stay_s, length_s = 0.0, math.inf, 0.0, 0.0
    for attempt in range(MOST_PROBES):
        length_s = max(length_s, span_s, LEAST_REQUESTS / rate, STAYS * stay_s)
        probe = set_rate(_repeated(trace, round(rate * length_s) + 1, stretch), rate)
        run = replay(
            replace(
                job,
                trace=probe,
                prefix=f"{job.prefix}-probe{attempt}",
                salt=(*job.salt, attempt + 1),
                grace_s=0.0,
            )
        )
        backlog = _backlog(run.results, probe)
        stayed_s = _stay_s(run.results, probe.span_s / 2)
        settled = LEAST_STAYS * stayed_s <= length_s
        overload = best > 0 and not backlog.bounded and backlog.growth > OVERLOADED
        found = "sustained" if backlog.bounded else f"{backlog.growth:.0%} piles up"
        say(f"{rate:.2f} requests/s for {length_s:.0f} s: {found if settled or overload else '?'}")
        if not settled and not overload and length_s < LONGEST * span_s:
            length_s *= 2  # it may be a ramp
            continue
        length_s = 0.0
        if settled and backlog.bounded:
            best, stay_s = rate, stayed_s
        else:
            limit = rate
        if limit <= PRECISION * best:
            break
        rate = min(2 * best or limit / 2, math.sqrt(best * limit) or math.inf)
    if not best:
        raise RuntimeError(f"no rate above {limit:.3g} requests/s has a bounded backlog")
    return Capacity(best, stay_s)


def _backlog(results: Sequence[ClientResult], trace: Trace) -> Backlog:
    """What a probe leaves unfinished over the second half of its arrivals."""
    records = [
        RequestRecord(
            request_id=result.request_id,
            arm="",
            repeat=0,
            arrival_s=request.arrival_s,
            sent_s=result.sent_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=result.output_tokens,
            expected_output_tokens=request.output_tokens,
            first_token_s=next(iter(result.token_times_s), None),
            last_token_s=result.ended_s if result.status == "ok" else None,
        )
        for result, request in zip(results, trace.requests, strict=False)
    ]
    return backlog_of([records], Window(trace.span_s / 2, trace.span_s))


def _stay_s(results: Sequence[ClientResult], until_s: float) -> float:
    """P99 of the seconds that the requests of a probe's first half stayed; infinite if unknown."""
    early = [r for r in results if r.sent_s < until_s]
    ends = [r.ended_s if r.status == "ok" else math.inf for r in early]
    return residence_s(np.array(ends) - np.array([r.sent_s for r in early]))


def crude_rate(results: Sequence[ClientResult]) -> float:
    """Four fifths of the completed requests of a burst, by the time they took."""
    ends = sorted(r.ended_s for r in results if r.status == "ok")
    if not ends:
        errors = sorted({str(r.error) for r in results})
        raise RuntimeError(f"no request of the capacity run completed: {'; '.join(errors)[:300]}")
    count = max(1, int(0.8 * len(ends)))
    return count / ends[count - 1]


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
