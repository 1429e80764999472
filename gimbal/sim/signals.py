"""What the front end sees of the simulated engines: a fresh board, or vLLM's delayed counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.cost.depth import PrefillDepthCost
from gimbal.core.cost.online import OnlineStepCost, smoothed
from gimbal.core.queue.budget import smoothed_share
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field
from gimbal.sim.engine import Engine
from gimbal.sim.requests import StepBatch
from gimbal.sim.step_view import Group

_SEQUENCE = int(Field.SEQUENCE)
_COLUMNS = np.array(
    [
        Field.TIMESTAMP_US,
        Field.WAITING_REQUESTS,
        Field.WAITING_PREFILL_TOKENS,
        Field.RUNNING_REQUESTS,
        Field.RUNNING_PREFILL_TOKENS,
        Field.DECODING_REQUESTS,
        Field.KV_BLOCKS_USED,
        Field.PREEMPTIONS,
        Field.RUNNING_TOKENS,
        Field.STEP_BASE_US,
        Field.DECODE_US_PER_REQUEST,
        Field.PREFILL_US_PER_TOKEN,
        Field.PREFILL_TOKENS_PER_S,
        Field.AWAITED_KV_TOKENS,
        Field.LOADED_KV_TOKENS,
        Field.LOADING_REQUESTS,
        ACCEPTED_REQUESTS,
        ACCEPTED_TOKENS,
    ]
)
"""What `Signals` fills in, in the order in which it does: one assignment per row."""


class Signals:
    """Keeps the board that a dispatcher reads.

    Args:
        engines: in rank order.
        fresh: True publishes every step; False only request counts and KV usage, at most every
            `stats_interval_us` and only when a count changed, as vLLM's coordinator does.
        stats_interval_us: see `fresh`.
        group: gets what steps take: on a server every engine has its own accounts, and told the
            same, they come to the same conclusions.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        fresh: bool,
        stats_interval_us: float,
        group: Group | None = None,
    ) -> None:
        self._engines = engines
        self._fresh = fresh
        self._interval_us = stats_interval_us
        self._published_us = -np.inf
        self._counts: list[tuple[int, int]] = [(0, 0)] * len(engines)
        self._dirty = True
        self.board: FloatArray = np.zeros((len(engines), ROW_WIDTH))
        self.board[:, Field.KV_BLOCKS_TOTAL] = [e.blocks_total for e in engines]
        self.board[:, Field.KV_BLOCK_TOKENS] = [e.block_tokens for e in engines]
        self.board[:, Field.STEP_TOKEN_BUDGET] = [e.budget for e in engines]
        self.board[:, Field.MAX_RUNNING_REQUESTS] = [e.seats for e in engines]
        self.costs = [OnlineStepCost(e.budget) for e in engines]
        bounded = any(e.queue.step_budget for e in engines)
        self._learns = fresh or bounded
        if bounded:
            for engine, cost in zip(engines, self.costs, strict=True):
                engine.view.learned = cost
        self._group = Group() if group is None else group
        if bounded:
            self._group.depth = PrefillDepthCost(engines[0].budget)

    def changed(self) -> None:
        """The engines are no more as they were published."""
        self._dirty = True

    def step_done(self, batches: Sequence[StepBatch], duration_us: float) -> None:
        """Learns from one finished step (every engine saw the same duration)."""
        self._dirty = True
        fullest = tokens = decodes = 0
        for engine, batch in zip(self._engines, batches, strict=True):
            decodes = max(decodes, batch.decodes)
            tokens = max(tokens, batch.tokens)
            if batch.prefill_tokens:  # the queue's orderings read it, whatever dispatch sees
                fullest = max(fullest, batch.prefill_tokens)
                rate = batch.prefill_tokens / max(duration_us, 1.0) * 1e6
                engine.prefill_rate = smoothed(engine.prefill_rate, rate)
        group = self._group
        group.prefill_share = smoothed_share(group.prefill_share, fullest > 0)
        if group.depth is not None and fullest:
            own, pairs = [b.prefill_tokens for b in batches], [b.prefill_pairs for b in batches]
            slowest = group.depth.slowest(own, pairs)
            before_us = self.base_us([batch.decodes for batch in batches])
            group.depth.observe(own[slowest], pairs[slowest], duration_us - before_us)
        if self._learns:
            for cost, batch in zip(self.costs, batches, strict=True):
                cost.observe(batch.prefill_tokens, batch.decodes, duration_us, fullest)
        if group.graphs is not None:
            group.graphs.observe(decodes, duration_us, fullest, tokens)

    def base_us(self, decodes: Sequence[int]) -> float:
        """Learned time of a step without prefill: of the engine where it is longest."""
        return max([cost.step_base_us(n) for cost, n in zip(self.costs, decodes, strict=True)])

    def read(self, now_us: float) -> FloatArray:
        """The board as a front end sees it at `now_us`."""
        if self._fresh:
            if self._dirty:
                self._fill(now_us)
                self._dirty = False
            return self.board
        if now_us - self._published_us >= self._interval_us:
            counts = [(e.waiting_requests, len(e.running)) for e in self._engines]
            if counts != self._counts:
                self._counts = counts
                self._published_us = now_us
                self._fill(now_us)
        # Nothing on vLLM's path says how old a count is; the policies must not read it as stale.
        self.board[:, Field.TIMESTAMP_US] = now_us
        return self.board

    def count_dispatch(self, engine: int) -> None:
        """vLLM raises its own copy of the waiting count until the next snapshot arrives."""
        if not self._fresh:
            self.board[engine, Field.WAITING_REQUESTS] += 1

    def _fill(self, now_us: float) -> None:
        for row, engine, cost in zip(self.board, self._engines, self.costs, strict=True):
            row[_SEQUENCE] += 1
            row[_COLUMNS] = (
                now_us,
                engine.waiting_requests,
                engine.waiting.waiting_tokens,
                len(engine.running),
                engine.remaining_prefill_tokens,
                engine.decodes,
                engine.used_blocks,
                engine.preemptions,
                engine.kv_tokens,
                cost.step_base_us(engine.decodes),
                cost.decode_us_per_request,
                cost.prefill_us_per_token,
                engine.prefill_rate,
                engine.loads.awaited_tokens,
                engine.loads.held_tokens,
                engine.loads.awaiting + len(engine.loads.held),
                engine.accepted_requests,
                engine.accepted_tokens,
            )
