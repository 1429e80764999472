"""What is kept of the engines' past, and what happened in between."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fastapi")
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ROW_WIDTH, Field
from gimbal.vllm_plugin.operator import latency
from gimbal.vllm_plugin.operator.history import COARSE, FINE, PER_COARSE, History


def rows(engines: int = 10, **values: float | list[float]) -> np.ndarray:
    made = np.zeros((engines, ROW_WIDTH))
    made[:, [Field.EPOCH, Field.SEQUENCE]] = 1.0
    for name, value in values.items():
        made[:, Field[name.upper()]] = value
    return made


def test_engines_become_bands_with_the_worst_one_named() -> None:
    history = History()
    history.add(5.0, rows(10, running_requests=[float(i) for i in range(10)]), 20, 0.0)
    [sample] = history.after("fine", -1)
    assert sample["running"] == [0.9, 4.5, 8.1, 9.0, 29]
    assert sample["t"] == 5.0


def test_pressure_is_the_time_of_the_work_ahead() -> None:
    history = History()
    busy = rows(
        2,
        waiting_prefill_tokens=[0.0, 3000.0],
        running_prefill_tokens=[0.0, 1000.0],
        step_token_budget=2048.0,
        decoding_requests=48.0,
        step_base_us=20000.0,
        prefill_us_per_token=10.0,
    )
    history.add(0.0, busy, 0, 0.0)
    [sample] = history.after("fine", -1)
    # 4,000 tokens at 10 us, and two steps of 2,000 at 20 ms each.
    assert sample["pressure_ms"][3:] == [80.0, 1]


def test_counters_count_from_sample_to_sample() -> None:
    history = History()
    before = rows(2, preemptions=[5.0, 7.0], queue_fallbacks=1.0, placement_proposals=1.0)
    before[:, ACCEPTED_REQUESTS] = 100.0
    history.add(0.0, before, 0, 3.0)
    after = before.copy()
    after[0, Field.PREEMPTIONS] = 6.0
    after[1, [Field.EPOCH, Field.PREEMPTIONS, ACCEPTED_REQUESTS]] = 2.0, 4.0, 9.0  # a new process
    after[:, [Field.PLACEMENT_COMMITS, Field.PLACEMENT_RECEIVED_EXPERTS]] = 1.0, 40.0
    history.add(2.0, after, 0, 5.0)
    first, second = history.after("fine", -1)
    assert [first[name] for name in ("requests", "preempted", "moved")] == [0.0, 0.0, 0.0]
    assert (second["requests"], second["preempted"]) == (9.0, 5.0)
    assert second["fallbacks"] == 2.0 + 1.0
    assert (second["commits"], second["moved"]) == (1.0, 40.0)
    assert second["events"] == ["engine 1 was started anew"]


def test_the_history_is_bounded_and_goes_on_where_a_page_left_off() -> None:
    history = History()
    count = FINE + PER_COARSE
    for second in range(count):
        history.add(2.0 * second, rows(1, preemptions=float(second)), 0, 0.0)
    assert history.taken == {"fine": count, "coarse": count // PER_COARSE}
    assert len(history.after("fine", -1)) == FINE
    assert [s["t"] for s in history.after("fine", count - 2)] == [2.0 * count - 4, 2.0 * count - 2]
    assert history.after("fine", count) == []
    assert len(history.after("fine", count + 1)) == FINE, "another server's number"
    minute = history.after("coarse", -1)[-1]
    assert minute["preempted"] == PER_COARSE
    assert history.spans["coarse"].maxlen == COARSE


def test_a_changed_number_of_engines_counts_nothing_and_says_so() -> None:
    history = History()
    history.add(0.0, rows(2, preemptions=9.0), 0, 0.0)
    history.add(2.0, rows(3, preemptions=9.0), 0, 0.0)
    sample = history.after("fine", 1)[0]
    assert sample["preempted"] == 0.0
    assert sample["events"] == ["2 engines became 3"]


def test_latencies_are_those_since_the_last_reading() -> None:
    history = History()
    then = {latency.TTFT: {0.1: 10.0, 0.2: 10.0, float("inf"): 10.0}}
    now = {latency.TTFT: {0.1: 10.0, 0.2: 14.0, float("inf"): 14.0}}
    assert history.wants_latencies
    history.add(0.0, rows(1), 0, 0.0, then)
    assert not history.wants_latencies
    history.add(10.0, rows(1), 0, 0.0, now)
    assert "ttft" not in history.after("fine", -1)[0]
    assert history.after("fine", 1)[0]["ttft"] == [150.0, 190.0]
    assert history.after("fine", 1)[0]["tpot"] == [None, None]


def test_quantiles_beyond_the_last_bound_are_that_bound() -> None:
    buckets = {0.1: 1.0, 0.5: 1.0, float("inf"): 10.0}
    assert latency.quantile_ms(buckets, 0.9) == 500.0
    assert latency.quantile_ms({}, 0.5) is None
    assert latency.from_lists(latency.to_lists({"x": buckets})) == {"x": buckets}


def test_histograms_of_all_engines_are_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    ttft = prometheus_client.Histogram(
        "vllm:time_to_first_token_seconds",
        "x",
        ("engine",),
        buckets=(0.1, 1.0),
        registry=registry,
    )
    waits = prometheus_client.Histogram(
        "gimbal_queue_time_seconds", "x", ("uncached_tokens",), buckets=(1.0,), registry=registry
    )
    for engine in "01":
        ttft.labels(engine).observe(0.5)
    waits.labels("0-127").observe(3.0)
    assert latency.read_histograms() == {
        "ttft": {0.1: 0.0, 1.0: 2.0, float("inf"): 2.0},
        "queue 0-127": {1.0: 0.0, float("inf"): 1.0},
    }
