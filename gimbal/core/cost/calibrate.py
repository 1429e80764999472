"""A profile from recorded steps: non-negative least squares on what each step was made of.

A lock-step step lasts as long as its slowest rank's own work plus what all ranks share:

    duration = base + t * max_r T_r + q * max_r pairs_r + k * max_r KV_r + s * max_r D_r
             + S * sum_r D_r + g * G + e * A(G) + p * [any prefill]

with T tokens, pairs the attention pairs of prefill chunks, KV the context read by decodes and D
the decoding requests of rank r, G the tokens of all ranks, whose experts run on all ranks, and A
the distinct experts that G tokens hit on a rank. A is what bends: a decode batch pays for every
expert it wakes up, and once all are awake another token costs little. The sum over all ranks' D is
the front end, which writes out every token: on a machine whose engines leave it no core of its own
it takes its time from theirs.

Squared errors are taken relative to the prediction, so that short steps count as much as long
ones and the mean, not the typical, duration is predicted; every third step is held out.
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

FEATURES = (
    "base",
    "rank_token",
    "prefill_pair",
    "decode_kv_token",
    "request",
    "group_request",
    "group_token",
    "active_expert",
    "prefill_step",
)
HELD_OUT = 3
STALL = 8.0
"""A step this many times longer than its prediction was a pause of the machine: left out."""
ROUNDS = 8
PARTS = 10


@dataclass(frozen=True, slots=True)
class StepSample:
    """One lock-step step over all DP ranks; see the module for the symbols."""

    time_s: float
    duration_us: float
    rank_tokens: float
    prefill_pairs: float
    decode_kv_tokens: float
    requests: float
    group_requests: float
    group_tokens: float
    prefill: bool

    def features(self, model: ModelShape, ranks: int) -> tuple[float, ...]:
        """In the order of `FEATURES`."""
        return (
            1.0,
            self.rank_tokens,
            self.prefill_pairs,
            self.decode_kv_tokens,
            self.requests,
            self.group_requests,
            self.group_tokens,
            active_experts(self.group_tokens, model) / ranks,
            float(self.prefill),
        )


def active_experts(tokens: float, model: ModelShape) -> float:
    """Expected distinct experts of one layer that `tokens` tokens hit when all are as popular."""
    return float(model.experts * (1.0 - (1.0 - model.top_k / model.experts) ** tokens))


@dataclass(frozen=True, slots=True)
class StepFit:
    """A fit and how well it does on the steps it never saw.

    Attributes:
        coefficients_us: by name in `FEATURES`.
        error: mean absolute relative error on held-out steps, of which much is the machine's own
            scatter; `p90_error` its 90th percentile.
        bias: error of their summed duration: what a run of many steps is off by.
        slowness: measured over predicted time of the fastest and the slowest tenth of the run, in
            order of time: how far the machine's own speed wandered while it was measured.
        steps, held_out: how many were fitted and how many were not.
    """

    model: ModelShape
    ranks: int
    coefficients_us: dict[str, float]
    error: float
    bias: float
    p90_error: float
    slowness: tuple[float, float]
    steps: int
    held_out: int

    def predict_us(self, samples: Sequence[StepSample]) -> FloatArray:
        """[samples] predicted durations."""
        weights = np.array([self.coefficients_us[name] for name in FEATURES])
        predicted: FloatArray = _matrix(samples, self.model, self.ranks) @ weights
        return predicted


def _matrix(samples: Sequence[StepSample], model: ModelShape, ranks: int) -> FloatArray:
    return np.array([s.features(model, ranks) for s in samples])


def fit_steps(samples: Sequence[StepSample], model: ModelShape, ranks: int) -> StepFit:
    """Fits the module's formula; raises ValueError with fewer than 50 steps.

    Args:
        ranks: EP ranks that share the experts.
    """
    if len(samples) < 50:
        raise ValueError(f"{len(samples)} steps are too few to calibrate from (50 at least)")
    x = _matrix(samples, model, ranks)
    y = np.array([s.duration_us for s in samples])
    held = np.arange(len(y)) % HELD_OUT == 1
    used, scale = ~held, y
    for _ in range(ROUNDS):
        theta = _nonnegative(x[used] / scale[used, None], y[used] / scale[used])
        scale = np.maximum(x @ theta, 1.0)
        used = ~held & (y < STALL * scale)
    judged = held & (y < STALL * scale)
    predicted = x[judged] @ theta
    error = np.abs(predicted / y[judged] - 1)
    return StepFit(
        model,
        ranks,
        {name: float(f"{value:.5g}") for name, value in zip(FEATURES, theta, strict=True)},
        float(error.mean()),
        float(predicted.sum() / y[judged].sum() - 1),
        float(np.quantile(error, 0.9)),
        _slowness(y, x @ theta),
        int(used.sum()),
        int(judged.sum()),
    )


def _slowness(measured_us: FloatArray, predicted_us: FloatArray) -> tuple[float, float]:
    """(lowest, highest) ratio of measured to predicted time over `PARTS` stretches of the run."""
    parts = zip(
        np.array_split(measured_us, PARTS), np.array_split(predicted_us, PARTS), strict=True
    )
    ratios = [float(m.sum() / max(p.sum(), 1.0)) for m, p in parts]
    return min(ratios), max(ratios)


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


UNMEASURED_INTERCONNECT = Interconnect(
    same_node_bytes_per_us=5e3,
    other_node_bytes_per_us=1e3,
    migration_bytes_per_us=1e3,
    migration_layer_us=15_000.0,
    source="estimate",
)


def _attention(fit: StepFit, source: str) -> AttentionTerm:
    c, layers = fit.coefficients_us, fit.model.layers
    return AttentionTerm(
        per_decode_kv_token_us=c["decode_kv_token"] / layers,
        per_mixed_decode_kv_token_us=c["decode_kv_token"] / layers,
        per_prefill_pair_us=c["prefill_pair"] / layers,
        source=source,
        error=fit.error,
    )


def _moe(fit: StepFit, source: str, pairs_per_token: float) -> MoeTerm:
    c, layers = fit.coefficients_us, fit.model.layers
    return MoeTerm(
        base_us=0.0,
        per_active_expert_us=c["active_expert"] / layers,
        per_pair_us=c["group_token"] / layers / pairs_per_token,
        per_group_token_us=0.0,
        norm=1.0,
        source=source,
        error=fit.error,
    )


def profile_from_fit(
    fit: StepFit,
    name: str,
    machine: str,
    layout: Layout,
    kv_tokens: int,
    api_us: float = 0.0,
    api_token_us: float = 0.0,
) -> Profile:
    """The profile whose step time is `fit`, spread evenly over the model's layers.

    What all ranks share is the experts' work: it becomes microseconds per token-expert pair and
    per active expert, so that a rank with more of them costs more, as it does on the machine. The
    imbalance that the calibrated server had is inside those constants already: a cluster that
    is meant to repeat it has ``routing: even``.

    Args:
        api_us, api_token_us: see `Profile`.
    """
    c, model = fit.coefficients_us, fit.model
    layers = model.layers
    source = f"{fit.steps} recorded steps"

    def term(per_unit_us: float) -> Term:
        return Term(per_unit_us, 0.0, 0.0, source, fit.error)

    return Profile(
        name=name,
        machine=machine,
        model=model,
        layout=layout,
        per_rank_token=(term(c["rank_token"] / layers),),
        per_group_token=(),
        attention=_attention(fit, source),
        moe=_moe(fit, source, model.top_k / layout.ep),
        per_step=(term(c["request"]),),
        interconnect=UNMEASURED_INTERCONNECT,
        host_us=c["base"],
        host_prefill_us=c["prefill_step"],
        host_per_group_request_us=c["group_request"],
        launch_layer_us=0.0,
        graph_tokens=0,
        api_us=api_us,
        api_token_us=api_token_us,
        kv_tokens=kv_tokens,
        notes=(
            f"held-out steps: mean relative error {fit.error:.1%}, P90 {fit.p90_error:.1%}, "
            f"error of their sum {fit.bias:+.1%}; tenths of the run took {fit.slowness[0]:.2f} to "
            f"{fit.slowness[1]:.2f} of the predicted time",
        ),
    )
