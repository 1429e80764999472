"""The load `gimbal calibrate` sends: phases that between them cover what steps are made of.

Capacity comes first: it warms the server up, and the rest is set by it. Mixed: prompts and answers
of all lengths, at shares of the rate that the server turned out to sustain, because what a step
costs at the batch sizes of a load can only be learned at those batch sizes. Batches: groups that
arrive at once and decode together, by batch size and context. Alone: one prompt at a time. A
machine's speed drifts over minutes, so loads do not come in order of size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gimbal.core.cost.calibrate import StepSample
from gimbal.core.options import Count, Finite
from gimbal.workloads.trace import Trace, TraceRequest, make_trace

SEED = 20
LONGEST_TOKENS = 3000
SHORT_TOKENS = 24
BATCHES = (
    (SHORT_TOKENS, (2, 4, 8, 16, 32, 64, 128)),
    (400, (4, 16, 48, 128)),
    (1500, (4, 16, 64)),
    (2800, (4, 24)),
)
"""(prompt tokens, requests that arrive together): decode batches by size and context."""
BATCH_OUTPUT = 30
ALONE = 10
LOADS = (0.7, 0.4, 0.95, 0.55, 0.85, 1.05)
"""Of the measured capacity, in this order; the batches go into the middle."""
FRONT_END_LOAD = 0.75
"""The front end is timed at loads up to this one: beyond, its share drowns in queueing."""
WARM_UP_S = 12.0
"""Steps of the first seconds are left out: kernels are still being compiled for new shapes."""


def alone(context_tokens: int) -> Trace:
    """Prompts of 8 to `LONGEST_TOKENS` tokens, one at a time."""
    lengths = np.geomspace(8, _longest(context_tokens), ALONE).astype(int)
    rng = np.random.default_rng(SEED)
    return _trace("alone", np.arange(ALONE) * 1.0, rng.permutation(lengths), [8] * ALONE)


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Where the mean request of one phase spent the time to its first token.

    Attributes:
        ttft_us: as the client saw it.
        engine_us: queued and prefilling, by the engine's own clock.
        began_s, ended_s: of the phase, on the clock of the step records.
        requests: how many the means are over.
    """

    ttft_us: Finite
    engine_us: Finite
    began_s: Finite
    ended_s: Finite
    requests: Count


def front_end_us(phases: Sequence[PhaseTimes], samples: Sequence[StepSample]) -> float:
    """What a request spends outside the engine before its first token: mean over `phases`.

    An engine takes new requests up between two steps and starts its clock then. The wait for that
    is not the front end's: a request that comes at any time waits sum(d^2) / (2 * span) on
    average, d being the steps' durations (the simulator has that wait as well).
    """
    total = requests = 0.0
    for phase in phases:
        own = [s for s in samples if phase.began_s <= s.time_s <= phase.ended_s]
        span_us = max(1.0, (phase.ended_s - phase.began_s) * 1e6)
        wait_us = sum(s.duration_us**2 for s in own) / (2 * span_us)
        total += phase.requests * (phase.ttft_us - phase.engine_us - wait_us)
        requests += phase.requests
    return max(0.0, total / requests) if requests else 0.0


def batches(context_tokens: int) -> Trace:
    """`BATCHES`, apart by about the time that a small CPU server takes for each."""
    arrivals: list[float] = []
    prompts: list[int] = []
    now = 0.0
    for prompt, sizes in BATCHES:
        length = min(prompt, _longest(context_tokens))
        for size in sizes:
            arrivals += [now] * size
            prompts += [length] * size
            now += 0.6 + size * (0.02 + length / 18_000)
    return _trace("batches", arrivals, prompts, [BATCH_OUTPUT] * len(prompts))


def mixed(context_tokens: int, requests: int, rate_rps: float, number: int) -> Trace:
    """`requests` with log-normal prompts, exponential outputs and bursty arrivals (gamma, cv 2)."""
    rng = np.random.default_rng([SEED, number])
    gaps = rng.gamma(0.25, 4.0, requests)
    arrivals = np.cumsum(gaps) * (requests / gaps.sum() / rate_rps)
    prompts = np.exp(rng.normal(np.log(150), 1.2, requests)).astype(int)
    outputs = 2 + rng.exponential(40, requests).astype(int)
    longest = _longest(context_tokens)
    return _trace("mixed", arrivals, prompts.clip(4, longest), outputs.clip(2, 200))


def _longest(context_tokens: int) -> int:
    return min(LONGEST_TOKENS, context_tokens - 300)


def _trace(
    name: str,
    arrivals_s: Sequence[float] | np.ndarray,
    prompts: Sequence[int] | np.ndarray,
    outputs: Sequence[int] | np.ndarray,
) -> Trace:
    rows = [
        TraceRequest(float(a), int(p), int(o))
        for a, p, o in zip(arrivals_s, prompts, outputs, strict=True)
    ]
    return make_trace(name, rows)
