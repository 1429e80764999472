"""Domain affinity: dispatch prefers the engine near which a domain's experts live.

Two forms around any dispatch policy, both off unless asked for. `AffinityPolicy` adds the time a
request's pairs spend on the interconnect from each engine to the policy's own predicted times, so
that load outweighs affinity exactly when it costs more. `HomePolicy` sends every domain to a fixed
home while the home is not overloaded, as Sem-MoE (arXiv 2503.04398) schedules requests.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gimbal.core.contracts import (
    DispatchPolicy,
    DispatchRequest,
    EngineLoads,
    FloatArray,
    TimedPolicy,
)


class AffinityPolicy:
    """Predicted times of `inner` plus the interconnect time of the request's own pairs.

    Args:
        inner: a policy whose cost is a sum of times.
        domains: domain -> row of `us_per_token`.
        expected_output_tokens: decode tokens a request is priced for.

    Attributes:
        us_per_token: [domains, engines] time one token of the domain spends on the interconnect,
            all layers together; whoever places experts replaces it.
    """

    def __init__(
        self,
        inner: TimedPolicy,
        domains: Mapping[str, int],
        engines: int,
        expected_output_tokens: float = 57.0,
    ) -> None:
        self._inner = inner
        self._domains = domains
        self._output_tokens = expected_output_tokens
        self.us_per_token: FloatArray = np.zeros((len(domains), engines))
        self.term_names = (*inner.term_names, "affinity")

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] microseconds."""
        costs: FloatArray = self.priced(request, loads)[-1]
        return costs

    def priced(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[terms + 1, engines] microseconds, rows named by `term_names`, and their sum."""
        row = self._domains.get(request.domain or "")
        priced = self._inner.priced(request, loads)
        own = np.zeros((1, priced.shape[1]))
        if row is not None:
            tokens = request.prompt_tokens - loads.cached_tokens + self._output_tokens
            own[0] = tokens * self.us_per_token[row]
        return np.concatenate([priced[:-1], own, priced[-1:] + own])

    def session_bound_us(self, request: DispatchRequest, loads: EngineLoads, engine: int) -> float:
        """The inner policy's bound: a session's cached context outweighs affinity."""
        return self._inner.session_bound_us(request, loads, engine)


class HomePolicy:
    """Every domain has a home engine and leaves it only when the home is overloaded.

    Args:
        inner: decides for requests without a home and for those that leave theirs.
        homes: domain -> engine.
        slack: a home may hold this many times the mean of unfinished requests, plus `spare`.
    """

    def __init__(
        self,
        inner: DispatchPolicy,
        homes: Mapping[str, int],
        slack: float = 1.25,
        spare: float = 4.0,
    ) -> None:
        self._inner, self._homes = inner, homes
        self._slack, self._spare = slack, spare

    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] the inner policy's costs; an accepting home is cheaper than any of them."""
        costs = self._inner.costs(request, loads)
        home = self._homes.get(request.domain or "")
        if home is not None:
            held = loads.inflight_requests
            if held[home] <= self._slack * held.mean() + self._spare:
                costs = np.array(costs)
                costs[home] = costs.min() - 1.0
        return costs


def home_engines(tokens: Mapping[str, float], engines: int) -> dict[str, int]:
    """Domain -> engine so that tokens are even: heaviest domain first, to the lightest engine."""
    load = np.zeros(engines)
    homes = {}
    for domain in sorted(tokens, key=lambda d: (-tokens[d], d)):
        homes[domain] = int(load.argmin())
        load[homes[domain]] += tokens[domain]
    return homes
