"""Why the last requests went where they did: every term for the engine chosen and the next best."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any, NamedTuple

from gimbal.core.dispatch.dispatcher import Decision

KEPT = 12
"""Decisions of one front end that are kept, some KB each with 64 engines."""


class _Kept(NamedTuple):
    time_s: float
    policy: str
    prompt_tokens: float
    decision: Decision


class Recent:
    """The last `KEPT` decisions. To note one costs a tuple; they are explained when asked for."""

    def __init__(self) -> None:
        self._kept: deque[_Kept] = deque(maxlen=KEPT)

    def note(self, policy: str, prompt_tokens: float, decision: Decision) -> None:
        self._kept.append(_Kept(time.time(), policy, prompt_tokens, decision))

    def explained(self, first: int) -> list[dict[str, Any]]:
        """Newest first, as JSON has them; `first` is the rank of the first engine."""
        return [_explained(kept, first) for kept in reversed(self._kept)]


def _explained(kept: _Kept, first: int) -> dict[str, Any]:
    """Costs are in the policy's unit, microseconds where it has terms; null where infinite."""
    decision = kept.decision
    costs, chosen = decision.costs.tolist(), decision.engine
    others = [e for e, cost in enumerate(costs) if e != chosen and math.isfinite(cost)]
    second = min(others, key=costs.__getitem__, default=None)

    def terms(engine: int | None) -> list[float | None]:
        if decision.terms is None or engine is None:
            return []
        return [_number(value) for value in decision.terms[:, engine].tolist()]

    return {
        "time_s": round(kept.time_s, 3),
        "policy": kept.policy,
        "reason": decision.reason,
        "prompt_tokens": kept.prompt_tokens,
        "cached_tokens": round(decision.cached_tokens),
        "signal_age_us": _number(decision.signal_age_us),
        "terms": list(decision.term_names),
        "engine": first + chosen,
        "cost": _number(costs[chosen]),
        "cost_by_term": terms(chosen),
        "runner_up": None if second is None else first + second,
        "runner_up_cost": None if second is None else _number(costs[second]),
        "runner_up_by_term": terms(second),
    }


def _number(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None
