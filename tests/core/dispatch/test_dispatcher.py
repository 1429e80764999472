import pytest

from gimbal import testing
from gimbal.core.config import DispatchConfig
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, Field
from gimbal.testing import loads

NOW_US = 5_000_000.0


FRESH = {
    "sequence": 1,
    "epoch": 1,
    "timestamp_us": NOW_US - 1000,
    "decode_us_per_request": 0,
    "prefill_tokens_per_s": 0,
    "step_token_budget": 512,
    "kv_blocks_total": 10_000,
}


def board(engines=2, **columns):
    """Fresh snapshots of idle engines; a column is a number or one per engine."""
    return loads(engines, **FRESH | columns).board


def request(name="r", tokens=100, session=None, arrival_us=NOW_US):
    return testing.request(tokens, name, arrival_us, session)


def test_burst_between_snapshots_spreads_by_tokens():
    dispatcher = Dispatcher(2, DispatchConfig())
    chosen = [
        dispatcher.dispatch(request(str(n), tokens), None, board(), NOW_US).engine
        for n, tokens in enumerate([1000, 300, 300, 300])
    ]
    assert chosen[0] != chosen[1]
    assert chosen[1] == chosen[2] == chosen[3]


def test_idle_engines_take_turns_and_front_ends_start_apart():
    def first(front_end):
        dispatcher = Dispatcher(4, DispatchConfig(), front_end=front_end, client_count=2)
        return dispatcher.dispatch(request(), None, board(4), NOW_US).engine

    assert (first(0), first(1)) == (0, 2)
    dispatcher = Dispatcher(3, DispatchConfig())
    chosen = [
        dispatcher.dispatch(request(str(number)), None, board(3), NOW_US).engine
        for number in range(3)
    ]
    assert chosen == [0, 1, 2]


def test_a_prompt_from_elsewhere_is_kv_to_come_and_no_work():
    dispatcher = Dispatcher(2, DispatchConfig())
    sent = testing.request(4000, "a", NOW_US, loaded_tokens=4000)
    decision = dispatcher.dispatch(sent, None, board(), NOW_US)
    assert decision.cached_tokens == 4000
    assert decision.terms[list(decision.term_names).index("prefill")].tolist() == [0, 0]
    ledger = dispatcher.ledger
    assert ledger.unacked_tokens[decision.engine] == 4000
    assert ledger.unacked_cached[decision.engine] == 4000
    dispatcher.assigned(testing.request(400, "b", NOW_US, loaded_tokens=400), 0)
    assert ledger.unacked_cached.sum() == 4400


def test_prefix_is_found_again_and_given_up_under_load():
    dispatcher = Dispatcher(2, DispatchConfig(options={"expected_output_tokens": 0}))
    tokens = list(range(640))
    home = dispatcher.dispatch(request("a", 640), tokens, board(), NOW_US).engine
    acked = board(sequence=2)
    acked[home, ACCEPTED_REQUESTS], acked[home, ACCEPTED_TOKENS] = 1, 640
    again = dispatcher.dispatch(request("b", 700), tokens + [1] * 60, acked, NOW_US)
    assert (again.engine, again.cached_tokens) == (home, 640)
    acked[home, Field.SEQUENCE] = 3
    acked[home, ACCEPTED_REQUESTS], acked[home, ACCEPTED_TOKENS] = 2, 1340
    acked[home, Field.WAITING_PREFILL_TOKENS] = 50_000
    busy = dispatcher.dispatch(request("c", 700), tokens + [2] * 60, acked, NOW_US)
    assert (busy.engine, busy.cached_tokens) == (1 - home, 0)


def test_terms_explain_the_cost():
    decision = Dispatcher(3, DispatchConfig()).dispatch(request(), None, board(3), NOW_US)
    assert decision.terms.shape == (len(decision.term_names), 3)
    assert decision.terms.sum(axis=0).tolist() == pytest.approx(decision.costs.tolist())
    assert decision.reason == "policy"
    baseline = Dispatcher(3, DispatchConfig(policy="vllm"))
    assert baseline.dispatch(request(), None, board(3), NOW_US).terms is None


@pytest.mark.parametrize(("queued", "stays"), [(0, True), (800, True), (2000, False)])
def test_session_stays_while_a_longer_hit_could_pay_for_it(queued, stays):
    dispatcher = Dispatcher(2, DispatchConfig(options={"expected_output_tokens": 0}))
    dispatcher.assigned(request("a", 64, session="s"), 0)
    now = board(waiting_prefill_tokens=[queued, 0], sequence=2)
    now[0, ACCEPTED_REQUESTS], now[0, ACCEPTED_TOKENS] = 1, 64
    decision = dispatcher.dispatch(request("b", 1000, session="s"), None, now, NOW_US)
    assert (decision.engine == 0) is stays
    patient = Dispatcher(
        2, DispatchConfig(options={"expected_output_tokens": 0, "session_patience": 10})
    )
    patient.assigned(request("a", 64, session="s"), 0)
    assert patient.dispatch(request("b", 1000, session="s"), None, now, NOW_US).engine == 0


def test_sessions_are_bounded():
    dispatcher = Dispatcher(2, DispatchConfig(sessions=10))
    for number in range(100):
        dispatcher.dispatch(request(str(number), session=f"s{number}"), None, board(), NOW_US)
    assert len(dispatcher.sessions) == 10


