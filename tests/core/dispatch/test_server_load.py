"""One integer for a whole server, in requests."""

import pytest

from gimbal.core.contracts import DispatchRequest
from gimbal.core.dispatch.policies.gimbal import GimbalPolicy
from gimbal.core.dispatch.server_load import first_token_us, server_load
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS
from gimbal.testing import loads

# 1000 us a step and 10 us a token; a step takes 100 tokens: 2,000 us for 100 tokens.
THERE = {"sequence": 1.0}


def typical(state, tokens=100):
    """`state` of engines that have taken ten prompts of `tokens`."""
    state.board[:, ACCEPTED_REQUESTS] = 10.0
    state.board[:, ACCEPTED_TOKENS] = 10.0 * tokens
    return state


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, 0),
        # A queue of five typical prompts on the only engine, and of one less on the better of two.
        ({"waiting_prefill_tokens": [500]}, 5),
        ({"waiting_prefill_tokens": [500, 400]}, 4),
        ({"waiting_prefill_tokens": [500, 0]}, 0),
        ({"unacked_tokens": [300]}, 3),
        ({"unacked_tokens": [300], "unacked_cached_tokens": [300]}, 0),
    ],
)
def test_a_queue_counts_in_typical_requests(columns, expected):
    assert server_load(typical(loads(**THERE, **columns))) == expected


def test_decodes_count_by_what_they_delay():
    state = typical(loads(**THERE, running_requests=[40], decoding_requests=[40]))
    # Prefill in steps of 60 tokens, 57 / 2 decode steps of 40 half requests, 40 delayed by it.
    load = server_load(state)
    assert load is not None
    assert 5 < load < 40


def test_an_engine_that_has_said_nothing_counts_for_nothing():
    assert server_load(loads(2)) is None
    state = typical(loads(sequence=[1.0, 0.0], waiting_prefill_tokens=[500, 0]))
    assert server_load(state) == 5


def test_before_any_prompt_a_typical_one_is_assumed():
    assert server_load(loads(**THERE, waiting_prefill_tokens=[512 * 3])) == 3


def test_the_first_token_is_predicted_as_dispatch_does():
    columns = {"waiting_prefill_tokens": [250, 0], "decoding_requests": [50, 0]}
    state = typical(loads(**THERE, **columns, running_requests=[50, 0]))
    # 350 tokens in steps of 50, 100 tokens in one of 100.
    assert first_token_us(state).tolist() == [7 * 1000 + 3500, 2000]
    priced = GimbalPolicy().priced(DispatchRequest("", 100, 0.0), state)
    terms = dict(zip(GimbalPolicy.term_names, priced, strict=False))
    expected = terms["queue"] + terms["prefill"] + terms["admission"]
    assert first_token_us(state).tolist() == expected.tolist()


def test_no_first_token_is_predicted_of_an_engine_that_has_said_nothing():
    assert first_token_us(typical(loads(sequence=[1.0, 0.0]))).tolist() == [2000, 0]


def test_a_prompt_that_finds_no_kv_memory_waits_for_it():
    full = {"kv_blocks_total": 10.0, "kv_block_tokens": 16.0, "prefill_tokens_per_s": 1000.0}
    state = typical(loads(**THERE, **full, kv_blocks_used=[0.0, 10.0]))
    free, none = first_token_us(state).tolist()
    assert (free, none) == (2000, 2000 + 100_000)
