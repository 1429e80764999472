"""Turn order is balanced; intervals find a known effect, cover it as often as they say, and an arm
against itself shows no difference."""

from itertools import pairwise

import numpy as np
import pytest

from gimbal.records.schema import RequestRecord
from gimbal.report.compare import LEAST_TURNS, compare, nested, turns, whole_turns, williams_order
from gimbal.report.metrics import Slo
from gimbal.report.student import quantile, within


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
    arms = runs(np.random.default_rng(1), 6, 150, 0.8)
    ratio = compare(arms, "A", Slo())["B"]["ttft_ms.mean"]
    assert ratio.low < ratio.ratio < ratio.high < 1
    assert ratio.differs
    # Unpaired, 900 lognormal(0.8) values give an interval of about +-8 % around the ratio.
    assert ratio.high - ratio.low < 0.1


def test_interval_covers_the_true_ratio() -> None:
    rng = np.random.default_rng(3)
    covered = {"ttft_ms.mean": 0, "ttft_ms.p90": 0}
    trials = 200
    for _ in range(trials):
        ratios = compare(runs(rng, 5, 60, 0.8), "A", Slo())["B"]
        for metric in covered:
            covered[metric] += ratios[metric].low <= 0.8 <= ratios[metric].high
    # Nominal 95 %; binomial noise over 200 trials is about 1.5 points.
    assert all(0.9 <= n / trials <= 0.99 for n in covered.values()), covered


@pytest.mark.parametrize("repeats", range(1, 10))
def test_an_arm_against_itself_shows_no_difference(repeats: int) -> None:
    """With as many requests as one likes: what is noisy is the turn."""
    rng = np.random.default_rng(repeats)
    trials, coloured, outside = 60, 0, 0
    for _ in range(trials):
        ratios = compare(runs(rng, repeats, 40, 1.0), "A", Slo(ttft_ms=1200))["B"]
        coloured += any(i.differs for i in ratios.values())
        outside += any(i.low > 1 or i.high < 1 for i in ratios.values())
        if repeats < LEAST_TURNS:
            assert not any(np.isfinite([i.low, i.high]).any() for i in ratios.values())
            assert {i.differs for i in ratios.values()} == {None}
    # One in twenty comparisons as a whole; asked one by one, some ratio of most would differ.
    assert coloured <= 8
    if repeats >= LEAST_TURNS:
        assert outside > coloured + 5


def test_the_same_figures_differ_in_nothing() -> None:
    arms = runs(np.random.default_rng(4), 5, 40, 1.0)
    arms["B"] = arms["A"]
    for interval in compare(arms, "A", Slo(ttft_ms=1000))["B"].values():
        assert (interval.ratio, interval.low, interval.high) == pytest.approx((1, 1, 1))
        assert interval.differs is False


def test_a_loss_stands_beside_many_rows_without_one() -> None:
    arms = runs(np.random.default_rng(9), 6, 400, 1.2)
    found = compare(arms, "A", Slo())["B"]
    assert found["ttft_ms.mean"].differs
    assert not found["tpot_ms.mean"].differs  # the same half second in both


def test_rates_and_shapes_of_json() -> None:
    arms = runs(np.random.default_rng(5), 2, 40, 0.5)
    slower = [[r for r in run if r.index % 2 == 0] for run in arms["A"]]
    result = compare({"A": arms["A"], "B": slower}, "A", Slo())
    assert result["B"]["throughput_rps"].ratio == pytest.approx(0.5, rel=0.1)
    shaped = nested(result["B"])
    assert set(shaped["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert set(shaped["goodput_rps"]) == {"ratio", "low", "high", "differs"}


def test_an_arm_without_a_completed_request_gives_null() -> None:
    arms = runs(np.random.default_rng(6), 6, 10, 1.0)
    lost = RequestRecord("x", "B", 0, 0, 0, 1, 0, 2, None, None, status="failed")
    arms["B"] = [[lost]] * 6
    shaped = nested(compare(arms, "A", Slo())["B"])
    assert shaped["ttft_ms"]["mean"] == dict.fromkeys(("ratio", "low", "high", "differs"))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 30, 5000])
def test_students_t_is_as_tabled(freedom: int) -> None:
    tabled = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042}
    assert quantile(freedom) == pytest.approx(tabled.get(freedom, 1.96), abs=3e-3)
    assert within(quantile(freedom), freedom) == pytest.approx(0.95)
    assert quantile(freedom, 0.999) > quantile(freedom, 0.99) > quantile(freedom)


def test_whole_turns_are_those_that_every_arm_has_run() -> None:
    both = runs(np.random.default_rng(1), 3, 4, 1.0)
    records = [*both["B"][2], *both["A"][0], *both["B"][0], *both["A"][2], *both["A"][1]]
    whole = {name: [own[0], own[2]] for name, own in both.items()}
    assert whole_turns(records, ("A", "B")) == whole
