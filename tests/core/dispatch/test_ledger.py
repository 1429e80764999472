"""The ledger against engines that really keep their inboxes, request by request."""

from collections import deque

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gimbal.core.dispatch import ledger as accounts
from gimbal.core.dispatch.ledger import _BUSY_AT, _OWED_SINCE, QUIET_US, Ledger
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field

ENGINES = 3
FRONT_ENDS = 2
front_ends = st.integers(0, FRONT_ENDS - 1)
engines = st.integers(0, ENGINES - 1)


class Engines(RuleBasedStateMachine):
    """Two front ends, three engines; each engine holds one true inbox per front end."""

    def __init__(self):
        super().__init__()
        self.ledgers = [Ledger(ENGINES, f) for f in range(FRONT_ENDS)]
        self.inbox = {(f, e): deque() for f in range(FRONT_ENDS) for e in range(ENGINES)}
        self.missed = {(f, e): [] for f in range(FRONT_ENDS) for e in range(ENGINES)}
        self.live = [{} for _ in range(FRONT_ENDS)]  # request id -> (engine, tokens)
        self.true_board = np.zeros((ENGINES, ROW_WIDTH))
        self.true_board[:, Field.EPOCH] = 1
        self.history = []
        self.count = 0
        self.publish_and_read()

    @rule(
        front_end=front_ends,
        engine=engines,
        tokens=st.integers(1, 20_000),
        cached=st.integers(0, 3),
        long=st.booleans(),
    )
    def send(self, front_end, engine, tokens, cached, long):
        name = f"r{self.count}" + "x" * 100 * long
        self.count += 1
        self.ledgers[front_end].sent(name, engine, tokens, float(cached))
        self.inbox[front_end, engine].append(tokens)
        self.live[front_end][name] = (engine, tokens)

    @rule(front_end=front_ends, engine=engines, tokens=st.integers(1, 20_000), data=st.data())
    def send_the_same_id_again(self, front_end, engine, tokens, data):
        """The engine gets two adds; the accounts follow the one that came last."""
        if self.live[front_end]:
            name = data.draw(st.sampled_from(sorted(self.live[front_end])))
            self.ledgers[front_end].sent(name, engine, tokens)
            self.inbox[front_end, engine].append(tokens)
            self.live[front_end][name] = (engine, tokens)

    @rule(front_end=front_ends, engine=engines, tokens=st.integers(1, 20_000), data=st.data())
    def fail_to_send(self, front_end, engine, tokens, data):
        """The engine never sees it, and the accounts are as they were."""
        ledger = self.ledgers[front_end]
        before = ledger._accounts.copy()
        ledger.sent("failed", engine, tokens, float(data.draw(st.integers(0, 3))))
        assert ledger.unsent("failed") == engine
        assert ledger.unsent("failed") is None
        after = ledger._accounts.copy()
        for row in (_OWED_SINCE, _BUSY_AT):  # matter only while something is owed
            after[row] = before[row]
        assert (after == before).all()

    @rule(front_end=front_ends, data=st.data(), twice=st.booleans())
    def finish_or_abort(self, front_end, data, twice):
        """At any time: before or after the engine has accepted it."""
        if self.live[front_end]:
            name = data.draw(st.sampled_from(sorted(self.live[front_end])))
            del self.live[front_end][name]
            self.ledgers[front_end].finished(name)
            if twice:
                self.ledgers[front_end].finished(name)

    @rule(front_end=front_ends, engine=engines, count=st.integers(1, 30))
    def accept(self, front_end, engine, count):
        """The engine takes what waits on its sockets, adds of aborted requests included."""
        inbox = self.inbox[front_end, engine]
        row = self.true_board[engine]
        for _ in range(min(count, len(inbox))):
            row[ACCEPTED_REQUESTS + front_end] += 1
            row[ACCEPTED_TOKENS + front_end] += inbox.popleft()

    @rule(front_end=front_ends, engine=engines)
    def take_without_counting(self, front_end, engine):
        """A fault in the engine: it takes a request, and its counter misses that."""
        inbox = self.inbox[front_end, engine]
        if inbox:
            self.missed[front_end, engine].append(inbox.popleft())

    @rule()
    def publish_and_read(self):
        self.true_board[:, Field.SEQUENCE] += 1
        self.history.append(self.true_board.copy())
        self.read(len(self.history) - 1)

    @precondition(lambda self: len(self.history) > 1)
    @rule(data=st.data())
    def read_a_stale_snapshot(self, data):
        """One engine's row from the past, of the same process: it must change nothing."""
        engine = data.draw(engines)
        old = self.history[data.draw(st.integers(0, len(self.history) - 1))][engine]
        board = self.history[-1].copy()
        if old[Field.EPOCH] == board[engine, Field.EPOCH]:
            board[engine] = old
        before = [ledger.unacked.copy() for ledger in self.ledgers]
        for ledger, expected in zip(self.ledgers, before, strict=True):
            ledger.observe(board)
            assert (ledger.unacked == expected).all()

    @rule(engine=engines)
    def restart(self, engine):
        """The process is gone with what was sent to it; everybody sees the new one."""
        row = self.true_board[engine]
        row[ACCEPTED_REQUESTS:] = 0
        row[Field.EPOCH] += 1
        row[Field.SEQUENCE] = 0
        for front_end, live in enumerate(self.live):
            self.inbox[front_end, engine].clear()
            self.missed[front_end, engine].clear()
            for name in [n for n, (e, _) in live.items() if e == engine]:
                del live[name]
        self.publish_and_read()

    def read(self, index):
        for ledger in self.ledgers:
            ledger.observe(self.history[index])
        for (front_end, engine), inbox in self.inbox.items():
            owed = [*inbox, *self.missed[front_end, engine]]
            unacked = self.ledgers[front_end].unacked[:, engine]
            assert tuple(unacked) == (len(owed), sum(owed))

    @invariant()
    def inflight_is_exact_always(self):
        for ledger, live in zip(self.ledgers, self.live, strict=True):
            for engine in range(ENGINES):
                tokens = [t for e, t in live.values() if e == engine]
                assert tuple(ledger.inflight[:, engine]) == (len(tokens), sum(tokens))

    @invariant()
    def unacked_never_negative(self):
        assert all((ledger.unacked >= 0).all() for ledger in self.ledgers)

    def teardown(self):
        """All is done: the engines took what was sent, every request is over, nothing is left."""
        for (front_end, engine), inbox in self.inbox.items():
            self.accept(front_end, engine, len(inbox))
        self.publish_and_read()
        for ledger, live in zip(self.ledgers, self.live, strict=True):
            for name in live:
                ledger.finished(name)
            ledger.observe(self.true_board, 1e6)
            ledger.observe(self.true_board, 2e6 + QUIET_US)
            assert not ledger.unacked.any()
            assert not ledger.inflight.any()
            assert not ledger.unacked_cached.any()
            assert not ledger._requests
            assert not ledger._cached


