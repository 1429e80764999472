"""Turn order is balanced; the bootstrap finds a known effect and covers it as often as it says."""

from itertools import pairwise

import numpy as np
import pytest

from gimbal.records.schema import RequestRecord
from gimbal.report.compare import _Sorted, compare, nested, turns, williams_order
from gimbal.report.metrics import Slo


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_arm_follows_every_other_equally_often(count: int) -> None:
    rows = williams_order(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    follows = np.zeros((count, count), dtype=int)
    for row in rows:
        for a, b in pairwise(row):
            follows[a, b] += 1
    off_diagonal = follows[~np.eye(count, dtype=bool)]
    assert (np.diag(follows) == 0).all()
    assert len(set(off_diagonal.tolist())) <= 1


def test_two_arms_go_a_b_b_a() -> None:
    assert turns(["A", "B"], 4) == [["A", "B"], ["B", "A"], ["A", "B"], ["B", "A"]]


def test_weighted_percentiles_equal_numpy_on_the_repeated_sample() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(rng.exponential(size=40))
    for _ in range(20):
        counts = rng.integers(0, 4, size=40)
        got = _Sorted(values, np.arange(40)).statistics(counts)
        repeated = np.repeat(values, counts)
        wanted = [repeated.mean(), *np.percentile(repeated, [50, 90, 99])]
        assert list(got.values()) == pytest.approx(wanted)


def runs(
    rng: np.random.Generator, repeats: int, count: int, effect: float
) -> dict[str, list[list[RequestRecord]]]:
    """Two arms with the same requests; B's TTFT is A's times `effect`, with noise of its own."""
    arms: dict[str, list[list[RequestRecord]]] = {"A": [], "B": []}
    for repeat in range(repeats):
        size = rng.lognormal(0, 0.8, count)
        for name, factor in (("A", 1.0), ("B", effect)):
            run_noise = rng.lognormal(0, 0.02)
            ttft = size * factor * run_noise * rng.lognormal(0, 0.1, count)
            arms[name].append(
                [
                    RequestRecord(
                        f"{name}{repeat}-{i}",
                        name,
                        repeat,
                        i,
                        float(i),
                        10,
                        2,
                        2,
                        i + float(t),
                        i + float(t) + 0.5,
                        (i + float(t), i + float(t) + 0.5),
                        index=i,
                    )
                    for i, t in enumerate(ttft)
                ]
            )
    return arms  # fmt: skip


def test_pairing_makes_the_interval_narrow_and_finds_the_effect() -> None:
    arms = runs(np.random.default_rng(1), 4, 150, 0.8)
    ratio = compare(arms, "A", Slo(), np.random.default_rng(2), draws=400)["B"]["ttft_ms.mean"]
    assert ratio.low < ratio.ratio < ratio.high < 1
    # Unpaired, 600 lognormal(0.8) values give an interval of about +-9 % around the ratio.
    assert ratio.high - ratio.low < 0.1


def test_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(3)
    covered = {"ttft_ms.mean": 0, "ttft_ms.p90": 0}
    trials = 60
    for _ in range(trials):
        arms = runs(rng, 6, 60, 0.8)
        ratios = compare(arms, "A", Slo(), rng, draws=200)["B"]
        for metric in covered:
            covered[metric] += ratios[metric].low <= 0.8 <= ratios[metric].high
    # Nominal 95 %; few repeats cost some, binomial noise over 60 trials is about 3 points.
    assert all(0.85 <= n / trials <= 1.0 for n in covered.values()), covered


def test_same_seed_same_interval_and_equal_arms_give_one() -> None:
    arms = runs(np.random.default_rng(4), 2, 40, 1.0)
    arms["B"] = arms["A"]
    first = compare(arms, "A", Slo(ttft_ms=1000), np.random.default_rng(7), draws=50)
    second = compare(arms, "A", Slo(ttft_ms=1000), np.random.default_rng(7), draws=50)
    assert first == second
    for interval in first["B"].values():
        assert (interval.ratio, interval.low, interval.high) == pytest.approx((1, 1, 1))


def test_rates_and_shapes_of_json() -> None:
    arms = runs(np.random.default_rng(5), 2, 40, 0.5)
    slower = [[r for r in run if r.index % 2 == 0] for run in arms["A"]]
    result = compare({"A": arms["A"], "B": slower}, "A", Slo(), np.random.default_rng(0), 100)
    assert result["B"]["throughput_rps"].ratio == pytest.approx(0.5, rel=0.1)
    shaped = nested(result["B"])
    assert set(shaped["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert set(shaped["goodput_rps"]) == {"ratio", "low", "high"}


def test_an_arm_without_a_completed_request_gives_null() -> None:
    arms = runs(np.random.default_rng(6), 1, 10, 1.0)
    arms["B"] = [[RequestRecord("x", "B", 0, 0, 0, 1, 0, 2, None, None, status="failed")]]
    shaped = nested(compare(arms, "A", Slo(), np.random.default_rng(0), 20)["B"])
    assert shaped["ttft_ms"]["mean"]["ratio"] is None


def test_one_repeat_gives_rates_without_interval() -> None:
    arms = runs(np.random.default_rng(8), 1, 30, 0.8)
    shaped = nested(compare(arms, "A", Slo(ttft_ms=900), np.random.default_rng(0), 50)["B"])
    assert shaped["throughput_rps"]["ratio"] is not None
    assert shaped["throughput_rps"]["low"] is None
    assert shaped["goodput_rps"]["low"] is not None
