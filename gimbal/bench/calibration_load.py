"""The load `gimbal calibrate` sends: phases that between them cover what steps are made of."""

from __future__ import annotations

import numpy as np

from gimbal.workloads.trace import Trace, TraceRequest, make_trace

SEED = 20
LONGEST_TOKENS = 3000


def phases(context_tokens: int) -> list[tuple[str, Trace]]:
    """(what it covers, requests) in order; lengths fit into `context_tokens`."""
    rng = np.random.default_rng(SEED)
    longest = min(LONGEST_TOKENS, context_tokens - 300)

    def lengths(count: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(8), np.log(longest), count)).astype(int)

    def trace(name: str, arrivals_s: np.ndarray, prompts: np.ndarray, outputs: np.ndarray) -> Trace:
        rows = [
            TraceRequest(float(a), int(p), int(o))
            for a, p, o in zip(arrivals_s, prompts, outputs, strict=True)
        ]
        return make_trace(name, rows)

    one_by_one = trace("prefill", np.arange(16) * 2.0, lengths(16), np.full(16, 4))
    ramp = trace("decode", np.arange(48) * 0.25, np.full(48, 24), np.linspace(120, 40, 48))
    context = trace("context", np.arange(12) * 1.0, np.full(12, longest * 2 // 3), np.full(12, 60))
    gaps = rng.gamma(0.25, 4 / 4.0, 100)
    mixed = trace("mixed", np.cumsum(gaps), lengths(100), rng.integers(1, 80, 100))
    return [
        ("prefill, one prompt at a time", one_by_one),
        ("decode, growing and shrinking batches", ramp),
        ("decode with long contexts", context),
        ("prefill and decode mixed", mixed),
    ]