Engines.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestEngines = Engines.TestCase


def board(**columns):
    """One engine's board with these columns."""
    rows = np.zeros((1, ROW_WIDTH))
    rows[0, Field.EPOCH] = 1
    for name, value in columns.items():
        rows[0, Field[name]] = value
    return rows


def test_snapshot_that_jumps_over_many_requests():
    ledger = Ledger(1)
    for number in range(100):
        ledger.sent(str(number), 0, 10)
    jumped = board(SEQUENCE=1)
    jumped[0, ACCEPTED_REQUESTS], jumped[0, ACCEPTED_TOKENS] = 97, 970
    ledger.observe(jumped)
    assert tuple(ledger.unacked[:, 0]) == (3, 30)


def test_front_end_restarted_under_the_same_index():
    ledger = Ledger(1)
    running = board(SEQUENCE=9)
    running[0, ACCEPTED_REQUESTS], running[0, ACCEPTED_TOKENS] = 500, 90_000
    ledger.observe(running)
    ledger.sent("a", 0, 70)
    assert tuple(ledger.unacked[:, 0]) == (1, 70)
    running[0, Field.SEQUENCE] = 10
    running[0, ACCEPTED_REQUESTS], running[0, ACCEPTED_TOKENS] = 501, 90_070
    ledger.observe(running)
    assert tuple(ledger.unacked[:, 0]) == (0, 0)


def test_id_sent_again_is_one_request_in_flight_and_two_adds():
    ledger = Ledger(2)
    ledger.sent("a", 0, 10)
    ledger.sent("a", 1, 30)
    assert ledger.inflight.tolist() == [[0, 1], [0, 30]]
    assert ledger.unacked.tolist() == [[1, 1], [10, 30]]
    assert ledger.finished("a") == 1
    assert ledger.finished("a") is None


def test_a_request_taken_back_although_it_was_sent_is_forgiven():
    ledger = Ledger(1)
    ledger.sent("a", 0, 10)
    ledger.sent("b", 0, 20)
    ledger.unsent("a")
    took_both = board(SEQUENCE=1)
    took_both[0, ACCEPTED_REQUESTS], took_both[0, ACCEPTED_TOKENS] = 2, 30
    ledger.observe(took_both)
    ledger.sent("c", 0, 40)
    assert tuple(ledger.unacked[:, 0]) == (1, 40)


