import pytest

from gimbal.records.schema import StepRecord
from gimbal.records.steps import join_steps


def record(engine, time_s, duration_ms=100.0, prefill=0, decodes=0, context=0, pairs=0.0):
    return StepRecord(
        time_s, engine, duration_ms * 1e3, prefill, decodes, 0, 0, 0.0, context, pairs
    )


def test_engines_that_overlap_are_one_step_and_an_absent_one_ran_a_dummy():
    first = [record(0, 0.00, prefill=300, pairs=9.0), record(0, 0.10, decodes=5, context=50)]
    second = [record(1, 0.01, decodes=7, context=700), record(1, 0.31, prefill=20)]
    together, prefill, decode = sorted(join_steps([first, second]), key=lambda s: -s.group_tokens)
    assert (together.rank_tokens, together.group_tokens) == (300, 307)
    assert (together.decode_kv_tokens, together.requests, together.prefill_pairs) == (700, 7, 9.0)
    assert (decode.rank_tokens, decode.group_tokens) == (5, 6)
    assert (prefill.rank_tokens, prefill.group_tokens) == (20, 21)


def test_a_step_lasts_from_the_end_of_the_one_before_unless_there_was_a_pause():
    one = [record(0, 0.000, 10.0), record(0, 0.0115, 10.0), record(0, 0.3, 12.0)]
    other = [record(1, 0.002, 9.0), record(1, 0.012, 10.5)]
    durations = [s.duration_us for s in join_steps([one, other])]
    assert durations == [
        pytest.approx(11_000),  # to the end of the slower engine
        pytest.approx(11_500),  # with the 0.5 ms between the steps
        pytest.approx(12_000),
    ]


def test_decodes_count_per_rank_and_over_all():
    (sample,) = join_steps([[record(0, 0.0, decodes=5)], [record(1, 0.0, decodes=7, prefill=3)]])
    assert (sample.requests, sample.group_requests, sample.prefill) == (7, 12, True)
