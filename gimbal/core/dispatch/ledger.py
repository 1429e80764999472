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

import numpy as np

from gimbal.core.contracts import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, Field, FloatArray

_EPOCH, _TIMESTAMP, _SEQUENCE = int(Field.EPOCH), int(Field.TIMESTAMP_US), int(Field.SEQUENCE)


class Ledger:
    """The accounts of front end `front_end` with `engines` engines.

    Attributes:
        unacked: [2, engines] requests and prompt tokens sent and not yet acknowledged.
        inflight: [2, engines] requests and prompt tokens sent and not yet finished.
    """

    def __init__(self, engines: int, front_end: int = 0) -> None:
        self._requests_column = ACCEPTED_REQUESTS + front_end
        self._tokens_column = ACCEPTED_TOKENS + front_end
        self._requests: dict[str, tuple[int, int]] = {}
        self._sent = np.zeros((2, engines))
        self._accepted = np.zeros((2, engines))
        self._epoch: list[float] = [0.0] * engines
        self._seen: list[float] = [-1.0] * engines  # SEQUENCE of the newest snapshot used
        self.unacked = np.zeros((2, engines))
        self.inflight = np.zeros((2, engines))

    @property
    def engines(self) -> int:
        """Engines with an account."""
        return self._sent.shape[1]

    def observe(self, board: FloatArray) -> None:
        """Reads the acknowledgements in `board` [engines, ROW_WIDTH]."""
        sequence = board[:, _SEQUENCE].tolist()
        if sequence == self._seen:
            return
        epoch = board[:, _EPOCH].tolist()
        requests = board[:, self._requests_column].tolist()
        tokens = board[:, self._tokens_column].tolist()
        for engine, number in enumerate(sequence):
            if epoch[engine] != self._epoch[engine]:
                self._restart(engine, epoch[engine], requests[engine], tokens[engine])
            elif number > self._seen[engine]:
                self._accept(engine, requests[engine], tokens[engine])
            else:
                continue
            self._seen[engine] = number

    def sent(self, request_id: str, engine: int, tokens: int) -> None:
        """Notes one request sent to `engine`; an id sent again replaces its in-flight entry."""
        self.finished(request_id)
        self._requests[request_id] = (engine, tokens)
        for account in (self._sent, self.unacked, self.inflight):
            account[0, engine] += 1
            account[1, engine] += tokens

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
        for name in ("_sent", "_accepted", "unacked", "inflight"):
            account = np.zeros((2, engines))
            account[:, :keep] = getattr(self, name)[:, :keep]
            setattr(self, name, account)
        self._epoch = self._epoch[:keep] + [0.0] * (engines - keep)
        self._seen = self._seen[:keep] + [-1.0] * (engines - keep)
        self._requests = {k: v for k, v in self._requests.items() if v[0] < engines}

    def _accept(self, engine: int, requests: float, tokens: float) -> None:
        sent = self._sent[:, engine]
        if requests > sent[0] or tokens > sent[1]:
            sent[:] = requests, tokens
        self._accepted[:, engine] = requests, tokens
        self.unacked[:, engine] = sent - self._accepted[:, engine]

    def _restart(self, engine: int, epoch: float, requests: float, tokens: float) -> None:
        first = self._epoch[engine] == 0.0
        self._epoch[engine] = epoch
        if not first:
            self._sent[:, engine] = requests, tokens
        self._accept(engine, requests, tokens)
