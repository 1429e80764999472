"""Where the load of the experts lies, per layer and rank, and what the last rearrangement changed.

Made of the same answers of all workers as ``GET /gimbal/routing``, small enough for a page: 58
layers of 256 experts on 64 ranks are some 100 KB.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, Topology
from gimbal.core.placement.objective import balance, pair_loads, received
from gimbal.vllm_plugin.placement.stats import combine

_MOST_PERCENT = 9999.0
"""Of the layer's mean: beyond it one colour is as good as another."""


def expert_load(answers: Sequence[dict[str, Any]]) -> bytes:
    """JSON of the answers of all workers; raises InputError as `combine` does.

    ``ranks`` [layers][ranks] and ``experts`` [layers][experts] are per cent of the layer's mean,
    under an even split over replicas. Where others have the rest of the group, it is the load that
    the ranks in ``answered`` make. After a rearrangement ``before`` is ``ranks`` for today's
    load under the map it replaced, and ``received`` [layers] says how many experts travelled.
    """
    counts, placement, facts = combine(answers)
    pairs = counts.routing.counts.sum(axis=0)
    per_source = facts["ranks_per_source"]
    slots = placement.shape[1] // facts["ranks"]
    topology = Topology(facts["ranks"], slots, per_source, facts["ranks"])
    found: dict[str, Any] = {
        "model": facts["model"],
        "steps": counts.routing.steps,
        "sources": facts["sources"],
        "ranks": _percent(pair_loads(placement, pairs, topology)),
        "experts": _percent(pairs),
        "balance": balance(placement, counts.routing.counts, topology),
        "served_locally": facts.get("served_locally"),
        "last": facts["last"],
        "answered": facts.get("answered"),
    }
    replaced = _replaced(answers, placement)
    if replaced is not None:
        found["before"] = _percent(pair_loads(replaced, pairs, topology))
        found["balance_before"] = balance(replaced, counts.routing.counts, topology)
        found["received"] = received(placement, replaced, topology).tolist()
    return json.dumps(found, allow_nan=False, separators=(",", ":")).encode()


def _percent(loads: FloatArray) -> list[list[int]]:
    mean = loads.mean(axis=1, keepdims=True)
    share = np.divide(100.0 * loads, mean, out=np.zeros_like(loads), where=mean > 0.0)
    percent: list[list[int]] = np.minimum(np.rint(share), _MOST_PERCENT).astype(int).tolist()
    return percent


def _replaced(answers: Sequence[dict[str, Any]], placement: IntArray) -> IntArray | None:
    """The map before the last commit; None before the first, and where it had another shape."""
    said = next(a for a in answers if a)["models"][0]["replaced"]
    replaced = np.frombuffer(said, "<i4")
    return replaced.reshape(placement.shape) if replaced.size == placement.size else None
