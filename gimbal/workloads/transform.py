"""Transformations of a trace: each takes a `Trace` and returns another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gimbal.core.numbers import MOST_SECONDS, MOST_TOKENS, real, whole
from gimbal.workloads.arrivals import LEAST_RPS, arrival_times_s
from gimbal.workloads.distributions import draw
from gimbal.workloads.trace import Trace, TraceRequest


def window(trace: Trace, count: int, rng: np.random.Generator) -> Trace:
    """`count` requests: consecutive ones from a random place, or a random draw of lengths.

    Consecutive, because bursts and shared prefixes live in neighbourhoods. A timed trace that is
    shorter than `count` is repeated.
    """
    if not trace.has_arrivals:
        replacing = count > len(trace)
        chosen = rng.choice(len(trace), size=count, replace=replacing)
        return replace(trace, requests=tuple(trace.requests[i] for i in chosen))
    if count > len(trace):
        return repeated(trace, count, int(rng.integers(0, len(trace))))
    start = int(rng.integers(0, len(trace) - count + 1))
    chosen_requests = trace.requests[start : start + count]
    first = chosen_requests[0].arrival_s
    return replace(
        trace,
        requests=tuple(replace(r, arrival_s=r.arrival_s - first) for r in chosen_requests),
    )


def repeated(trace: Trace, count: int, start: int = 0) -> Trace:
    """`count` requests from `start` on; after the last one the first follows, at the mean gap.

    A later pass shares neither sessions nor prefixes with an earlier one: nobody asks the same
    twice, and a cache that holds the first pass must not serve the second.
    """
    rows = trace.requests[start:] + trace.requests[:start]
    lap_s = trace.span_s * len(rows) / max(1, len(rows) - 1)
    names = 1 + max((max(r.prefix_blocks, default=0) for r in rows), default=0)

    def row(place: int) -> TraceRequest:
        turn, at = divmod(place, len(rows))
        request = rows[at]
        lap = turn + (at >= len(rows) - start)  # of the trace's time
        named = request.session is not None and turn
        return replace(
            request,
            arrival_s=request.arrival_s + lap * lap_s - rows[0].arrival_s,
            session=f"{request.session}~{turn}" if named else request.session,
            prefix_blocks=tuple([block + turn * names for block in request.prefix_blocks]),
        )

    note = (
        f"{count} requests wanted, the trace has {len(rows)}: it is repeated, each pass with "
        "sessions and prefixes of its own"
    )
    return replace(trace, requests=tuple(row(i) for i in range(count)), notes=(*trace.notes, note))


def reshape_lengths(trace: Trace, distribution: str, count: int, rng: np.random.Generator) -> Trace:
    """`count` requests whose prompt lengths follow one of `distributions.DISTRIBUTIONS`.

    Rows keep their prompt, output, session and prefix; arrivals stay those of the first `count`
    rows, of a shorter trace repeated, so only lengths change.
    """
    if trace.has_arrivals and count > len(trace):
        trace = repeated(trace, count)
    chosen = draw(distribution, trace.prompt_tokens, count, rng)
    rows = []
    for position, index in enumerate(chosen):
        arrival = trace.requests[position].arrival_s if trace.has_arrivals else 0.0
        rows.append(replace(trace.requests[int(index)], arrival_s=arrival))
    return replace(trace, name=f"{trace.name}-{distribution}", requests=tuple(rows))


def generate_arrivals(
    trace: Trace, process: str, rate_rps: float, cv: float, rng: np.random.Generator
) -> Trace:
    """The same requests in the same order with generated arrival times."""
    times = arrival_times_s(process, len(trace), rate_rps, cv, rng)
    rows = tuple(replace(r, arrival_s=float(t)) for r, t in zip(trace.requests, times, strict=True))
    return replace(trace, requests=rows, has_arrivals=True)


def scale_time(trace: Trace, factor: float) -> Trace:
    """Arrival times multiplied by `factor` (2 halves the rate)."""
    return _stretched(trace, real(factor, "--scale-time ", above=0.0))


def _stretched(trace: Trace, factor: float) -> Trace:
    rows = tuple(replace(r, arrival_s=r.arrival_s * factor) for r in trace.requests)
    real(rows[-1].arrival_s if rows else 0.0, "arrival of the last request, s ", most=MOST_SECONDS)
    return replace(trace, requests=rows)


def set_rate(trace: Trace, rate_rps: float) -> Trace:
    """Time scaled so that the mean arrival rate is `rate_rps`; the pattern of bursts stays."""
    rate_rps = real(rate_rps, "--rate ", LEAST_RPS)
    if trace.rate_rps == 0:
        return trace
    return _stretched(trace, trace.rate_rps / rate_rps)


def scale_lengths(trace: Trace, factor: float) -> Trace:
    """Prompt, output and prefix-block sizes multiplied by `factor`, at least one token each.

    Shared fractions of prompts stay what they were, which cutting would not keep.
    """
    factor = real(factor, "--scale-length ", above=0.0)
    longest = max((max(r.prompt_tokens, r.output_tokens) for r in trace.requests), default=0)
    whole(round(longest * factor), "--scale-length: longest of the trace ", most=MOST_TOKENS)
    block = max(1, round(trace.prefix_block_tokens * factor)) if trace.prefix_block_tokens else 0

    def scaled(request: TraceRequest) -> TraceRequest:
        prompt = max(1, round(request.prompt_tokens * factor))
        output = max(1, round(request.output_tokens * factor))
        return _fit_blocks(replace(request, prompt_tokens=prompt, output_tokens=output), block)

    rows = tuple(scaled(r) for r in trace.requests)
    return replace(trace, requests=rows, prefix_block_tokens=block)


def limit_lengths(
    trace: Trace,
    max_prompt: int | None = None,
    max_output: int | None = None,
    max_total: int | None = None,
) -> Trace:
    """Longer prompts and outputs are cut, not dropped: arrivals stay as they are.

    `max_total` (a model's context) cuts the output to at most half of it and the prompt to what
    is left.
    """
    for name, value in (("--max-prompt", max_prompt), ("--max-output", max_output)):
        if value is not None:
            whole(value, f"{name} ", 1)

    def limited(request: TraceRequest) -> TraceRequest:
        prompt, output = request.prompt_tokens, request.output_tokens
        prompt = min(prompt, max_prompt or prompt)
        output = min(output, max_output or output)
        if max_total is not None and prompt + output > max_total:
            output = min(output, max(1, max_total // 2))
            prompt = min(prompt, max_total - output)
        changed = replace(request, prompt_tokens=prompt, output_tokens=output)
        return _fit_blocks(changed, trace.prefix_block_tokens)

    return replace(trace, requests=tuple(limited(r) for r in trace.requests))


def _fit_blocks(request: TraceRequest, block_tokens: int) -> TraceRequest:
    """Drops the hash ids of blocks that a shortened prompt no longer reaches."""
    if not request.prefix_blocks:
        return request
    reached = -(-request.prompt_tokens // block_tokens)
    return replace(request, prefix_blocks=request.prefix_blocks[:reached])


def assign_domains(trace: Trace, domains: tuple[str, ...], rng: np.random.Generator) -> Trace:
    """Gives every request without a domain one of `domains`.

    Requests of one session, and requests that share their second prefix block (the first is
    often a system prompt shared by all), get the same one; the others draw uniformly.
    """
    if not domains:
        return trace
    chosen: dict[object, str] = {}

    def domain_of(request: TraceRequest) -> str:
        if request.domain is not None:
            return request.domain
        if request.session is None and not request.prefix_blocks:
            return domains[int(rng.integers(len(domains)))]
        key: object = request.session or request.prefix_blocks[:2][-1]
        if key not in chosen:
            chosen[key] = domains[int(rng.integers(len(domains)))]
        return chosen[key]

    return replace(trace, requests=tuple(replace(r, domain=domain_of(r)) for r in trace.requests))
