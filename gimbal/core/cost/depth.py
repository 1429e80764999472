"""What a prefill token costs by the context in front of it, learned from the steps themselves.

    step duration = base + (c + a * depth) * prefill tokens

A token attends to all tokens before it, so that the end of a prompt of 100,000 tokens takes
several times as long as its beginning. `OnlineStepCost` says what a token costs on the mean, which
is what dispatch needs of prompts that nobody has begun. How much of one prompt fits into a step of
a given length is asked here.

Method: recursive least squares of c and a with exponential forgetting, as in `online`, with the
same guards. Engines in lock step all see the duration of the slowest; which of them that was is
judged by what is learned so far, and by tokens alone before that.
"""

from __future__ import annotations

from collections.abc import Sequence

from gimbal.core.cost.online import (
    FORGETTING,
    LARGEST_STEP,
    LONGEST_STEP_US,
    MAX_VARIANCE,
    PRIOR_VARIANCE,
    WARM_STEPS,
    clipped,
)

FAR_TOKENS = 32768.0
"""Depth at which a token is one unit of the second feature. Where all steps are of one small depth,
nothing tells c from a, and the share that goes to a is that depth's square in these units."""
_DEEPEST_TOKENS = 1e8


class PrefillDepthCost:
    """Learns c and a. O(1) per step.

    Args:
        step_token_budget: prefill tokens of a full step; only scales a feature.

    Attributes:
        steps: observations so far.
    """

    def __init__(self, step_token_budget: int = 2048) -> None:
        self._scale = float(max(1, step_token_budget))
        self._start()

    def _start(self) -> None:
        """Knows nothing."""
        self._near = self._far = 0.0  # us per unit of the scaled features
        self._p = (PRIOR_VARIANCE, 0.0, PRIOR_VARIANCE)
        self._usual_residual = 0.0
        self.steps = 0

    def us_per_token(self, depth_tokens: float) -> float:
        """What a prefill token with `depth_tokens` of context before it adds to a step.

        0 until `WARM_STEPS` steps with prefill were seen.
        """
        if self.steps < WARM_STEPS:
            return 0.0
        near, far = max(0.0, self._near), max(0.0, self._far)
        return (near + far * max(0.0, depth_tokens) / FAR_TOKENS) / self._scale

    def slowest(self, tokens: Sequence[float], pairs: Sequence[float]) -> int:
        """Index of the engine whose prefill takes longest; the arguments as in `observe`."""
        near, far = max(0.0, self._near), max(0.0, self._far) / FAR_TOKENS
        if near <= 0.0 and far <= 0.0:
            near = 1.0
        work = [near * n + far * p for n, p in zip(tokens, pairs, strict=True)]
        return work.index(max(work))

    def observe(self, prefill_tokens: float, prefill_pairs: float, prefill_us: float) -> None:
        """Learns from one step with prefill; one with a figure that is none is ignored.

        Args:
            prefill_tokens: prompt tokens of the engine whose prefill took longest.
            prefill_pairs: their depths summed: over its chunks of n tokens behind p computed ones
                n * (p + n / 2).
            prefill_us: what the step took beyond one without prefill; below 0 is 0.
        """
        if not (
            0.0 < prefill_tokens <= LARGEST_STEP * self._scale
            and 0.0 <= prefill_pairs <= prefill_tokens * _DEEPEST_TOKENS
            and -LONGEST_STEP_US < prefill_us < LONGEST_STEP_US
        ):
            return
        x0 = prefill_tokens / self._scale
        x1 = prefill_pairs / (FAR_TOKENS * self._scale)
        near, far = self._near, self._far
        predicted_us = near * x0 + far * x1
        missed = max(0.0, prefill_us) - predicted_us
        # A stall (experts moved, a kernel compiled) says nothing about the next step. What is no
        # more than the prediction again is none: the chunks of a first deep prompt take longer one
        # by one, after shallow ones whose residuals were small.
        residual, self._usual_residual = clipped(
            missed, self._usual_residual, self.steps, predicted_us
        )
        p00, p01, p11 = self._p
        v0, v1 = p00 * x0 + p01 * x1, p01 * x0 + p11 * x1
        scale = 1.0 / (FORGETTING + v0 * x0 + v1 * x1)
        near, far = near + v0 * residual * scale, far + v1 * residual * scale
        p00, p01, p11 = p00 - v0 * v0 * scale, p01 - v0 * v1 * scale, p11 - v1 * v1 * scale
        trace = p00 + p11
        figures = near + far + p01 + trace + self._usual_residual
        if figures - figures != 0.0:  # one of them is no number, or infinite
            self._start()
            return
        # Without excitation of both the estimate would jump later: bounded instead, as in `online`.
        forget = 1.0 / FORGETTING if trace < MAX_VARIANCE else 1.0
        self._near, self._far = near, far
        self._p = (p00 * forget, p01 * forget, p11 * forget)
        self.steps += 1
