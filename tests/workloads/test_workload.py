"""Transformations, the five distributions and arrival processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.errors import InputError
from gimbal.workloads import Trace, TraceRequest, WorkloadOptions, build_workload
from gimbal.workloads.arrivals import arrival_times_s
from gimbal.workloads.distributions import DISTRIBUTIONS, draw, relative_length, weights
from gimbal.workloads.trace import make_trace


def timed(count: int = 200, gap_s: float = 0.5) -> Trace:
    return make_trace(
        "timed", [TraceRequest(10 + i * gap_s, 100 + i, 10 + i % 7) for i in range(count)]
    )


def pool(count: int = 6000) -> Trace:
    rng = np.random.default_rng(5)
    prompts = np.clip(rng.lognormal(5.5, 1.2, count), 5, 20000).astype(int)
    rows = [TraceRequest(0.0, int(p), max(1, int(p) // 8)) for p in prompts]
    return make_trace("pool", rows, has_arrivals=False)


def test_same_seed_same_workload_other_seed_other_window() -> None:
    options = WorkloadOptions(requests=50)
    assert build_workload(timed(), options, 3) == build_workload(timed(), options, 3)
    starts = {build_workload(timed(), options, s).requests[0].prompt_tokens for s in range(8)}
    assert len(starts) > 1


def test_window_is_consecutive_and_starts_at_zero() -> None:
    built = build_workload(timed(), WorkloadOptions(requests=50), 1)
    first = built.requests[0].prompt_tokens
    assert [r.prompt_tokens for r in built.requests] == list(range(first, first + 50))
    assert built.requests[0].arrival_s == 0.0


def test_a_trace_that_is_too_short_is_repeated_and_shares_nothing_with_itself() -> None:
    rows = [
        TraceRequest(3.0 * i, 100 + i, 5, f"s{i % 4}", prefix_blocks=(0, i % 4, 9 + i))
        for i in range(20)
    ]
    trace = make_trace("short", rows, prefix_block_tokens=32)
    built = build_workload(trace, WorkloadOptions(requests=70), 1)
    first = built.requests[0].prompt_tokens - 100
    assert first > 0, "from the place that the seed decides"
    assert [r.prompt_tokens - 100 for r in built.requests] == [(first + i) % 20 for i in range(70)]
    assert np.diff(built.arrivals_s) == pytest.approx(np.full(69, 3.0))
    passes = [built.requests[i : i + 20] for i in range(0, 70, 20)]
    for name in ("session", "prefix_blocks"):
        found = [{v for r in own for v in np.atleast_1d(getattr(r, name))} for own in passes]
        assert not any(a & b for i, a in enumerate(found) for b in found[:i])
    assert len({r.session for r in passes[1]}) == 4, "within a pass all is shared as before"
    assert len({r.prefix_blocks[0] for r in passes[1]}) == 1
    assert built.notes[-1].startswith("70 requests wanted, the trace has 20: it is repeated")
    shaped = build_workload(trace, WorkloadOptions(requests=70, distribution="average"), 1)
    assert np.diff(shaped.arrivals_s) == pytest.approx(np.full(69, 3.0))


def test_rate_then_scale_time() -> None:
    built = build_workload(timed(), WorkloadOptions(rate_rps=4.0), 0)
    assert built.rate_rps == pytest.approx(4.0)
    slower = build_workload(timed(), WorkloadOptions(rate_rps=4.0, scale_time=2.0), 0)
    assert slower.rate_rps == pytest.approx(2.0)


def test_limits_cut_and_never_drop() -> None:
    options = WorkloadOptions(max_prompt=120, max_output=12)
    built = build_workload(timed(), options, 0)
    assert len(built) == 200
    assert built.prompt_tokens.max() == 120
    assert built.output_tokens.max() == 12
    context = build_workload(timed(), WorkloadOptions(max_total=64), 0)
    assert max(r.prompt_tokens + r.output_tokens for r in context.requests) == 64
    assert context.output_tokens.max() == 16


def test_scaled_lengths_keep_shared_fractions() -> None:
    rows = [TraceRequest(0, 1000, 64, prefix_blocks=(1, 2)), TraceRequest(1, 600, 64)]
    trace = make_trace("m", rows, prefix_block_tokens=512)
    built = build_workload(trace, WorkloadOptions(scale_length=1 / 16), 0)
    assert built.prefix_block_tokens == 32
    assert [r.prompt_tokens for r in built.requests] == [62, 38]
    assert built.requests[0].prefix_blocks == (1, 2)
    cut = build_workload(trace, WorkloadOptions(max_prompt=400), 0)
    assert cut.requests[0].prefix_blocks == (1,)


@pytest.mark.parametrize(
    "options",
    [
        WorkloadOptions(requests=0),
        WorkloadOptions(rate_rps=-1.0),
        WorkloadOptions(scale_time=0.0),
        WorkloadOptions(scale_length=float("nan")),
        WorkloadOptions(max_prompt=0),
        WorkloadOptions(arrivals="uniform"),
        WorkloadOptions(arrivals="gamma", cv=0.0),
        WorkloadOptions(distribution="centrall"),
    ],
)
def test_senseless_options_are_refused(options: WorkloadOptions) -> None:
    with pytest.raises(InputError):
        build_workload(timed(), options, 0)


@pytest.mark.parametrize(("process", "cv", "expected"), [("poisson", 9, 1), ("gamma", 2, 2)])
def test_arrival_processes_have_their_rate_and_cv(process: str, cv: float, expected: float) -> None:
    times = arrival_times_s(process, 40000, 8.0, cv, np.random.default_rng(2))
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=0.04)


def test_lengths_get_gamma_arrivals_at_the_rate() -> None:
    built = build_workload(pool(), WorkloadOptions(requests=300, rate_rps=6.0), 4)
    assert built.has_arrivals
    assert built.rate_rps == pytest.approx(6.0)
    assert (np.diff(built.arrivals_s) >= 0).all()


def shares(name: str) -> np.ndarray:
    """Share of drawn prompts in each third of the log-scaled length range."""
    lengths = pool().prompt_tokens
    rows = draw(name, lengths, 20000, np.random.default_rng(1))
    x = relative_length(lengths)[rows]
    return np.histogram(x, bins=[0, 1 / 3, 2 / 3, 1])[0] / len(x)


def test_each_distribution_has_its_shape() -> None:
    assert shares("random") == pytest.approx(
        np.histogram(relative_length(pool().prompt_tokens), bins=[0, 1 / 3, 2 / 3, 1])[0] / 6000,
        abs=0.02,
    )
    central, two_end = shares("central"), shares("two-end")
    descending, average = shares("descending"), shares("average")
    assert central[1] > 0.7
    assert abs(central[0] - central[2]) < 0.05
    assert two_end[1] < 0.02
    assert abs(two_end[0] - two_end[2]) < 0.05
    # Integrals of exp(-3x) over the thirds: 0.665, 0.245, 0.090.
    assert descending == pytest.approx([0.665, 0.245, 0.090], abs=0.03)
    assert average == pytest.approx([1 / 3] * 3, abs=0.03)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 100000), min_size=1, max_size=300), st.sampled_from(DISTRIBUTIONS))
def test_weights_are_a_distribution_over_any_pool(lengths: list[int], name: str) -> None:
    w = weights(name, np.array(lengths, dtype=np.int64))
    assert w.sum() == pytest.approx(1.0)
    assert (w >= 0).all()


def test_drawn_pairs_are_real_pairs() -> None:
    real = {(r.prompt_tokens, r.output_tokens) for r in pool().requests}
    built = build_workload(pool(), WorkloadOptions(requests=500, distribution="two-end"), 0)
    assert {(r.prompt_tokens, r.output_tokens) for r in built.requests} <= real
    assert built.name == "pool-two-end"
