"""Metrics against numbers worked out by hand."""

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.records.schema import RequestRecord
from gimbal.report.metrics import Slo, balance, duration_s, parse_slo, samples, summarize


def record(index: int, sent: float, times: list[float], **other: object) -> RequestRecord:
    values: dict = {
        "request_id": f"r{index}",
        "arm": "a",
        "repeat": 0,
        "arrival_s": sent,
        "sent_s": sent,
        "prompt_tokens": 100,
        "output_tokens": len(times),
        "expected_output_tokens": len(times),
        "first_token_s": times[0] if times else None,
        "last_token_s": times[-1] if times else None,
        "token_times_s": tuple(times),
        "index": index,
    }
    return RequestRecord(**(values | other))


RUN = [
    record(0, 1.0, [1.5, 1.6, 1.9]),  # ttft 500, tpot 200, itl 100 300, e2e 900
    record(1, 2.0, [2.1]),  # ttft 100, one token, e2e 100
    record(2, 2.0, [3.0, 3.5]),  # ttft 1000, tpot 500, itl 500, e2e 1500
    record(3, 3.0, [], status="rejected", error="HTTP 503"),
    record(4, 3.0, [3.2], status="failed", output_tokens=1),
]


def test_hand_computed_run() -> None:
    result = summarize([RUN], Slo(ttft_ms=600, tpot_ms=300))
    assert result["requests"] == 5
    assert result["completed"] == 3
    assert result["rejected"] == 1
    assert result["failed"] == 1
    ttft, tpot, itl, e2e = (result[k] for k in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"))
    # numpy's linear percentiles of [100, 500, 1000]: P90 at index 1.8, P99 at 1.98.
    assert ttft == pytest.approx({"mean": 533.333, "p50": 500, "p90": 900, "p99": 990}, rel=1e-5)
    assert tpot == pytest.approx({"mean": 350, "p50": 350, "p90": 470, "p99": 497})
    assert itl == pytest.approx({"mean": 300, "p50": 300, "p90": 460, "p99": 496})
    assert e2e["mean"] == pytest.approx(833.333, rel=1e-5)
    # From the first post at 1.0 s to the last token of a completed request at 3.5 s.
    assert result["duration_s"] == pytest.approx(2.5)
    assert result["throughput_rps"] == pytest.approx(3 / 2.5)
    assert result["output_tokens_per_s"] == pytest.approx(6 / 2.5)
    assert result["prompt_tokens_per_s"] == pytest.approx(300 / 2.5)
    # Requests 0 and 1: one token counts as TPOT 0.
    assert result["goodput_rps"] == pytest.approx(2 / 2.5)


def test_tokens_that_came_bundled_count_for_tpot_by_their_number() -> None:
    bundled = record(0, 0.0, [1.0, 2.0], output_tokens=5)
    assert samples([bundled]).tpot_ms == pytest.approx([250.0])
    assert samples([bundled]).itl_ms[0] == pytest.approx([1000.0])


def test_repeats_pool_latencies_and_add_time() -> None:
    result = summarize([RUN, RUN], Slo())
    assert result["completed"] == 6
    assert result["duration_s"] == pytest.approx(5.0)
    assert result["throughput_rps"] == pytest.approx(6 / 5)
    assert result["goodput_rps"] == result["throughput_rps"]
    assert result["ttft_ms"]["mean"] == pytest.approx(533.333, rel=1e-5)


def test_a_run_where_nothing_completes() -> None:
    result = summarize([[RUN[3]]], Slo(ttft_ms=1))
    assert result["completed"] == 0
    assert result["ttft_ms"]["p99"] is None
    assert result["throughput_rps"] == 0.0
    assert duration_s([RUN[3]]) == 0.0


def test_slo_text() -> None:
    assert parse_slo("ttft_ms=2000,tpot_ms=200") == Slo(2000.0, 200.0)
    assert parse_slo("") == Slo()
    for bad in ("ttft=1", "ttft_ms=soon", "ttft_ms=-3", "ttft_ms"):
        with pytest.raises(InputError, match="--slo"):
            parse_slo(bad)


def test_balance() -> None:
    assert balance({0: 30.0, 1: 10.0})["max_over_mean"] == 1.5
    assert balance({})["max_over_mean"] is None
    assert np.isclose(balance({0: 0.0, 1: 0.0})["max_over_mean"] or 0.0, 0.0)
