"""Step time of a lock-step DP/TP/EP MoE engine from the composition of its batch.

All DP ranks step together, so every term is the slowest rank's:

``layer = max_r(dense(T_r) + attention_r) + collectives(G) + max_e moe(A_e, P_e, G)``
``step  = max(layers * layer + sampling, launch) + host``

Formulas and the fits behind the packaged profiles: ``docs/cost-model.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.cost.profile import Profile


@dataclass(frozen=True, slots=True)
class BatchShape:
    """One step's batch, per DP rank. All arrays are [dp] float64.

    Attributes:
        tokens: prefill and decode tokens of the rank (a dummy batch counts 1).
        decode_kv_tokens: KV tokens its decodes read.
        prefill_pairs: sum over its prefill chunks of n * (p + n/2).
        prefill_kv_tokens: sum over its prefill chunks of p.
        sampled: requests that sample a token.
    """

    tokens: FloatArray
    decode_kv_tokens: FloatArray
    prefill_pairs: FloatArray
    prefill_kv_tokens: FloatArray
    sampled: FloatArray


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where a step's time goes, in microseconds; the parts do not overlap."""

    dense_us: float
    attention_us: float
    collective_us: float
    moe_us: float
    sampling_us: float
    launch_us: float
    host_us: float

    @property
    def total_us(self) -> float:
        return (
            self.dense_us
            + self.attention_us
            + self.collective_us
            + self.moe_us
            + self.sampling_us
            + self.launch_us
            + self.host_us
        )


def moe_us(profile: Profile, active: FloatArray, pairs: FloatArray, group_tokens: float) -> float:
    """Sum over layers of the slowest rank's fused-expert time.

    Args:
        active: [layers, ep ranks] distinct experts hit (expected values may be fractional).
        pairs: [layers, ep ranks] token-expert pairs.
        group_tokens: tokens of all DP ranks in the step.
    """
    m = profile.moe
    work = ((m.per_active_expert_us * active) ** m.norm + (m.per_pair_us * pairs) ** m.norm) ** (
        1.0 / m.norm
    )
    per_layer = m.base_us + m.per_group_token_us * group_tokens
    return float(work.max(axis=1).sum() + per_layer * len(work))


def step_time(
    profile: Profile, batch: BatchShape, active: FloatArray, pairs: FloatArray
) -> StepTime:
    """Predicted time of one lock-step step; see the module docstring for the formula.

    Args:
        active: [layers, ep ranks], see `moe_us`.
        pairs: [layers, ep ranks], see `moe_us`.
    """
    layers = profile.model.layers
    tokens = _rank_tokens(profile, batch)
    dense, attention = _rank_parts_us(profile, batch, tokens)
    slowest = int((dense + attention).argmax())
    group_tokens = float(tokens.sum())
    experts = moe_us(profile, active, pairs, group_tokens)
    device = device_us(profile, batch, experts) - _host_us(profile, batch)
    collective = layers * sum(t.at(group_tokens) for t in profile.per_group_token)
    sampling = sum(t.at(float(batch.sampled.max())) for t in profile.per_step)
    parts = layers * float(dense[slowest] + attention[slowest]) + collective + experts + sampling
    return StepTime(
        dense_us=float(layers * dense[slowest]),
        attention_us=float(layers * attention[slowest]),
        collective_us=float(collective),
        moe_us=experts,
        sampling_us=float(sampling),
        launch_us=device - parts,
        host_us=_host_us(profile, batch),
    )


def device_us(profile: Profile, batch: BatchShape, experts_us: float) -> float:
    """The whole step, given its fused-expert time summed over layers (the simulator's path)."""
    layers = profile.model.layers
    tokens = _rank_tokens(profile, batch)
    dense, attention = _rank_parts_us(profile, batch, tokens)
    group_tokens = float(tokens.sum())
    collective = sum(t.at(group_tokens) for t in profile.per_group_token)
    sampling = sum(t.at(float(batch.sampled.max())) for t in profile.per_step)
    device = layers * (float((dense + attention).max()) + collective) + experts_us + sampling
    if float(batch.tokens.max()) > profile.graph_tokens:
        device = max(device, layers * profile.launch_layer_us)
    return device + _host_us(profile, batch)


def _host_us(profile: Profile, batch: BatchShape) -> float:
    return profile.host_us + profile.host_per_request_us * float(batch.sampled.max())


def _rank_tokens(profile: Profile, batch: BatchShape) -> FloatArray:
    """[dp] tokens each rank runs: under a CUDA graph every rank is padded to the busiest."""
    most = batch.tokens.max()
    return np.full_like(batch.tokens, most) if most <= profile.graph_tokens else batch.tokens


def _rank_parts_us(
    profile: Profile, batch: BatchShape, tokens: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """[dp] dense and [dp] attention time of one layer."""
    dense = np.zeros_like(tokens)
    for term in profile.per_rank_token:
        dense += np.maximum(term.floor_us, term.base_us + term.per_unit_us * tokens)
    a = profile.attention
    mixed = batch.prefill_pairs > 0
    kv_rate = np.where(mixed, a.per_mixed_decode_kv_token_us, a.per_decode_kv_token_us)
    attention = np.maximum(
        a.floor_us,
        a.base_us
        + kv_rate * batch.decode_kv_tokens
        + a.per_prefill_pair_us * batch.prefill_pairs
        + a.per_prefill_kv_token_us * batch.prefill_kv_tokens,
    )
    return dense, attention


def expected_active(share: FloatArray, tokens: float) -> FloatArray:
    """Expected distinct experts hit when each of `tokens` tokens routes independently.

    Args:
        share: [..., experts] probability that a token picks the expert (sums to top_k).

    Returns:
        [..., experts] probability that the expert is hit at least once: 1 - (1 - p)^tokens.
    """
    hit: FloatArray = -np.expm1(tokens * np.log1p(-np.minimum(share, 1.0 - 1e-12)))
    return hit


def migration_us(profile: Profile, received_experts: float, layers: int) -> float:
    """Stall of moving experts: ``layers * t0 + bytes / bandwidth`` of the busiest receiver."""
    link = profile.interconnect
    moved = received_experts * profile.model.expert_bytes
    return layers * link.migration_layer_us + moved / link.migration_bytes_per_us