def test_old_snapshot_of_a_busy_engine_falls_back_to_tokens_in_flight():
    dispatcher = Dispatcher(2, DispatchConfig(max_signal_age_ms=500))
    dispatcher.dispatch(request("a", 900), None, board(), NOW_US)
    stuck = board(timestamp_us=[NOW_US - 10e6, NOW_US], running_requests=1)
    decision = dispatcher.dispatch(request("b", 10), None, stuck, NOW_US)
    assert (decision.engine, decision.reason) == (1, "stale")
    assert decision.signal_age_us == pytest.approx(10e6)


def test_idle_engine_may_be_silent_for_hours_until_it_is_sent_something():
    dispatcher = Dispatcher(2, DispatchConfig(max_signal_age_ms=500))
    hour = NOW_US + 3600e6
    first = dispatcher.dispatch(request("a"), None, board(), hour)
    assert (first.reason, first.signal_age_us) == ("policy", 0)
    soon = dispatcher.dispatch(request("b"), None, board(), hour + 1000)
    assert (soon.reason, soon.signal_age_us) == ("policy", 1000)
    assert dispatcher.dispatch(request("c"), None, board(), hour + 1e6).reason == "stale"


def test_an_idle_server_has_no_old_signals():
    dispatcher = Dispatcher(2, DispatchConfig())
    decision = dispatcher.dispatch(request("a"), None, board(), NOW_US + 1.9e6)
    assert decision.signal_age_us == 0


def test_a_long_step_is_not_a_stopped_engine():
    dispatcher = Dispatcher(2, DispatchConfig(max_signal_age_ms=500))
    slow = board(timestamp_us=NOW_US - 3e6, running_requests=1, step_time_us=1e6)
    assert dispatcher.dispatch(request("a"), None, slow, NOW_US).reason == "policy"
    assert dispatcher.dispatch(request("b"), None, slow, NOW_US + 1.5e6).reason == "stale"


@pytest.mark.parametrize(("lock_step", "chosen"), [(True, 1), (False, 0)])
def test_a_silent_engine_is_avoided_where_the_others_need_not_wait_for_it(lock_step, chosen):
    dispatcher = Dispatcher(2, DispatchConfig(max_signal_age_ms=500), lock_step=lock_step)
    dispatcher.assigned(request("a", 100), 0)
    rows = board(running_requests=1)
    rows[1, Field.TIMESTAMP_US] = NOW_US - 3e6
    decision = dispatcher.dispatch(request("b"), None, rows, NOW_US)
    assert (decision.engine, decision.reason) == (chosen, "stale")
    both = board(running_requests=1, timestamp_us=NOW_US - 3e6)
    assert dispatcher.dispatch(request("c", 10), None, both, NOW_US).reason == "stale"


def test_pinned_idle_engine_is_not_stale_at_once():
    dispatcher = Dispatcher(2, DispatchConfig(max_signal_age_ms=500))
    hour = NOW_US + 3600e6
    dispatcher.assigned(request("pinned", arrival_us=hour), 1)
    assert dispatcher.dispatch(request("b"), None, board(), hour + 1000).reason == "policy"


def test_assigned_and_finished_keep_the_accounts():
    dispatcher = Dispatcher(2, DispatchConfig())
    dispatcher.assigned(request("a", 70), 1)
    assert dispatcher.ledger.unacked.tolist() == [[0, 1], [0, 70]]
    dispatcher.finished("a")
    dispatcher.finished("a")
    dispatcher.finished("never seen")
    assert dispatcher.ledger.inflight.sum() == 0
    assert dispatcher.ledger.unacked.tolist() == [[0, 1], [0, 70]]


def test_resize_up_and_down():
    dispatcher = Dispatcher(2, DispatchConfig())
    tokens = list(range(128))
    dispatcher.dispatch(request("a", 128, session="s"), tokens, board(), NOW_US)
    dispatcher.resize(4)
    decision = dispatcher.dispatch(request("b", 128), tokens, board(4), NOW_US)
    assert len(decision.costs) == 4
    dispatcher.resize(1)
    assert dispatcher.dispatch(request("c", 128), tokens, board(1), NOW_US).engine == 0
    dispatcher.finished("a")
    dispatcher.finished("b")
    assert dispatcher.ledger.inflight.tolist() == [[1], [128]]


def test_prefix_index_is_as_large_as_the_engines_memory_and_counts_whole_blocks():
    dispatcher = Dispatcher(1, DispatchConfig())
    dispatcher.fit_prefix_index(board(1, kv_blocks_total=6, kv_block_tokens=128))
    for first in range(0, 100_000, 1000):
        dispatcher.prefixes.insert(list(range(first, first + 128)), 0)
    assert len(dispatcher.prefixes) <= 16, "768 tokens are 12 chunks, and a third"
    tokens = list(range(200))
    dispatcher.prefixes.insert(tokens, 0)
    assert dispatcher.prefixes.match(tokens).cached_tokens.tolist() == [128]
    dispatcher.fit_prefix_index(board(1, kv_blocks_total=6000, kv_block_tokens=16))
    assert dispatcher.prefixes.match(tokens).cached_tokens.tolist() == [192], "kept when it grows"


def test_cleared_cache_is_no_longer_credited():
    dispatcher = Dispatcher(1, DispatchConfig())
    tokens = list(range(128))
    dispatcher.dispatch(request("a", 128, session="s"), tokens, board(1), NOW_US)
    dispatcher.cache_cleared(0)
    assert dispatcher.dispatch(request("b", 128), tokens, board(1), NOW_US).cached_tokens == 0
    assert len(dispatcher.sessions) == 0
