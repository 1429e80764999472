"""Gimbal's ordering: prefill work and age on one virtual clock, with a bound on overtaking.

Every queue has a virtual clock V that counts prefill tokens. A request i with w_i uncached tokens
gets the static key ``K_i = V(a_i) + w_i`` when it is queued at a_i, and the smallest key is served
first; a prefill that is already running and has r tokens left of its w competes with
``K_i - (w_i - r)``. Between two arrivals V grows with time at the aging rate

    rate = max(min_rate, prefill_tokens_per_s / (backlog_factor * waiting requests))

and each arrival adds ``w / overtake_factor``. The rate is what one prompt's size is worth in age:
waiting/throughput is the time the queue needs per token of mean size (Little's law), so a prompt of
mean size counts as having arrived `backlog_factor` drain times later, from idle to overload.

**Bound.** Let i be queued and let J be the requests queued after i that are ever served while i
could be. Together they do less than ``overtake_factor * w_i`` tokens of work ahead of i, whatever
the rates, the clock and the arrivals.

*Proof.* Let q_j <= w_j be what j in J has left when it first goes ahead of i; it does at most q_j
ahead of i. Keys only fall, by the work done, so going ahead means
``V(a_j) + q_j < V(a_i) + w_i`` (1). Sort J by arrival. Each arrival adds at least its w / F to V
(F = overtake_factor) and V never falls, so at the m-th of J ``V(a_m) - V(a_i) >= sum(w_l, l < m) /
F >= sum(q_l, l < m) / F``. With (1): ``sum(q_l, l < m) / F + q_m < w_i``, and as F >= 1,
``sum(q_l, l <= m) < F * w_i``. A key is never changed afterwards, so later rates do not matter. ∎

*Corollaries.* With prefill throughput mu, the backlog W at its arrival and no failed allocations i
is prefilled within ``(W + (F + 1) * w_i) / mu`` seconds plus one step: FCFS plus F times its own
prefill time, so that a short prompt is never far from FCFS. In time, only requests that arrive
within ``w_i / min_rate`` seconds can overtake i (V grows at least at min_rate).
"""

from __future__ import annotations

from dataclasses import dataclass

from gimbal.core.contracts import OrderingTraits, QueuedRequest, QueueState
from gimbal.core.options import AtLeastOne, NotNegative, option


@dataclass(frozen=True, slots=True)
class GimbalOrderingOptions:
    """Options of queue ordering `gimbal`."""

    overtake_factor: AtLeastOne = option(
        10.0, "F: later work that may overtake a request, in multiples of its own"
    )
    backlog_factor: NotNegative = option(
        4.0,
        "drain times of the queue that a prompt of mean size counts as younger; 0: only arriving "
        "work advances the clock",
    )
    min_rate_tokens_per_s: NotNegative = option(1.0, "floor of the aging rate")

    def __post_init__(self) -> None:
        if not (self.overtake_factor >= 1.0 and self.backlog_factor >= 0.0):
            raise ValueError("overtake_factor must be >= 1, backlog_factor >= 0")
        if not self.min_rate_tokens_per_s >= 0.0:
            raise ValueError("min_rate_tokens_per_s must be >= 0")


class GimbalOrdering:
    """Static keys on a virtual clock; see the module for the bound."""

    Options = GimbalOrderingOptions
    traits = OrderingTraits(
        age_limit=True, shares_steps=True, passes_blocked=True, sizes_steps=True
    )

    def __init__(self, options: GimbalOrderingOptions = GimbalOrderingOptions()) -> None:
        self.overtake_factor = options.overtake_factor
        self.backlog_factor = options.backlog_factor
        self.min_rate_tokens_per_s = options.min_rate_tokens_per_s
        self.virtual_tokens = 0.0
        self._last_s: float | None = None

    def rate_tokens_per_s(self, state: QueueState) -> float:
        """How fast the virtual clock runs in this state."""
        if self.backlog_factor == 0.0:
            return self.min_rate_tokens_per_s
        waiting = max(1, state.waiting_requests)
        rate = state.prefill_tokens_per_s / (self.backlog_factor * waiting)
        return max(self.min_rate_tokens_per_s, rate)

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        """Advances the virtual clock to ``state.now_s`` and by this arrival; call once each."""
        if self._last_s is None:
            self._last_s = state.now_s
        elapsed_s = state.now_s - self._last_s
        if elapsed_s > 0.0:
            self.virtual_tokens += elapsed_s * self.rate_tokens_per_s(state)
            self._last_s = state.now_s
        key = self.virtual_tokens + request.uncached_tokens
        self.virtual_tokens += request.uncached_tokens / self.overtake_factor
        return key

    def bound_s(self, ahead_tokens: float, own_tokens: int, prefill_tokens_per_s: float) -> float:
        """Longest time to the end of a request's prefill by the first corollary, less one step.

        Args:
            ahead_tokens: prefill work waiting or running when it was queued.
            own_tokens: its uncached tokens.
            prefill_tokens_per_s: throughput; infinity is returned while it is unknown (0).
        """
        if prefill_tokens_per_s <= 0.0:
            return float("inf")
        return (ahead_tokens + (self.overtake_factor + 1.0) * own_tokens) / prefill_tokens_per_s
