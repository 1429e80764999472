"""Step records of several engines put together into lock-step steps."""

from __future__ import annotations

from collections.abc import Sequence

from gimbal.core.cost.calibrate import StepSample
from gimbal.records.schema import StepRecord

PAUSE_S = 0.005
"""An engine with work schedules its next step sooner after the last; a longer pause is idleness."""


def join_steps(engines: Sequence[Sequence[StepRecord]]) -> list[StepSample]:
    """One sample per lock-step step, in order of time.

    Engines step together, so records of different engines belong together when they overlap by
    more than half; an engine without such a record ran a dummy batch of one token. A step lasts
    from the end of the one before, because what the host does between two steps is part of their
    period, or from its own start after a pause.
    """
    samples = []
    group: list[StepRecord] = []
    ended_s = float("-inf")
    for record in sorted((r for records in engines for r in records), key=lambda r: r.time_s):
        if group and not _together(group, record):
            samples.append(_sample(group, len(engines), ended_s))
            ended_s = max(map(_end_s, group))
            group = []
        group.append(record)
    if group:
        samples.append(_sample(group, len(engines), ended_s))
    return samples


def _end_s(record: StepRecord) -> float:
    return record.time_s + record.duration_us / 1e6


def _together(group: Sequence[StepRecord], record: StepRecord) -> bool:
    """Whether `record`, which starts no earlier than `group`, is another engine's part of it."""
    if any(other.engine == record.engine for other in group):
        return False
    first = group[0]
    overlap_s = min(_end_s(first), _end_s(record)) - record.time_s
    return overlap_s * 1e6 > 0.5 * max(first.duration_us, record.duration_us)


def _sample(group: Sequence[StepRecord], ranks: int, ended_s: float) -> StepSample:
    """The step of `group`; `ended_s` is the end of the step before."""
    start_s = min(r.time_s for r in group)
    if 0.0 <= start_s - ended_s < PAUSE_S:
        start_s = ended_s
    tokens = [r.prefill_tokens + r.decode_requests for r in group]
    return StepSample(
        time_s=start_s,
        duration_us=(max(map(_end_s, group)) - start_s) * 1e6,
        rank_tokens=float(max(tokens)),
        prefill_pairs=max(r.prefill_pairs for r in group),
        decode_kv_tokens=float(max(r.context_tokens if r.decode_requests else 0 for r in group)),
        requests=float(max(r.decode_requests for r in group)),
        group_requests=float(sum(r.decode_requests for r in group)),
        group_tokens=float(sum(tokens) + ranks - len(group)),
        prefill=any(r.prefill_tokens for r in group),
    )
