"""Step records of several engines put together into lock-step steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gimbal.core.cost.calibrate import StepSample
from gimbal.records.schema import StepRecord


def join_steps(engines: Sequence[Sequence[StepRecord]]) -> list[StepSample]:
    """One sample per step of the first busy engine, with what the others ran beside it.

    Engines step together, so records belong together when they overlap by more than half; an
    engine without such a record ran a dummy batch of one token. A step is taken from the lowest
    engine that recorded it, once.
    """
    samples = []
    starts = [np.array([r.time_s for r in records]) for records in engines]
    for rank, records in enumerate(engines):
        for record in records:
            group = [record]
            shadowed = False
            for other, theirs in enumerate(engines):
                if other == rank:
                    continue
                match = _overlapping(record, theirs, starts[other])
                if match is None:
                    continue
                shadowed |= other < rank
                group.append(match)
            if not shadowed:
                samples.append(_sample(group, len(engines)))
    return samples


def _overlapping(
    record: StepRecord, others: Sequence[StepRecord], starts: np.ndarray
) -> StepRecord | None:
    at = int(np.searchsorted(starts, record.time_s))
    end = record.time_s + record.duration_us / 1e6
    best, best_share = None, 0.5
    for index in (at - 1, at):
        if not 0 <= index < len(others):
            continue
        other = others[index]
        overlap = min(end, other.time_s + other.duration_us / 1e6)
        overlap -= max(record.time_s, other.time_s)
        share = overlap * 1e6 / max(record.duration_us, other.duration_us, 1.0)
        if share > best_share:
            best, best_share = other, share
    return best


def _sample(group: Sequence[StepRecord], ranks: int) -> StepSample:
    tokens = [r.prefill_tokens + r.decode_requests for r in group]
    dummies = ranks - len(group)
    return StepSample(
        duration_us=float(np.mean([r.duration_us for r in group])),
        rank_tokens=float(max(tokens)),
        prefill_pairs=max(r.prefill_pairs for r in group),
        decode_kv_tokens=float(max(r.context_tokens if r.decode_requests else 0 for r in group)),
        requests=float(max(r.decode_requests for r in group)),
        group_tokens=float(sum(tokens) + dummies),
    )
