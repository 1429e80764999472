"""The soak's workload and its verdict."""

from dataclasses import replace

import pytest

from tests.live.check.memory import MIB, ProcessMemory
from tests.live.check.soak import MAX_GROWTH, SoakResult, memory_growth, passed, soak_requests

GOOD = SoakResult(
    requests=10,
    completed=9,
    aborted=1,
    wrong_count=0,
    failed=0,
    hung=0,
    left_running=0,
    duration_s=10.0,
    output_tokens_per_s=50.0,
    rearrangements=4,
    moved_slots=90,
    seconds_per_rearrangement=2.5,
    eplb_worker="alive",
    workers_mid_mib=100.0,
    workers_end_mib=100.0,
    growth_share=0.0,
    server_end_mib=300.0,
)


def test_exactly_the_share_is_aborted_and_always_in_mid_stream():
    requests = soak_requests(2000, 2048, 0.1, seed=1)
    assert requests == soak_requests(2000, 2048, 0.1, seed=1)
    assert requests != soak_requests(2000, 2048, 0.1, seed=2)
    aborted = [r for r in requests if r.abort_after is not None]
    assert len(aborted) == 200
    assert all(0 < r.abort_after < r.output_tokens for r in aborted)
    lengths = [len(r.prompt) for r in requests]
    assert min(lengths) <= 3
    assert max(lengths) >= 400


def test_growth_compares_the_ends_of_the_second_half():
    flat = [(float(i), 1000) for i in range(40)]
    assert memory_growth(flat) == (1000.0, 1000.0, 0.0)
    warming_up = [(float(i), min(1000, 500 + 50 * i)) for i in range(40)]
    assert memory_growth(warming_up)[2] == 0.0
    leaking = [(float(i), 1000 + 10 * i) for i in range(40)]
    assert memory_growth(leaking)[2] > MAX_GROWTH
    with pytest.raises(ValueError, match="20 samples, got 3"):
        memory_growth(flat[:3])


@pytest.mark.parametrize(
    "trouble",
    [
        {"completed": 8},
        {"completed": 8, "wrong_count": 1},
        {"completed": 8, "failed": 1},
        {"completed": 8, "hung": 1},
        {"left_running": 1},
        {"rearrangements": 0},
        {"eplb_worker": "dead"},
        {"growth_share": MAX_GROWTH * 2},
    ],
)
def test_any_trouble_fails_the_soak(trouble):
    assert GOOD.ok
    assert not replace(GOOD, **trouble).ok


def test_a_long_soak_asks_that_every_process_is_flat():
    flat = ProcessMemory("a", 100.0 * MIB, 100.0 * MIB, 0.0, 0.0, 2.0 * MIB)
    grows = replace(flat, name="b", growth=3.0 * MIB)
    workers_grow = replace(GOOD, growth_share=MAX_GROWTH * 2)  # in shared memory, say
    assert passed(workers_grow, [flat])
    assert not passed(GOOD, [flat, grows])
    assert not passed(GOOD, [])
    assert not passed(replace(GOOD, hung=1), [flat])
    assert passed(GOOD, None)
    assert not passed(workers_grow, None)
