"""Exact account of what one front end has sent and the engines have not yet acknowledged.

Invariant, per engine and for requests and tokens alike:

    unacknowledged = sent since the engine process started - accepted by it from this front end

Sent is counted here; accepted is published by the engine as a cumulative counter (`contracts`,
ACCEPTED_REQUESTS and ACCEPTED_TOKENS). An engine takes requests from one front end in the order
they were sent, so a difference of two cumulative counters is exact however many requests one
snapshot jumps over, and no request is counted both here and in the snapshot's queue.

- Aborts do not touch it: the engine counts the add either way, since add and abort travel in
  order on one connection. They end a request's in-flight entry only.
- Counters of one engine process never go down: a snapshot older than one already seen is ignored.
- A new EPOCH is a new process whose counters start again. What was sent to the old one is lost,
  so the account starts again as well, in agreement with that process's counters.
- A request whose send failed was not sent (`unsent`): it leaves both accounts.
- An engine takes what it is sent before it says that it is finished. Where nothing has been in
  flight for `QUIET_US`, what is still unacknowledged was counted by mistake (by the engine, whose
  count missed a request, or here): the account starts again at the counter.
- A counter above what was sent (a front end that restarted under the same index) starts the
  account again at the counter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import numpy as np

from gimbal.core.compiled import Kernel
from gimbal.core.contracts import FloatArray
from gimbal.core.dispatch.names import kept
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, Field

_EPOCH, _SEQUENCE, _TIMESTAMP = int(Field.EPOCH), int(Field.SEQUENCE), int(Field.TIMESTAMP_US)
_WAITING, _RUNNING = int(Field.WAITING_REQUESTS), int(Field.RUNNING_REQUESTS)
_IDLE = int(Field.IDLE)

# Rows of the accounts, one column per engine.
_KNOWN_EPOCH, _SEEN, _OWED_SINCE, _SENT, _ACCEPTED, _UNACKED, _INFLIGHT = 0, 1, 2, 3, 5, 7, 9
_UNACKED_CACHED, _SILENT, _LOST, _BUSY_AT, _ROWS = 11, 12, 13, 14, 15

_REMEMBERED = 65_536
"""Unacknowledged requests of one engine whose cached tokens are known; of older ones, none."""

FRESH_US = 50_000.0
"""Below this age of its snapshot nobody asks whether an engine is idle."""
QUIET_US = 2e6
"""No snapshot is that long on its way."""


class Ledger:
    """The accounts of front end `front_end` with `engines` engines.

    Attributes:
        unacked: [2, engines] requests and prompt tokens sent and not yet acknowledged.
        unacked_cached: [engines] of the unacknowledged tokens, those believed cached there.
        inflight: [2, engines] requests and prompt tokens sent and not yet finished.
        silent_us: [engines] age of the snapshot; above `FRESH_US` 0 for an engine that owes none.
    """

    def __init__(self, engines: int, front_end: int = 0) -> None:
        self._front_end = front_end
        # Name of an unfinished request -> engine, prompt tokens, those believed cached there.
        self._requests: dict[str | bytes, tuple[int, int, float]] = {}
        # Engine -> cached tokens of its unacknowledged requests, oldest first.
        self._cached: dict[int, deque[float]] = {}
        accounts = np.zeros((_ROWS, engines))
        accounts[_SEEN] = -1.0  # SEQUENCE of the newest snapshot used
        self._use(accounts)

    def _use(self, accounts: FloatArray) -> None:
        """Names the rows of `accounts` [_ROWS, engines]."""
        self._accounts = accounts
        self.unacked = accounts[_UNACKED : _UNACKED + 2]
        self.inflight = accounts[_INFLIGHT : _INFLIGHT + 2]
        self.unacked_requests, self.unacked_tokens = self.unacked
        self.inflight_requests, self.inflight_tokens = self.inflight
        self.unacked_cached = accounts[_UNACKED_CACHED]
        self.silent_us = accounts[_SILENT]
        self._lost = accounts[_LOST]  # 1: requests in flight there were sent to a process now gone

    @property
    def engines(self) -> int:
        """Engines with an account."""
        return len(self.silent_us)

    def observe(self, board: FloatArray, now_us: float = 0.0) -> float:
        """Reads the acknowledgements in `board` [engines, ROW_WIDTH].

        Returns the largest of `silent_us`, given the board's clock `now_us`.
        """
        oldest_us: float = OBSERVE.call(board, self._accounts, self._front_end, now_us)
        if self._cached:
            unacked = self.unacked_requests.item
            for engine, queue in tuple(self._cached.items()):
                if len(queue) > unacked(engine):
                    self._forget_cached(engine, int(unacked(engine)))
        if not oldest_us >= 0.0:  # NaN
            self._forget_lost()
            oldest_us = max(0.0, float(self.silent_us.max()))
        return oldest_us

    def sent(
        self, request_id: str, engine: int, tokens: int, cached: float = 0.0, now_us: float = 0.0
    ) -> None:
        """Notes one request sent to `engine`; an id sent again replaces its in-flight entry.

        Args:
            tokens: of its prompt.
            cached: those of them the engine is believed to hold.
            now_us: the board's clock; an engine that owed nothing owes an answer from now on.
        """
        name = kept(request_id)
        if name in self._requests:
            self._end(name)
        ENTER.call(self._accounts, engine, float(tokens), cached, now_us)
        self._requests[name] = (engine, tokens, cached)
        queue = self._cached.get(engine)
        if queue is None:
            queue = self._cached[engine] = deque()
        queue.append(cached)
        if len(queue) > _REMEMBERED:  # an engine that acknowledges nothing
            self.unacked_cached[engine] -= queue.popleft()

    def finished(self, request_id: str) -> int | None:
        """Ends a request (finished or aborted); returns its engine, None when it is not known."""
        entry = self._end(kept(request_id))
        return None if entry is None else entry[0]

    def unsent(self, request_id: str) -> int | None:
        """Takes back a request that `sent` noted and that never left; returns its engine.

        None when it is not known: it is finished, or its engine's process is gone. A request taken
        back although the engine got it does no lasting harm: its acknowledgement exceeds what was
        sent, and the account starts again at the engine's counter.
        """
        entry = self._end(kept(request_id))
        if entry is None:
            return None
        engine, tokens, cached = entry
        if self.unacked[0, engine] > 0.0:
            self._accounts[_SENT : _SENT + 2, engine] -= 1.0, tokens
            self.unacked[0, engine] -= 1.0
            self.unacked[1, engine] = max(self.unacked[1, engine] - tokens, 0.0)
            self._forget_unsent(engine, cached)
        return engine

    def unfinished(self, request_ids: Collection[str]) -> None:
        """Ends what is in flight here and not among `request_ids`: all that is, as others know it.

        A request of which only a digest is kept ends once there are none.
        """
        over = [
            name
            for name in self._requests
            if (name not in request_ids if isinstance(name, str) else not request_ids)
        ]
        for name in over:
            self._end(name)

    def engine_of(self, request_id: str) -> int | None:
        """Engine of an unfinished request."""
        entry = self._requests.get(kept(request_id))
        return None if entry is None else entry[0]

    def resize(self, engines: int) -> None:
        """Opens accounts for new engines, or closes the last ones and forgets their requests."""
        keep = min(engines, self.engines)
        accounts = np.zeros((_ROWS, engines))
        accounts[_SEEN] = -1.0
        accounts[:, :keep] = self._accounts[:, :keep]
        self._use(accounts)
        self._cached = {e: queue for e, queue in self._cached.items() if e < engines}
        self._requests = {k: v for k, v in self._requests.items() if v[0] < engines}

    def _end(self, name: str | bytes) -> tuple[int, int, float] | None:
        """Takes a request out of the in-flight account."""
        entry = self._requests.pop(name, None)
        if entry is not None:
            engine, tokens, _ = entry
            self.inflight_requests[engine] -= 1
            self.inflight_tokens[engine] -= tokens
        return entry

    def _forget_lost(self) -> None:
        """Ends what was in flight to engine processes that are gone: nobody will finish it."""
        for name in [n for n, entry in self._requests.items() if self._lost[entry[0]]]:
            self._end(name)
        self._lost[:] = 0.0

    def _forget_unsent(self, engine: int, cached: float) -> None:
        """Takes one entry `cached` out of the queue of `engine`: its newest."""
        queue = self._cached.get(engine)
        if queue is None:
            return
        for back, value in enumerate(reversed(queue), 1):
            if value == cached:
                del queue[-back]
                self.unacked_cached[engine] -= cached
                break
        if not queue:
            del self._cached[engine]

    def _forget_cached(self, engine: int, unacked: int) -> None:
        """Drops the oldest entries of `engine` until one is left per unacknowledged request."""
        queue = self._cached[engine]
        while len(queue) > unacked:
            self.unacked_cached[engine] -= queue.popleft()
        if not queue:
            del self._cached[engine]


def _observe(board: FloatArray, accounts: FloatArray, front_end: int, now_us: float) -> float:
    """Brings `accounts` up to date with `board`.

    Returns the longest silence, microseconds; NaN when an engine's process was replaced.
    """
    requests, tokens = ACCEPTED_REQUESTS + front_end, ACCEPTED_TOKENS + front_end
    oldest_us = 0.0
    for e in range(np.uint64(board.shape[0])):  # unsigned: no index counts from the end
        fresh = board[e, _SEQUENCE] > accounts[_SEEN, e]
        if board[e, _EPOCH] != accounts[_KNOWN_EPOCH, e]:
            if accounts[_KNOWN_EPOCH, e] > 0.0:  # the first process seen is no restart
                accounts[_SENT, e] = board[e, requests]
                accounts[_SENT + 1, e] = board[e, tokens]
                accounts[_LOST, e], oldest_us = 1.0, np.nan
            accounts[_KNOWN_EPOCH, e] = board[e, _EPOCH]
            fresh = True
        if fresh:
            accounts[_SEEN, e] = board[e, _SEQUENCE]
            accounts[_ACCEPTED, e] = board[e, requests]
            accounts[_ACCEPTED + 1, e] = board[e, tokens]
        unacked = accounts[_SENT, e] - accounts[_ACCEPTED, e]
        unacked_tokens = accounts[_SENT + 1, e] - accounts[_ACCEPTED + 1, e]
        if unacked != 0.0 or unacked_tokens != 0.0:
            if accounts[_INFLIGHT, e] > 0.0:
                accounts[_BUSY_AT, e] = now_us
            quiet = now_us - accounts[_BUSY_AT, e] > QUIET_US
            if quiet or unacked <= 0.0 or unacked_tokens < 0.0:  # without requests, no tokens
                accounts[_SENT, e] = accounts[_ACCEPTED, e]
                accounts[_SENT + 1, e] = accounts[_ACCEPTED + 1, e]
                unacked = unacked_tokens = 0.0
        accounts[_UNACKED, e], accounts[_UNACKED + 1, e] = unacked, unacked_tokens
        silent_us = now_us - board[e, _TIMESTAMP]
        if silent_us > FRESH_US:
            # An idle engine takes no steps and publishes nothing: its last word stays true until
            # it is sent something, and from then on it owes an answer. One that is paused is idle
            # too.
            empty = board[e, _WAITING] + board[e, _RUNNING] <= 0.0
            if empty or board[e, _IDLE] > 0.0:
                owed_us = now_us - accounts[_OWED_SINCE, e]
                silent_us = min(silent_us, owed_us) if unacked > 0.0 else 0.0
        accounts[_SILENT, e] = silent_us
        if silent_us > oldest_us:  # never, once it is NaN
            oldest_us = silent_us
    return oldest_us


def _enter(
    accounts: FloatArray, engine: int, tokens: float, cached_tokens: float, now_us: float
) -> None:
    """Adds one request sent to `engine` to `accounts`."""
    if accounts[_UNACKED, engine] == 0.0:
        accounts[_OWED_SINCE, engine] = now_us
    accounts[_BUSY_AT, engine] = now_us
    accounts[_SENT, engine] += 1.0
    accounts[_SENT + 1, engine] += tokens
    accounts[_UNACKED, engine] += 1.0
    accounts[_UNACKED + 1, engine] += tokens
    accounts[_INFLIGHT, engine] += 1.0
    accounts[_INFLIGHT + 1, engine] += tokens
    accounts[_UNACKED_CACHED, engine] += cached_tokens


OBSERVE = Kernel(_observe, "f8(f8[:,::1], f8[:,::1], i8, f8)")
ENTER = Kernel(_enter, "void(f8[:,::1], i8, f8, f8, f8)")
