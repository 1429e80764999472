"""Step time of a lock-step DP/TP/EP MoE engine from the composition of its batch.

All DP ranks step together, so every term is the slowest rank's:

``layer = max_r(dense(T_r) + attention_r) + collectives(G) + max_e moe(A_e, P_e, G)``
``step  = max(layers * layer + sampling, launch) + host``

Formulas and the fits behind the packaged profiles: ``docs/simulator.md``.
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

    def columns(self) -> FloatArray:
        """[dp, 5] the five arrays side by side, in their order above."""
        return np.column_stack(
            [
                self.tokens,
                self.decode_kv_tokens,
                self.prefill_pairs,
                self.prefill_kv_tokens,
                self.sampled,
            ]
        ).astype(np.float64)


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


def rank_moe_us(
    active: FloatArray,
    pairs: FloatArray,
    group_tokens: FloatArray | float,
    base_us: float,
    per_active_us: float,
    per_pair_us: float,
    per_token_us: float,
    norm: float,
) -> FloatArray:
    """Fused-expert time of one layer on ranks with `active` distinct experts and `pairs` pairs.

    The one definition of `MoeTerm`'s formula: element by element over arrays of any shape, and
    compiled for single ranks where the placement search needs it.
    """
    reads, products = per_active_us * active, per_pair_us * pairs
    work = reads + products if norm == 1.0 else (reads**norm + products**norm) ** (1.0 / norm)
    return base_us + per_token_us * group_tokens + work


def moe_us(profile: Profile, active: FloatArray, pairs: FloatArray, group_tokens: float) -> float:
    """Sum over layers of the slowest rank's fused-expert time.

    Args:
        active: [layers, ep ranks] distinct experts hit (expected values may be fractional).
        pairs: [layers, ep ranks] token-expert pairs.
        group_tokens: tokens of all DP ranks in the step.
    """
    m = profile.moe
    constants = (m.base_us, m.per_active_expert_us, m.per_pair_us, m.per_group_token_us, m.norm)
    return float(rank_moe_us(active, pairs, group_tokens, *constants).max(axis=1).sum())


def step_time(
    profile: Profile, batch: BatchShape, active: FloatArray, pairs: FloatArray
) -> StepTime:
    """Predicted time of one lock-step step; see the module docstring for the formula.

    Args:
        active: [layers, ep ranks], see `moe_us`.
        pairs: [layers, ep ranks], see `moe_us`.
    """
    packed = pack(profile)
    shape = batch.columns()
    experts = moe_us(profile, active, pairs, group_tokens(shape, packed))
    total = device_us(shape, experts, packed)
    dense, attention, collective = layer_parts_us(shape, packed)
    layers = profile.model.layers
    sampling = sum(t.at(float(batch.sampled.max())) for t in profile.per_step)
    host = host_time_us(shape, packed)
    busy = layers * (dense + attention + collective) + experts + sampling
    return StepTime(
        dense_us=layers * dense,
        attention_us=layers * attention,
        collective_us=layers * collective,
        moe_us=experts,
        sampling_us=sampling,
        launch_us=total - host - busy,
        host_us=host,
    )


# The functions below are plain loops over arrays, so that the simulator can compile the very
# same code with numba; nothing else in them is allowed that numba cannot compile.

_ATTENTION, _MISC = 6, 7


def pack(profile: Profile) -> FloatArray:
    """The profile's step constants as one vector: counts of terms, terms, attention, the rest."""
    groups = (profile.per_rank_token, profile.per_group_token, profile.per_step)
    flat = [x for g in groups for t in g for x in (t.floor_us, t.base_us, t.per_unit_us)]
    a = profile.attention
    attention = (
        a.floor_us,
        a.base_us,
        a.per_decode_kv_token_us,
        a.per_mixed_decode_kv_token_us,
        a.per_prefill_pair_us,
        a.per_prefill_kv_token_us,
    )
    misc = (
        float(profile.model.layers),
        float(profile.graph_tokens),
        profile.launch_layer_us,
        profile.host_us,
        profile.host_per_request_us,
        profile.host_per_group_request_us,
        profile.host_prefill_us,
    )
    return np.array([*map(len, groups), *flat, *attention, *misc], dtype=np.float64)


