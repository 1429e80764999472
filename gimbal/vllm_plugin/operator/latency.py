"""Latencies of the last seconds from histograms that the server keeps anyway.

What is read are cumulative counts by upper bound; a quantile of what came since an earlier reading
is interpolated within its bucket, as Prometheus' ``histogram_quantile`` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Buckets = dict[float, float]
"""Upper bound in seconds, infinity the last -> requests at or below it since the start."""

TTFT, TPOT = "ttft", "tpot"
QUEUE = "queue "
"""Before the size class of prompts whose waits are counted."""
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": TTFT,
    "vllm:request_time_per_output_token_seconds": TPOT,
    "gimbal_queue_time_seconds": QUEUE,
}
_SIZE = "uncached_tokens"


def read_histograms() -> dict[str, Buckets]:
    """This process's latencies by what they are, of all engines together; empty without metrics."""
    from prometheus_client import REGISTRY

    found: dict[str, Buckets] = {}
    names = [f"{name}_bucket" for name in _HISTOGRAMS]
    for family in REGISTRY.restricted_registry(names).collect():
        for sample in family.samples:
            bound = float(sample.labels.get("le", math.nan))
            if math.isnan(bound):
                continue
            kind = _HISTOGRAMS[family.name] + sample.labels.get(_SIZE, "")
            buckets = found.setdefault(kind, {})
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
    return found


def added(parts: Sequence[Mapping[str, Buckets]]) -> dict[str, Buckets]:
    """The latencies of several front ends as one."""
    total: dict[str, Buckets] = {}
    for part in parts:
        for kind, buckets in part.items():
            into = total.setdefault(kind, {})
            for bound, count in buckets.items():
                into[bound] = into.get(bound, 0.0) + count
    return total


def since(now: Buckets, before: Buckets) -> Buckets:
    """What came after the reading `before`; a front end that has gone takes none away."""
    return {bound: max(count - before.get(bound, 0.0), 0.0) for bound, count in now.items()}


def count(buckets: Buckets) -> float:
    """Requests in `buckets`."""
    return max(buckets.values(), default=0.0)


def quantile_ms(buckets: Buckets, share: float) -> float | None:
    """Milliseconds that `share` of the requests took at most; None without requests.

    Beyond the last finite bound it is that bound.
    """
    wanted = share * count(buckets)
    if wanted <= 0.0:
        return None
    below, counted = 0.0, 0.0
    for bound, cumulative in sorted(buckets.items()):
        if cumulative >= wanted:
            if math.isinf(bound):
                break
            part = (wanted - counted) / max(cumulative - counted, 1e-9)
            return round(1e3 * (below + (bound - below) * part), 2)
        below, counted = bound, cumulative
    return round(1e3 * below, 2)


def to_lists(latencies: Mapping[str, Buckets]) -> dict[str, list[list[float | str]]]:
    """As JSON holds them."""
    return {k: [[str(b), c] for b, c in buckets.items()] for k, buckets in latencies.items()}


def from_lists(lists: Mapping[str, list[list[float | str]]]) -> dict[str, Buckets]:
    """What `to_lists` wrote; raises ValueError or TypeError for anything else."""
    return {k: {float(b): float(c) for b, c in pairs} for k, pairs in lists.items()}
