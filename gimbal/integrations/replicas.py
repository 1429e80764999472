"""Gimbal's dispatch over replicas that come and go, for routers before several servers.

A `Dispatcher` counts engines by their place. Here each replica has a place for as long as it is
there; a place that is left is closed to the policy until the next replica takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from gimbal.board.clock import now_us
from gimbal.board.published import Source
from gimbal.core.config import DispatchConfig
from gimbal.core.contracts import (
    DispatchPolicy,
    DispatchRequest,
    EngineLoads,
    FloatArray,
    TimedPolicy,
)
from gimbal.core.dispatch import POLICIES
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.errors import with_type
from gimbal.core.snapshot import ROW_WIDTH

logger = logging.getLogger("vllm.gimbal")

REFRESH_US = 500_000.0


class Prompt(NamedTuple):
    """What is known of a request before an engine has it.

    Attributes:
        tokens: of its prompt, as near as can be told.
        token_ids: the prompt itself, for prefix affinity; None where there are only characters.
        session: the conversation that it belongs to.
    """

    tokens: int
    token_ids: Sequence[int] | None = None
    session: str | None = None


class Published(NamedTuple):
    """Where a replica's engine publishes its rows, and under which name."""

    address: str
    source: Source


class Rows(Protocol):
    """What is needed of a `RowReader`."""

    def follow(self, address: str) -> None: ...
    def unfollow(self, address: str) -> None: ...
    def forget(self, source: Source) -> None: ...
    def rows(self, sources: Sequence[Source]) -> FloatArray: ...


class Replicas:
    """The replicas of one deployment, as one router sees them. One event loop's, or one thread's.

    Args:
        reader: has their rows.
        config: how to choose.
        clock: microseconds, the reader's.
        router: this router's number among those before the same replicas, which its requests name
            (`ROUTER`); 0 where they name none.

    Attributes:
        fallbacks: choices that failed; the fewest prompt tokens in flight decided then.
    """

    def __init__(
        self,
        reader: Rows,
        config: DispatchConfig,
        clock: Callable[[], float] = now_us,
        router: int = 0,
    ) -> None:
        self.fallbacks = 0
        self._reader = reader
        self._clock = clock
        policy = POLICIES.build(config.policy, config.options)
        self._open = _open_places(policy)
        # Replicas are servers of their own: none waits for another's step.
        self.dispatcher = Dispatcher(
            1, config, front_end=router, policy=self._open, lock_step=False
        )
        self._places: dict[str, int] = {}
        self._published: dict[str, Published | None] = {}
        self._free = [0]
        self._refresh_us = 0.0

    def update(self, replicas: Mapping[str, Published | None]) -> None:
        """From now on there are `replicas`, by name; None for one that publishes nothing."""
        for name in [name for name in self._places if name not in replicas]:
            self.remove(name)
        for name, published in replicas.items():
            if name not in self._places:
                self._add(name, published)

    def _add(self, name: str, published: Published | None) -> None:
        if not self._free:
            self._free.append(self.dispatcher.engines)
            self.dispatcher.resize(self.dispatcher.engines + 1)
        self._places[name] = self._free.pop()
        self._published[name] = published
        if published is not None:
            self._reader.follow(published.address)

    def remove(self, name: str) -> None:
        """That replica is gone, and what it had cached; what was in flight to it nobody ends."""
        place = self._places.pop(name, None)
        if place is None:
            return
        published = self._published.pop(name)
        if published is not None:
            self._reader.unfollow(published.address)
            self._reader.forget(published.source)
        self.dispatcher.cache_cleared(place)
        self._free.append(place)

    def ranked(self, request_id: str, prompt: Prompt, candidates: Sequence[str]) -> list[str]:
        """`candidates`, the best first, which the request is entered for. Never raises.

        A request that is asked for again, because nobody took it, is entered anew.
        """
        self.dispatcher.unsent(request_id)
        known = [name for name in candidates if name in self._places]
        if not known:
            return list(candidates)
        now = self._clock()
        request = DispatchRequest(request_id, prompt.tokens, now, prompt.session)
        places = [self._places[name] for name in known]
        try:
            costs = self._costs(request, prompt.token_ids, places, now)
        except Exception as error:
            self.fallbacks += 1
            if self.fallbacks == 1:
                said = "Gimbal: no choice (%s); by prompt tokens in flight, counted from now on"
                logger.warning(said, with_type(error))
            self.dispatcher.unsent(request_id)
            costs = self.dispatcher.ledger.inflight_tokens[places]
            self.dispatcher.assigned(request, places[int(np.argmin(costs))])
        order = np.argsort(costs, kind="stable").tolist()
        return [known[i] for i in order]

    def _costs(
        self,
        request: DispatchRequest,
        token_ids: Sequence[int] | None,
        places: list[int],
        now: float,
    ) -> FloatArray:
        """[places] what each costs, the one that the request is entered for the least."""
        dispatcher, board = self.dispatcher, self._board()
        if now - self._refresh_us > REFRESH_US:
            self._refresh_us = now
            dispatcher.fit_prefix_index(board)
        self._open.only(places, len(board))
        decision = dispatcher.dispatch(request, token_ids, board, now)
        costs = decision.costs[places]
        if decision.engine in places:
            costs[places.index(decision.engine)] = -np.inf
        else:  # without signals it is not the policy that decides
            dispatcher.unsent(request.request_id)
            dispatcher.assigned(request, places[int(np.argmin(costs))], token_ids)
        return costs

    def _board(self) -> FloatArray:
        """[places, ROW_WIDTH] the newest row of each replica; zeros where none is known."""
        board = np.zeros((self.dispatcher.engines, ROW_WIDTH))
        known = [(self._places[n], p.source) for n, p in self._published.items() if p is not None]
        if known:
            places, sources = zip(*known, strict=True)
            board[list(places)] = self._reader.rows(sources)
        return board

    def sent(self, request_id: str, prompt: Prompt, name: str) -> None:
        """The request went to `name`, whichever was the best."""
        place = self._places.get(name)
        if place is not None and self.dispatcher.ledger.engine_of(request_id) != place:
            self.dispatcher.unsent(request_id)
            request = DispatchRequest(request_id, prompt.tokens, self._clock(), prompt.session)
            self.dispatcher.assigned(request, place, prompt.token_ids)

    def unsent(self, request_id: str) -> None:
        """No engine got the request."""
        self.dispatcher.unsent(request_id)

    def finished(self, request_id: str) -> None:
        """It is over, well or not."""
        self.dispatcher.finished(request_id)


class _Open:
    """A policy that is shown all places and may choose among the open ones."""

    def __init__(self, policy: DispatchPolicy) -> None:
        self._policy = policy
        self._closed = np.zeros(1)

    def only(self, places: Sequence[int], count: int) -> None:
        """Opens `places` of `count`."""
        self._closed = np.full(count, np.inf)
        self._closed[places] = 0.0

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        return self._policy.costs(request, loads) + self._closed


class _OpenTimed(_Open):
    """The same of a `TimedPolicy`."""

    def __init__(self, policy: TimedPolicy) -> None:
        super().__init__(policy)
        self._timed = policy
        self.term_names = policy.term_names

    def priced(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        priced = self._timed.priced(request, loads)
        return np.vstack((priced[:-1], priced[-1] + self._closed))

    def session_bound_us(self, request: DispatchRequest, loads: EngineLoads, engine: int) -> float:
        return self._timed.session_bound_us(request, loads, engine)


def _open_places(policy: Any) -> _Open:
    return (
        _OpenTimed(cast(TimedPolicy, policy))
        if getattr(policy, "term_names", ())
        else _Open(policy)
    )