def group_tokens(shape: FloatArray, packed: FloatArray) -> float:
    """Tokens of all DP ranks; under a CUDA graph every rank is padded to the busiest one."""
    most = 0.0
    total = 0.0
    for rank in range(len(shape)):
        most = max(most, shape[rank, 0])
        total += shape[rank, 0]
    graph_tokens = packed[len(packed) - _MISC + 1]
    return float(most * len(shape) if most <= graph_tokens else total)


def terms_us(first: int, count: int, x: float, packed: FloatArray) -> float:
    """Sum of `count` packed terms at x units."""
    total = 0.0
    for i in range(first, first + count):
        floor, base, unit = packed[3 + 3 * i], packed[4 + 3 * i], packed[5 + 3 * i]
        total += max(floor, base + unit * x)
    return total


def layer_parts_us(shape: FloatArray, packed: FloatArray) -> tuple[float, float, float]:
    """(dense, attention) of the slowest rank and the collectives, of one layer.

    Args:
        shape: [dp, 5] as `BatchShape.columns`.
    """
    ranks_terms, group_terms, step_terms = int(packed[0]), int(packed[1]), int(packed[2])
    at = 3 + 3 * (ranks_terms + group_terms + step_terms)
    most = 0.0
    for rank in range(len(shape)):
        most = max(most, shape[rank, 0])
    padded = most <= packed[at + _ATTENTION + 1]
    dense = 0.0
    attention = 0.0
    for rank in range(len(shape)):
        tokens, kv, chunk_pairs, prefix = (
            shape[rank, 0],
            shape[rank, 1],
            shape[rank, 2],
            shape[rank, 3],
        )
        own_dense = terms_us(0, ranks_terms, most if padded else tokens, packed)
        kv_rate = packed[at + 3] if chunk_pairs > 0 else packed[at + 2]
        work = kv_rate * kv + packed[at + 4] * chunk_pairs + packed[at + 5] * prefix
        own_attention = max(packed[at], packed[at + 1] + work)
        if own_dense + own_attention > dense + attention:
            dense, attention = own_dense, own_attention
    collective = terms_us(ranks_terms, group_terms, group_tokens(shape, packed), packed)
    return dense, attention, collective


def host_time_us(shape: FloatArray, packed: FloatArray) -> float:
    """What a step waits for the host and the front end; arguments as `device_us`."""
    misc = len(packed) - _MISC
    most = 0.0
    total = 0.0
    prefill = False
    for rank in range(len(shape)):
        most = max(most, shape[rank, 4])
        total += shape[rank, 4]
        prefill = prefill or shape[rank, 2] > 0.0
    time = packed[misc + 3] + packed[misc + 4] * most + packed[misc + 5] * total
    if prefill:
        time += packed[misc + 6]
    return float(time)


def device_us(shape: FloatArray, experts_us: float, packed: FloatArray) -> float:
    """The whole step, given its fused-expert time summed over layers.

    Args:
        shape: [dp, 5] as `BatchShape.columns`.
        packed: see `pack`.
    """
    ranks_terms, group_terms, step_terms = int(packed[0]), int(packed[1]), int(packed[2])
    misc = len(packed) - _MISC
    dense, attention, collective = layer_parts_us(shape, packed)
    most = 0.0
    sampled = 0.0
    for rank in range(len(shape)):
        most = max(most, shape[rank, 0])
        sampled = max(sampled, shape[rank, 4])
    layers = packed[misc]
    device = layers * (dense + attention + collective) + experts_us
    device += terms_us(ranks_terms + group_terms, step_terms, sampled, packed)
    if most > packed[misc + 1]:
        device = max(device, layers * packed[misc + 2])
    return float(device + host_time_us(shape, packed))


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
