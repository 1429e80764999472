"""A profile from recorded steps: non-negative least squares on what each step was made of.

A lock-step step lasts as long as its slowest rank's own work plus what all ranks share:

    duration = base + t * max_r T_r + q * max_r pairs_r + k * max_r KV_r + s * max_r S_r + g * G

with T tokens, pairs the attention pairs of prefill chunks, KV the context read by decodes and S
the requests of rank r, and G the tokens of all ranks, whose experts run on all ranks. Errors are
relative, so that short steps count as much as long ones; every third step is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.cost.profile import (
    AttentionTerm,
    Interconnect,
    Layout,
    ModelShape,
    MoeTerm,
    Profile,
    Term,
)

FEATURES = ("base", "rank_token", "prefill_pair", "decode_kv_token", "request", "group_token")
HELD_OUT = 3
CLIP_QUANTILE = 0.99
"""Steps slower than this quantile of their residual (a rearrangement, a pause) are left out."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """One lock-step step over all DP ranks; see the module for the symbols."""

    duration_us: float
    rank_tokens: float
    prefill_pairs: float
    decode_kv_tokens: float
    requests: float
    group_tokens: float

    def features(self) -> tuple[float, ...]:
        return (
            1.0,
            self.rank_tokens,
            self.prefill_pairs,
            self.decode_kv_tokens,
            self.requests,
            self.group_tokens,
        )


@dataclass(frozen=True, slots=True)
class StepFit:
    """Attributes:
    coefficients_us: by name in `FEATURES`.
    error: mean absolute relative error on held-out steps; `bias` their mean relative error.
    steps, held_out: how many were fitted and how many were not.
    """

    coefficients_us: dict[str, float]
    error: float
    bias: float
    p90_error: float
    steps: int
    held_out: int

    def predict_us(self, samples: Sequence[StepSample]) -> FloatArray:
        """[samples] predicted durations."""
        weights = np.array([self.coefficients_us[name] for name in FEATURES])
        predicted: FloatArray = np.array([s.features() for s in samples]) @ weights
        return predicted


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Fits the module's formula; raises ValueError with fewer than 50 steps."""
    if len(samples) < 50:
        raise ValueError(f"{len(samples)} steps are too few to calibrate from (50 at least)")
    x = np.array([s.features() for s in samples])
    y = np.array([s.duration_us for s in samples])
    held = np.arange(len(y)) % HELD_OUT == 1
    used = ~held
    for _ in range(3):
        theta = _nonnegative(x[used] / y[used, None], np.ones(int(used.sum())))
        residual = np.abs(x @ theta / y - 1)
        used = ~held & (residual <= np.quantile(residual[~held], CLIP_QUANTILE))
    relative = x[held] @ theta / y[held] - 1
    return StepFit(
        {name: float(f"{value:.5g}") for name, value in zip(FEATURES, theta, strict=True)},
        float(np.abs(relative).mean()),
        float(relative.mean()),
        float(np.quantile(np.abs(relative), 0.9)),
        int(used.sum()),
        int(held.sum()),
    )


def _nonnegative(x: FloatArray, y: FloatArray) -> FloatArray:
    """Least squares with coefficients >= 0 (Lawson and Hanson's active set, six columns)."""
    scale = np.linalg.norm(x, axis=0)
    scale[scale == 0] = 1.0
    a = x / scale
    theta = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)
    for _ in range(10 * a.shape[1]):
        gradient = a.T @ (y - a @ theta)
        candidates = np.where(~free & (gradient > 1e-9))[0]
        if not len(candidates):
            break
        free[candidates[gradient[candidates].argmax()]] = True
        while True:
            trial = np.zeros_like(theta)
            trial[free] = np.linalg.lstsq(a[:, free], y, rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                theta = trial
                break
            step = np.min(theta[negative] / (theta[negative] - trial[negative]))
            theta = theta + step * (trial - theta)
            free &= theta > 1e-12
    result: FloatArray = theta / scale
    return result


def profile_from_fit(
    fit: StepFit, name: str, machine: str, model: ModelShape, layout: Layout, kv_tokens: int
) -> Profile:
    """The profile whose step time is `fit`, spread evenly over the model's layers.

    What all ranks share is the experts' work: it becomes microseconds per token-expert pair, so
    that a rank with more pairs than the mean costs more, as it does on the machine.
    """
    c, layers = fit.coefficients_us, model.layers
    source = f"{fit.steps} recorded steps"
    pairs_per_token = model.top_k / layout.ep
    return Profile(
        name=name,
        machine=machine,
        model=model,
        layout=layout,
        per_rank_token=(Term(c["rank_token"] / layers, 0.0, 0.0, source, fit.error),),
        per_group_token=(),
        attention=AttentionTerm(
            per_decode_kv_token_us=c["decode_kv_token"] / layers,
            per_mixed_decode_kv_token_us=c["decode_kv_token"] / layers,
            per_prefill_pair_us=c["prefill_pair"] / layers,
            source=source,
            error=fit.error,
        ),
        moe=MoeTerm(
            base_us=0.0,
            per_active_expert_us=0.0,
            per_pair_us=c["group_token"] / layers / pairs_per_token,
            per_group_token_us=0.0,
            norm=1.0,
            source=source,
            error=fit.error,
        ),
        per_step=(Term(c["request"], 0.0, 0.0, source, fit.error),),
        interconnect=Interconnect(
            same_node_bytes_per_us=5e3,
            other_node_bytes_per_us=1e3,
            migration_bytes_per_us=1e3,
            migration_layer_us=15_000.0,
            source="estimate",
        ),
        host_us=c["base"],
        launch_layer_us=0.0,
        graph_tokens=0,
        kv_tokens=kv_tokens,
        notes=(
            f"held-out steps: mean relative error {fit.error:.1%}, bias {fit.bias:+.1%}, "
            f"P90 {fit.p90_error:.1%}",
        ),
    )
