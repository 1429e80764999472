"""Latency, throughput and goodput of one arm, with the definitions of ``vllm bench serve``.

Only requests that completed count for latencies. TTFT: post to first token. E2E: post to last
token. TPOT: (E2E - TTFT) / (output tokens - 1), for requests of two tokens or more. ITL: gaps
between consecutive token events, pooled over requests. Throughput: completed requests, or their
output tokens, by the time from the first post to the last token. Goodput: completed requests that
meet every stated SLO, by the same time; a one-token request has TPOT 0 there.

With a window (`gimbal.report.window`) latencies are those of the requests that arrive in it, and
throughput and goodput count what ends in it, by its length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gimbal.core.errors import InputError, nearest
from gimbal.core.numbers import real
from gimbal.records.schema import RequestRecord
from gimbal.report.window import Window

FloatArray = npt.NDArray[np.float64]

LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
STATISTICS = ("mean", "p50", "p90", "p99")
SLO_KEYS = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds that a good request keeps; None does not limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def limits(self) -> dict[str, float]:
        """The stated limits by name."""
        return {k: v for k in SLO_KEYS if (v := getattr(self, k)) is not None}


def parse_slo(text: str) -> Slo:
    """Reads ``ttft_ms=2000,tpot_ms=200``; raises InputError naming the bad part."""
    limits: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key.strip() not in SLO_KEYS:
            raise InputError(f"--slo {part!r}: unknown metric {key!r}{nearest(key, SLO_KEYS)}")
        limits[key.strip()] = real(value, f"--slo {key.strip()}=", above=0.0)
    return Slo(**limits)


@dataclass(frozen=True)
class Samples:
    """Per-request values of completed requests, in the order of `request_ids`.

    Attributes:
        request_ids: [completed].
        ttft_ms, tpot_ms, e2e_ms: [completed]; tpot is NaN for one-token requests.
        itl_ms: [completed] arrays of gaps between the request's token events.
        output_tokens: [completed].
    """

    request_ids: tuple[str, ...]
    ttft_ms: FloatArray
    tpot_ms: FloatArray
    e2e_ms: FloatArray
    itl_ms: tuple[FloatArray, ...]
    output_tokens: FloatArray

    def good(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """[completed] whether each request keeps every limit."""
        kept = np.ones(len(self.request_ids), dtype=bool)
        for name, limit in slo.limits().items():
            kept &= np.nan_to_num(getattr(self, name), nan=0.0) <= limit
        return kept


def samples(records: Sequence[RequestRecord]) -> Samples:
    """The completed requests among `records`."""
    done = [r for r in records if r.status == "ok" and r.first_token_s is not None]
    first = np.array([r.first_token_s for r in done], dtype=np.float64)
    last = np.array([r.last_token_s for r in done], dtype=np.float64)
    sent = np.array([r.sent_s for r in done], dtype=np.float64)
    tokens = np.array([r.output_tokens for r in done], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(tokens > 1, (last - first) / (tokens - 1), np.nan)
    gaps = tuple(np.diff(np.array(r.token_times_s)) * 1e3 for r in done)
    return Samples(
        tuple(r.request_id for r in done),
        (first - sent) * 1e3,
        tpot * 1e3,
        (last - sent) * 1e3,
        gaps,
        tokens,
    )


def duration_s(records: Sequence[RequestRecord]) -> float:
    """From the first post to the last token of one run; 0 without a completed request."""
    ends = [r.last_token_s for r in records if r.last_token_s is not None and r.status == "ok"]
    return max(ends) - min(r.sent_s for r in records) if ends else 0.0


def statistics(values: FloatArray) -> dict[str, float | None]:
    """Mean, P50, P90, P99 (linear interpolation); None where there is no value."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return dict.fromkeys(STATISTICS)
    p50, p90, p99 = np.percentile(finite, [50, 90, 99])
    return {"mean": float(finite.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def pooled_itl_ms(sample: Samples) -> FloatArray:
    """[gaps] of all requests together."""
    return np.concatenate(sample.itl_ms) if sample.itl_ms else np.empty(0)


def summarize(
    runs: Sequence[Sequence[RequestRecord]], slo: Slo, window: Window | None = None
) -> dict[str, object]:
    """One arm's figures over its runs (one per repeat): pooled latencies, total rates.

    The keys are those of ``--json``.
    """
    records = ended = [record for run in runs for record in run]
    total_s = sum(duration_s(run) for run in runs)
    if window is not None:
        records, ended = window.arrived(records), window.ended(records)
        total_s = len(runs) * window.seconds
    sample, finished = samples(records), samples(ended)

    def rate(count: float) -> float:
        return float(count) / total_s if total_s > 0 else 0.0

    by_status = {s: sum(r.status == s for r in records) for s in ("rejected", "failed", "aborted")}
    prompt_tokens = sum(r.prompt_tokens for r in ended if r.status == "ok")
    return {
        "requests": len(records),
        "completed": len(sample.request_ids),
        **by_status,
        "ttft_ms": statistics(sample.ttft_ms),
        "tpot_ms": statistics(sample.tpot_ms),
        "itl_ms": statistics(pooled_itl_ms(sample)),
        "e2e_ms": statistics(sample.e2e_ms),
        "throughput_rps": rate(len(finished.request_ids)),
        "prompt_tokens_per_s": rate(prompt_tokens),
        "output_tokens_per_s": rate(finished.output_tokens.sum()),
        "goodput_rps": rate(int(finished.good(slo).sum())),
        "duration_s": total_s,
    }


def balance(requests_by_engine: Mapping[int, float]) -> dict[str, object]:
    """How evenly engines were used: counts by engine and busiest over mean (1 is even)."""
    counts = [requests_by_engine[e] for e in sorted(requests_by_engine)]
    mean = sum(counts) / len(counts) if counts else 0.0
    return {
        "by_engine": {str(e): requests_by_engine[e] for e in sorted(requests_by_engine)},
        "max_over_mean": max(counts) / mean if mean else None,
    }
