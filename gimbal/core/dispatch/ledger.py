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
- A counter above what was sent (a front end that restarted under the same index) starts the
  account again at the counter.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from gimbal.core.contracts import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, Field, FloatArray

BoolArray = npt.NDArray[np.bool_]
_EPOCH, _SEQUENCE = int(Field.EPOCH), int(Field.SEQUENCE)


class Ledger:
    """The accounts of front end `front_end` with `engines` engines.

    Attributes:
        unacked: [2, engines] requests and prompt tokens sent and not yet acknowledged.
        unacked_cached: [engines] of the unacknowledged tokens, those believed cached there.
        inflight: [2, engines] requests and prompt tokens sent and not yet finished.
    """

    def __init__(self, engines: int, front_end: int = 0) -> None:
        columns = (ACCEPTED_REQUESTS + front_end, ACCEPTED_TOKENS + front_end)
        self._columns = slice(columns[0], columns[1] + 1, columns[1] - columns[0])
        self._requests: dict[str, tuple[int, int]] = {}
        self._sent = np.zeros((2, engines))
        self._accepted = np.zeros((2, engines))
        self._epoch = np.zeros(engines)
        self._seen = np.full(engines, -1.0)  # SEQUENCE of the newest snapshot used
        self.unacked = np.zeros((2, engines))
        self.unacked_cached = np.zeros(engines)
        self.inflight = np.zeros((2, engines))
        # Engine -> cached tokens of its unacknowledged requests, oldest first.
        self._cached: dict[int, deque[float]] = {}

    @property
    def engines(self) -> int:
        """Engines with an account."""
        return self._sent.shape[1]

    def observe(self, board: FloatArray) -> None:
        """Reads the acknowledgements in `board` [engines, ROW_WIDTH]."""
        columns = board.T
        fresh = columns[_SEQUENCE] > self._seen
        if columns[_EPOCH].tobytes() != self._epoch.tobytes():
            fresh |= self._restart(board)
        np.copyto(self._seen, columns[_SEQUENCE], where=fresh)
        np.copyto(self._accepted, columns[self._columns], where=fresh)
        unacked = np.subtract(self._sent, self._accepted, out=self.unacked).ravel()
        # argmin and an index: a reduction to a scalar costs five times as much on few engines.
        if unacked[unacked.argmin()] < 0:
            self._start_again(self.unacked.min(axis=0) < 0)
        for engine in list(self._cached):
            self._forget_cached(engine, int(self.unacked[0, engine]))

    def sent(self, request_id: str, engine: int, tokens: int, cached: float = 0.0) -> None:
        """Notes one request sent to `engine`; an id sent again replaces its in-flight entry.

        Args:
            tokens: of its prompt.
            cached: those of them the engine is believed to hold.
        """
        self.finished(request_id)
        self._requests[request_id] = (engine, tokens)
        for account in (self._sent, self.unacked, self.inflight):
            account[0, engine] += 1
            account[1, engine] += tokens
        self._cached.setdefault(engine, deque()).append(cached)
        if cached:
            self.unacked_cached[engine] += cached

    def finished(self, request_id: str) -> int | None:
        """Ends a request (finished or aborted); returns its engine, None when it is not known."""
        entry = self._requests.pop(request_id, None)
        if entry is None:
            return None
        engine, tokens = entry
        self.inflight[0, engine] -= 1
        self.inflight[1, engine] -= tokens
        return engine

    def engine_of(self, request_id: str) -> int | None:
        """Engine of an unfinished request."""
        entry = self._requests.get(request_id)
        return None if entry is None else entry[0]

    def resize(self, engines: int) -> None:
        """Opens accounts for new engines, or closes the last ones and forgets their requests."""
        keep = min(engines, self.engines)
        cached = np.zeros(engines)
        cached[:keep] = self.unacked_cached[:keep]
        self.unacked_cached = cached
        self._cached = {e: queue for e, queue in self._cached.items() if e < engines}
        for name in ("_sent", "_accepted", "unacked", "inflight"):
            account = np.zeros((2, engines))
            account[:, :keep] = getattr(self, name)[:, :keep]
            setattr(self, name, account)
        for name, unknown in (("_epoch", 0.0), ("_seen", -1.0)):
            known = np.full(engines, unknown)
            known[:keep] = getattr(self, name)[:keep]
            setattr(self, name, known)
        self._requests = {k: v for k, v in self._requests.items() if v[0] < engines}

    def _forget_cached(self, engine: int, unacked: int) -> None:
        """Drops the oldest entries of `engine` until one is left per unacknowledged request."""
        queue = self._cached[engine]
        while len(queue) > unacked:
            self.unacked_cached[engine] -= queue.popleft()
        if not queue:
            del self._cached[engine]

    def _restart(self, board: FloatArray) -> BoolArray:
        """[engines] whose process is a new one; the first one seen is no restart."""
        changed: BoolArray = board[:, _EPOCH] != self._epoch
        restarted = changed & (self._epoch > 0)
        np.copyto(self._sent, board.T[self._columns], where=restarted)
        np.copyto(self._epoch, board[:, _EPOCH], where=changed)
        return changed

    def _start_again(self, engines: BoolArray) -> None:
        """Opens the accounts of `engines` again at the counters they publish."""
        np.copyto(self._sent, self._accepted, where=engines)
        self.unacked[:, engines] = 0.0
