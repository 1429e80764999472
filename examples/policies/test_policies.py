from gimbal_example_policies.aged_shortest import AgedShortest, AgedShortestOptions
from gimbal_example_policies.fewest_tokens import FewestTokens

from gimbal.testing import (
    check_dispatch_policy,
    check_ordering,
    check_placer,
    loads,
    queue_state,
    queued,
    request,
)


def test_edge_cases():
    check_dispatch_policy("fewest-tokens")
    check_ordering("aged-shortest", {"tokens_per_s": 50})
    check_placer("one-swap")


def test_a_cached_prompt_is_worth_its_tokens():
    state = loads(waiting_prefill_tokens=[60, 0], cached_tokens=[64, 0])
    assert FewestTokens().costs(request(100), state).tolist() == [96, 100]


def test_a_long_prompt_goes_first_in_the_end():
    ordering = AgedShortest(AgedShortestOptions(tokens_per_s=100.0))
    long = ordering.key(queued(3000), queue_state(now_s=0.0))
    assert ordering.key(queued(50), queue_state(now_s=10.0)) < long
    assert ordering.key(queued(50), queue_state(now_s=31.0)) > long