def test_what_an_engine_forgot_to_count_is_written_off_once_nothing_is_in_flight():
    ledger = Ledger(2)
    idle = np.zeros((2, ROW_WIDTH))
    ledger.sent("a", 0, 10, cached=3.0, now_us=1e6)
    ledger.sent("b", 1, 20, now_us=1e6)
    ledger.finished("a")
    ledger.observe(idle, 1e6 + QUIET_US)
    assert ledger.unacked.tolist() == [[1, 1], [10, 20]], "a snapshot may be on its way"
    ledger.observe(idle, 1.1e6 + QUIET_US)
    assert ledger.unacked.tolist() == [[0, 1], [0, 20]], "an engine that is silent still owes"
    assert ledger.unacked_cached.tolist() == [0.0, 0.0]
    idle[0, [ACCEPTED_REQUESTS, ACCEPTED_TOKENS, Field.SEQUENCE]] = 1, 10, 1
    ledger.observe(idle, 2e6 + QUIET_US)
    assert ledger.unacked.tolist() == [[0, 1], [0, 20]]
    ledger.sent("c", 0, 40, now_us=2e6 + QUIET_US)
    assert ledger.unacked.tolist() == [[1, 1], [40, 20]]


def test_an_end_that_was_missed_is_made_up_for():
    ledger, long = Ledger(1), "x" * 1000
    for name in ("a", "b", long):
        ledger.sent(name, 0, 10)
    ledger.unfinished({"b": 0, "c": 0, long: 0})
    assert tuple(ledger.inflight[:, 0]) == (2, 20)
    ledger.unfinished({"b": 0})
    assert tuple(ledger.inflight[:, 0]) == (2, 20), "only a digest of the long one is known"
    ledger.unfinished({})
    assert not ledger.inflight.any()
    assert tuple(ledger.unacked[:, 0]) == (3, 30)


def test_tokens_of_nobody_are_written_off():
    """One request was entered and never came, another one came and was never entered."""
    ledger, board = Ledger(1), np.zeros((1, ROW_WIDTH))
    ledger.sent("lost", 0, 1500)
    board[0, [Field.SEQUENCE, ACCEPTED_REQUESTS, ACCEPTED_TOKENS]] = 1, 1, 10
    ledger.observe(board)
    assert ledger.unacked.ravel().tolist() == [0.0, 0.0]
    ledger.sent("next", 0, 7)
    board[0, [Field.SEQUENCE, ACCEPTED_REQUESTS, ACCEPTED_TOKENS]] = 2, 2, 17
    ledger.observe(board)
    assert ledger.unacked.ravel().tolist() == [0.0, 0.0]


def test_taken_back_after_the_account_started_again():
    ledger = Ledger(1)
    ledger.sent("a", 0, 10)
    running = board(SEQUENCE=9)
    running[0, ACCEPTED_REQUESTS], running[0, ACCEPTED_TOKENS] = 500, 90_000
    ledger.observe(running)
    ledger.unsent("a")
    ledger.observe(running)
    assert not ledger.unacked.any()
    assert not ledger.inflight.any()


def test_an_engine_that_acknowledges_nothing_costs_bounded_memory(monkeypatch):
    monkeypatch.setattr(accounts, "_REMEMBERED", 10)
    ledger = Ledger(1)
    for number in range(1000):
        ledger.sent(str(number), 0, 8, cached=2.0)
        ledger.finished(str(number))
    assert len(ledger._cached[0]) == 10
    assert ledger.unacked_cached.tolist() == [20.0]
    took_all = board(SEQUENCE=1)
    took_all[0, ACCEPTED_REQUESTS], took_all[0, ACCEPTED_TOKENS] = 1000, 8000
    ledger.observe(took_all)
    assert not ledger.unacked.any()
    assert not ledger.unacked_cached.any()
    assert not ledger._cached


@pytest.mark.parametrize("engines", [1, 4])
def test_resize(engines):
    ledger = Ledger(2)
    ledger.sent("a", 0, 10)
    ledger.sent("b", 1, 20)
    ledger.resize(engines)
    assert ledger.engines == engines
    assert ledger.inflight[:, 0].tolist() == [1, 10]
    assert ledger.finished("b") == (1 if engines > 1 else None)
    ledger.observe(np.zeros((engines, ROW_WIDTH)))
    assert ledger.inflight[1].sum() == 10


def test_an_engine_with_nothing_to_run_is_not_late_though_requests_wait_in_it():
    ledger = Ledger(2)
    board = np.zeros((2, ROW_WIDTH))
    board[:, Field.WAITING_REQUESTS] = 3
    board[0, Field.IDLE] = 1
    assert ledger.observe(board, 5e6) == 5e6
    assert ledger.silent_us.tolist() == [0, 5e6]
    ledger.sent("r", 0, 10, now_us=5e6)
    ledger.observe(board, 6e6)
    assert ledger.silent_us.tolist() == [1e6, 6e6], "what it is sent it has to answer"
