"""The runner of a dispatch policy: the vLLM hook and the simulator call the same one.

It owns what a pure policy cannot: the account of unacknowledged requests, the prefix index, the
sessions, the rotation that breaks ties, and the judgement whether the signals can be trusted. One
`Dispatcher` belongs to one front end and is not thread-safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np

from gimbal.core.config import DispatchConfig
from gimbal.core.contracts import (
    ARGMIN,
    DispatchPolicy,
    DispatchRequest,
    EngineLoads,
    FloatArray,
    TimedPolicy,
    argmin_rotating,
)
from gimbal.core.dispatch import POLICIES
from gimbal.core.dispatch.ledger import Ledger
from gimbal.core.dispatch.prefix_index import PrefixIndex, PrefixMatch
from gimbal.core.dispatch.sessions import Sessions
from gimbal.core.errors import PolicyError, one_line, with_type
from gimbal.core.snapshot import Field

_FLOAT64 = np.dtype(np.float64)
_REUSE_RATE = 0.01
_AVOIDED_TOKENS = 1e12
_STEPS_LATE = 4.0  # an engine publishes twice per step: this much silence is not a long step


class Decision(NamedTuple):
    """One dispatch decision; immutable.

    Attributes:
        engine: the chosen engine.
        costs: [engines] what the policy made of each engine, in its own unit.
        term_names: names of the rows of `terms`; empty for policies without terms.
        terms: [terms, engines] parts of the costs, microseconds; None without terms.
        signal_age_us: for how long the oldest snapshot that mattered has been overdue or unread.
        cached_tokens: prompt tokens the chosen engine is believed to hold already.
        reason: ``policy`` (lowest cost), ``session`` (kept with its session), or ``stale``
            (signals too old: in-flight prompt tokens decided).
    """

    engine: int
    costs: FloatArray
    term_names: tuple[str, ...]
    terms: FloatArray | None
    signal_age_us: float
    cached_tokens: float
    reason: str


class Dispatcher:
    """Chooses engines for the requests of one front end.

    Args:
        engines: engines in rank order.
        config: the level's options.
        front_end: index of this API server; selects its acknowledgement counters on the board.
        client_count: API servers that share the engines.
        policy: overrides `config.policy` with an object.
        feedback_weight: multiplier of expert pressure; 0 switches that feedback off.
        lock_step: the engines step together, as those of a Mixture-of-Experts model do.
    """

    def __init__(
        self,
        engines: int,
        config: DispatchConfig,
        *,
        front_end: int = 0,
        client_count: int = 1,
        policy: DispatchPolicy | None = None,
        feedback_weight: float = 0.0,
        lock_step: bool = True,
    ) -> None:
        self.feedback_weight = feedback_weight
        if policy is None:
            self.use_policy_named(config.policy, config.options)
        else:
            self.use_policy(policy)
        self.ledger = Ledger(engines, front_end)
        self.prefixes = PrefixIndex(engines, config.prefix_chunks, config.prefix_chunk_tokens)
        self.sessions = Sessions(config.sessions)
        self._client_count = client_count
        self._lock_step = lock_step
        self._max_age_us = config.max_signal_age_ms * 1e3
        # Front ends start at different engines, so that several idle ones do not march in step.
        self._rotation = engines * front_end // client_count
        self._unsettled: tuple[PrefixMatch, int, str] | None = None
        self._prefix_reuse = 0.0
        self._prefix_chunks = config.prefix_chunks
        self._kv_tokens = 0.0

    def use_policy(self, policy: DispatchPolicy, name: str = "") -> None:
        """Decides by `policy` from now on; accounts, prefix index and sessions stay."""
        self.policy = policy
        self.policy_name = name or type(policy).__name__
        declares_terms = bool(getattr(policy, "term_names", ()))
        self._timed = cast(TimedPolicy, policy) if declares_terms else None

    def use_policy_named(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        """`use_policy` by name, see `Registry.load`; raises InputError when it cannot be made."""
        self.use_policy(POLICIES.build(name, options), name)

    @property
    def engines(self) -> int:
        """Engines that can be chosen."""
        return self.ledger.engines

    def dispatch(
        self,
        request: DispatchRequest,
        prompt_token_ids: Sequence[int] | None,
        board: FloatArray,
        now_us: float,
    ) -> Decision:
        """Chooses an engine for `request` and enters it in the accounts.

        Args:
            prompt_token_ids: the prompt, for prefix affinity; None when there are no tokens.
            board: [engines, ROW_WIDTH] snapshots read just now.
            now_us: the board's clock.
        """
        if self._unsettled is not None:
            self.settle()
        oldest_us = self.ledger.observe(board, now_us)
        match = self.prefixes.match(prompt_token_ids or ())
        cached = _not_computed(request, match)
        decision = self._decide(request, self._loads(board, cached), oldest_us)
        self._enter(request, decision.engine, match, now_us, decision.cached_tokens)
        self._learn_reuse(request, match)
        return decision

    def assigned(
        self,
        request: DispatchRequest,
        engine: int,
        prompt_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Enters a request that somebody else sent to `engine`: a pinned rank, or a fallback."""
        self.settle()
        match = self.prefixes.match(prompt_token_ids or ())
        cached = float(_not_computed(request, match)[engine])
        self._enter(request, engine, match, request.arrival_us, cached)

    def finished(self, request_id: str) -> None:
        """Ends a request, finished or aborted; unknown ids and repetitions are ignored."""
        self.ledger.finished(request_id)

    def unsent(self, request_id: str) -> None:
        """Takes back a request that was entered and never left; unknown ids are ignored."""
        self.ledger.unsent(request_id)
        if self._unsettled is not None and self._unsettled[2] == request_id:
            self._unsettled = None  # nobody is going to hold its prompt

    def settle(self) -> None:
        """Enters the last prompt into the prefix index.

        Left out of `dispatch` because nothing waits for it: a caller may run it once the request
        is on its way. The next `dispatch` does it otherwise.
        """
        if self._unsettled is not None:
            match, engine, _ = self._unsettled
            self._unsettled = None
            self.prefixes.insert(match, engine)

    def resize(self, engines: int) -> None:
        """Follows an elastic change of the number of engines; the last ones come and go."""
        self.settle()
        for gone in range(engines, self.engines):
            self.sessions.forget(gone)
        self.ledger.resize(engines)
        self.prefixes.resize(engines)

    def fit_prefix_index(self, board: FloatArray) -> None:
        """Has the prefix index forget about when the engines of `board` run out of KV memory.

        The index holds three quarters of its capacity on average. It also learns the block size.
        """
        tokens = float((board[:, Field.KV_BLOCKS_TOTAL] * board[:, Field.KV_BLOCK_TOKENS]).sum())
        if tokens > 0 and tokens != self._kv_tokens:
            self._kv_tokens = tokens
            self.prefixes.block_tokens = max(1, int(board[0, Field.KV_BLOCK_TOKENS]))
            chunks = int(tokens / self.prefixes.chunk_tokens / 0.75)
            self.prefixes.set_capacity(min(chunks, self._prefix_chunks))

    def cache_cleared(self, engine: int) -> None:
        """The engine dropped its prefix cache (KV event AllBlocksCleared, or a restart)."""
        self.settle()
        self.prefixes.clear(engine)
        self.sessions.forget(engine)

    def loads(self, board: FloatArray, now_us: float) -> EngineLoads:
        """What a policy would be shown now, of a prompt that nobody has cached.

        Args:
            board, now_us: see `dispatch`.
        """
        self.ledger.observe(board, now_us)
        return self._loads(board, np.zeros(len(board)))

    def _loads(self, board: FloatArray, cached_tokens: FloatArray) -> EngineLoads:
        ledger = self.ledger
        return EngineLoads(
            board,
            ledger.unacked_requests,
            ledger.unacked_tokens,
            ledger.inflight_requests,
            ledger.inflight_tokens,
            cached_tokens,
            ledger.silent_us,
            ledger.unacked_cached,
            self._client_count,
            self._rotation,
            self._prefix_reuse,
            self.feedback_weight,
        )

    def _decide(self, request: DispatchRequest, loads: EngineLoads, oldest_us: float) -> Decision:
        """Raises PolicyError when the policy gives no costs."""
        terms: FloatArray | None = None
        names: tuple[str, ...] = ()
        reason = "policy"
        if oldest_us > self._max_age_us and oldest_us > self._limit_us(loads):
            costs, reason = self._without_signals(loads), "stale"
            engine = argmin_rotating(costs, self._rotation)
        else:
            # In this frame, not in a function of its own: a request waits for it.
            try:
                if self._timed is None:
                    costs = self.policy.costs(request, loads)
                else:
                    priced = self._timed.priced(request, loads)
                    terms, costs, names = priced[:-1], priced[-1], self._timed.term_names
                # A copy: the array may be the policy's own, and closed to writers.
                if type(costs) is np.ndarray and costs.dtype is _FLOAT64:
                    costs = costs.copy()
                else:
                    costs = costs.astype(np.float64, order="C", casting="same_kind", subok=False)
            except Exception as error:
                text = f"dispatch policy {self.policy_name!r}: {with_type(error)}"
                raise PolicyError(text) from error
            engines = len(loads.board)
            engine = ARGMIN.call(costs, self._rotation) if costs.shape == (engines,) else -1
            if engine < 0:
                self._refuse(costs, engines)
        if request.session is not None and terms is not None:
            engine, reason = self._keep_session(request, loads, costs, engine)
        cached = float(loads.cached_tokens[engine])
        return Decision(engine, costs, names, terms, oldest_us, cached, reason)

    def _refuse(self, costs: FloatArray, engines: int) -> NoReturn:
        """Raises PolicyError for `costs` that are not numbers, one per engine, some finite."""
        said = f"dispatch policy {self.policy_name!r}: costs"
        if costs.shape != (engines,):
            raise PolicyError(f"{said} of shape {costs.shape}, expected ({engines},)")
        raise PolicyError(f"{said} {one_line(costs.tolist())}: no engine can be chosen by them")

    def _limit_us(self, loads: EngineLoads) -> float:
        """Overdue is the configured age, or several steps where one step lasts that long."""
        step_us = float(loads.column(Field.STEP_TIME_US).max())
        return max(self._max_age_us, _STEPS_LATE * step_us)

    def _without_signals(self, loads: EngineLoads) -> FloatArray:
        """[engines] uncached prompt tokens in flight.

        Engines that run on their own are avoided while they are silent: the others still serve.
        In lock step all wait for the silent one, and what it is not sent now the others would
        have to do later.
        """
        costs = loads.inflight_tokens - loads.cached_tokens
        silent = loads.age_us > self._limit_us(loads)
        if self._lock_step or silent.all():
            return costs
        return np.where(silent, costs + _AVOIDED_TOKENS, costs)

    def _keep_session(
        self, request: DispatchRequest, loads: EngineLoads, costs: FloatArray, best: int
    ) -> tuple[int, str]:
        assert self._timed is not None
        assert request.session is not None
        home = self.sessions.engine(request.session)
        if home is None or home == best:
            return best, "policy"
        if costs[home] - costs[best] > self._timed.session_bound_us(request, loads, home):
            return best, "policy"
        return home, "session"

    def _enter(
        self,
        request: DispatchRequest,
        engine: int,
        match: PrefixMatch,
        now_us: float,
        cached: float,
    ) -> None:
        self.ledger.sent(request.request_id, engine, request.prompt_tokens, cached, now_us)
        self._rotation += 1
        if request.session is not None:
            self.sessions.note(request.session, engine)
        if match.tokens:
            self._unsettled = (match, engine, request.request_id)

    def _learn_reuse(self, request: DispatchRequest, match: PrefixMatch) -> None:
        """Share of prompt tokens some engine had cached, over about the last 1 / rate requests."""
        longest = match.longest / max(1, request.prompt_tokens)
        self._prefix_reuse += _REUSE_RATE * (longest - self._prefix_reuse)


def _not_computed(request: DispatchRequest, match: PrefixMatch) -> FloatArray:
    """[engines] tokens of the prompt that are cached there, or loaded."""
    if not request.loaded_tokens:
        return match.cached_tokens
    return np.maximum(match.cached_tokens, float(request.loaded_tokens))
