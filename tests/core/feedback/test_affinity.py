import numpy as np

from gimbal.core.config import DispatchConfig
from gimbal.core.contracts import DispatchRequest
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.dispatch.policies.gimbal import GimbalPolicy
from gimbal.core.dispatch.policies.vllm import VllmPolicy
from gimbal.core.feedback.affinity import AffinityPolicy, HomePolicy, home_engines
from gimbal.core.snapshot import ROW_WIDTH, Field


def board(waiting_tokens=(0, 0)):
    rows = np.zeros((2, ROW_WIDTH))
    rows[:, Field.STEP_TOKEN_BUDGET] = 2048
    rows[:, Field.MAX_RUNNING_REQUESTS] = 256
    rows[:, Field.STEP_BASE_US] = 10_000
    rows[:, Field.PREFILL_US_PER_TOKEN] = 20
    rows[:, Field.WAITING_PREFILL_TOKENS] = waiting_tokens
    return rows


def send(policy, domain, waiting_tokens=(0, 0)):
    dispatcher = Dispatcher(2, DispatchConfig(), policy=policy)
    request = DispatchRequest("r", 500, 0.0, domain=domain)
    return dispatcher.dispatch(request, None, board(waiting_tokens), 0.0)


def affinity():
    policy = AffinityPolicy(GimbalPolicy(), {"code": 0, "law": 1}, 2)
    policy.us_per_token = np.array([[2.0, 1.0], [1.0, 2.0]])
    return policy


def test_a_domain_goes_where_its_experts_are():
    assert send(affinity(), "code").engine == 1
    assert send(affinity(), "law").engine == 0


def test_load_outweighs_affinity_when_it_costs_more():
    decision = send(affinity(), "code", waiting_tokens=(0, 6000))
    assert decision.engine == 0
    assert decision.term_names[-1] == "affinity"
    np.testing.assert_allclose(decision.terms[-1], [2 * 557, 557])


def test_an_unknown_domain_has_no_affinity():
    np.testing.assert_array_equal(send(affinity(), None).terms[-1], [0, 0])


def test_a_home_is_kept_until_it_is_overloaded():
    homes = {"code": 1}
    dispatcher = Dispatcher(2, DispatchConfig(), policy=HomePolicy(VllmPolicy(), homes))
    chosen = [
        dispatcher.dispatch(
            DispatchRequest(f"r{i}", 100, 0.0, domain="code"), None, board(), 0.0
        ).engine
        for i in range(40)
    ]
    assert set(chosen[:8]) == {1}
    assert 0.55 <= np.mean(chosen) <= 0.75


def test_homes_are_even_in_tokens():
    assert home_engines({"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}, 2) == {
        "a": 0,
        "b": 1,
        "c": 1,
        "d": 0,
    }
