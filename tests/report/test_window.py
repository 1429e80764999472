"""A backlog that grows is told from one that wanders; only the window is measured."""

import numpy as np
import pytest

from gimbal.records.schema import RequestRecord
from gimbal.report.metrics import Slo, summarize
from gimbal.report.window import Window, backlog_of

WINDOW = Window(200.0, 600.0)


def record(index: int, arrival_s: float, first_s: float | None, last_s: float | None, size=100):
    status = "ok" if last_s is not None else "aborted"
    return RequestRecord(
        f"r{index}", "a", 0, arrival_s, arrival_s, size, 11, 11, first_s, last_s, status=status
    )  # fmt: skip


def queue(rng, load: float, rate: float = 10.0, end_s: float = 700.0) -> list[RequestRecord]:
    """One server in order of arrival behind Poisson arrivals, then 20 s on average of decode."""
    records, free = [], 0.0
    for index, arrival in enumerate(np.cumsum(rng.exponential(1 / rate, int(rate * end_s)))):
        free = max(free, arrival) + rng.exponential(load / rate)
        last = free + rng.exponential(20.0)
        first = free if free < end_s else None
        records.append(record(index, arrival, first, last if last < end_s else None))
    return records


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_a_backlog_that_wanders_is_bounded(load: float) -> None:
    rng = np.random.default_rng(1)
    found = [backlog_of([queue(rng, load)], WINDOW) for _ in range(40)]
    assert sum(not b.bounded for b in found) <= 2
    # Several runs of one arm are asked together.
    assert backlog_of([queue(rng, load) for _ in range(5)], WINDOW).bounded


@pytest.mark.parametrize("load", [1.2, 1.5, 3.0])
def test_a_backlog_that_grows_is_not(load: float) -> None:
    rng = np.random.default_rng(2)
    found = [backlog_of([queue(rng, load)], WINDOW) for _ in range(20)]
    assert not any(b.bounded for b in found)
    assert np.mean([b.growth for b in found]) == pytest.approx(1 - 1 / load, abs=0.03)


def test_a_ramp_is_no_steady_state() -> None:
    rng = np.random.default_rng(3)
    begins = np.arange(0.0, 700.0, 0.1)
    ends = begins + 500 * rng.random(len(begins))
    rows = [record(i, b, b + 0.1, e) for i, (b, e) in enumerate(zip(begins, ends, strict=True))]
    assert not backlog_of([rows], Window(10.0, 300.0)).bounded
    assert backlog_of([rows], Window(500.0, 690.0)).bounded


def test_a_backlog_that_is_worked_off_is_no_steady_state() -> None:
    rows = [record(i, 0.0, 1.0, 200.0 + i) for i in range(400)]
    rows += [record(400 + i, i, i + 0.1, i + 2.0) for i in range(700)]
    found = backlog_of([rows], WINDOW)
    assert found.bounded
    assert found.falls
    assert found.to_json()["growth"] == pytest.approx(-1.0, abs=0.05)
    rng = np.random.default_rng(5)
    assert sum(backlog_of([queue(rng, 0.7)], WINDOW).falls for _ in range(20)) <= 1


def test_how_long_requests_stay_counts_those_that_never_end() -> None:
    rows = [record(i, 200.0 + i, 200.5 + i, 203.0 + i) for i in range(98)]
    assert backlog_of([rows], WINDOW).residence_s == pytest.approx(3.0)
    rows += [record(i, 300.0, None, None) for i in (98, 99)]
    assert backlog_of([rows], WINDOW).to_json()["residence_p99_s"] is None


def test_latencies_are_of_arrivals_and_rates_of_ends() -> None:
    rows = [
        record(0, 190.0, 191.0, 210.0),  # ends within
        record(1, 250.0, 252.0, 262.0),  # arrives and ends within
        record(2, 590.0, 594.0, 614.0),  # arrives within
        record(3, 600.0, 600.5, 620.0),  # neither: the end is outside
        record(4, 400.0, None, None),  # arrives within and is never done
    ]
    found = summarize([rows], Slo(e2e_ms=15_000), WINDOW)
    assert (found["requests"], found["completed"], found["aborted"]) == (3, 2, 1)
    assert found["ttft_ms"]["mean"] == pytest.approx(3000.0)
    assert found["throughput_rps"] == pytest.approx(2 / 400)
    assert found["goodput_rps"] == pytest.approx(1 / 400)
    assert found["output_tokens_per_s"] == pytest.approx(22 / 400)
    assert found["duration_s"] == 400.0


def test_nothing_is_no_growth() -> None:
    found = backlog_of([[]], WINDOW)
    assert found.bounded
    assert found.to_json() == {
        "bounded": True,
        "falls": False,
        "growth": 0.0,
        "residence_p99_s": 0.0,
    }
