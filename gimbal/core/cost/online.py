"""What a step costs on this machine, learned from the steps themselves.

    step duration = base + d * decoding requests + c * prefill tokens of the fullest engine

The engine process feeds it one observation per step and publishes the result as STEP_BASE_US
(base + d * present decode batch), DECODE_US_PER_REQUEST and PREFILL_US_PER_TOKEN, so that the
dispatcher's costs are microseconds of the machine it runs on from the first minute.

Method: recursive least squares with exponential forgetting (Ljung, System Identification, ch. 11),
on features scaled to about one, with four guards:

- A residual beyond `CLIP` times the usual one is clipped: an expert rearrangement stalls a step
  for a second and says nothing about the next one. A lasting change still gets through, since the
  usual residual grows with it.
- Without excitation (hours of decoding without one prefill) forgetting would make the estimate
  jump at the next prefill. The covariance is bounded instead, so that one step can move a
  coefficient about half way at most.
- Published coefficients never go below zero. The estimate itself may: clamping it would break the
  pairing of estimate and covariance, and the corrections of the other coefficients would then
  overshoot more with every step.
- Figures that no step can have (negative, not finite, an hour, many times the budget) are ignored,
  and an estimate that is no number all the same starts anew: no figure spoils it for good.

Engines in lock step all see the duration of the slowest. An engine that prefilled nothing while
its neighbour prefilled a full chunk would learn that idling is slow, so pass the group's fullest
prefill where it is known; without it c comes out too low and base too high, while predictions
stay right on average.
"""

from __future__ import annotations

SMOOTHING = 0.2
"""Share of the newest value in a smoothed one."""
FORGETTING = 0.995  # remembers about 200 steps
CLIP = 4.0
WARM_STEPS = 8  # before these the usual residual is not known and nothing is clipped
PRIOR_VARIANCE = 1e3
MAX_VARIANCE = 1.0
_DECODE_SCALE = 64.0
LARGEST_STEP = 16.0
"""In budgets: a step of more prefill tokens or decodes is none. Engines of a group may differ."""
LONGEST_STEP_US = 3.6e9  # an hour
_INFINITY = float("inf")


def smoothed(old: float, new: float) -> float:
    """`old` moved towards `new`; the first value counts whole (0 is none yet).

    A `new` that is negative or not finite is ignored, and so is such an `old`.
    """
    if not 0.0 <= new < _INFINITY:
        return old if 0.0 <= old < _INFINITY else 0.0
    return old + (new - old) * SMOOTHING if 0.0 < old < _INFINITY else new


def clipped(
    residual: float, usual: float, steps: int, least_limit: float = 0.0
) -> tuple[float, float]:
    """A residual without what is beyond `CLIP` usual ones, and the usual residual after it.

    Args:
        usual: mean size of the residuals before.
        steps: how many there were.
        least_limit: what is never clipped.
    """
    size = abs(residual)
    if steps >= WARM_STEPS:
        limit = max(CLIP * usual, least_limit)
        if size > limit:
            size = limit
            residual = limit if residual > 0 else -limit
    # The first residual is the whole first step, which is no noise.
    if steps > 1:
        usual += max(0.02, 1.0 / steps) * (size - usual)
    return residual, usual


class OnlineStepCost:
    """Learns base, d and c. O(1) per step: some 40 multiplications, no allocation to speak of.

    Args:
        step_token_budget: prefill tokens of a full step; only scales a feature.

    Attributes:
        steps: observations so far.
        clipped: observations whose residual was clipped.
    """

    def __init__(self, step_token_budget: int = 2048) -> None:
        self._prefill_scale = float(max(1, step_token_budget))
        self._largest = LARGEST_STEP * max(self._prefill_scale, _DECODE_SCALE)
        self._start()

    def _start(self) -> None:
        """Knows nothing."""
        self._theta = [0.0, 0.0, 0.0]  # us per unit of the scaled features
        variance = PRIOR_VARIANCE
        # Upper triangle of the covariance: 00, 01, 02, 11, 12, 22.
        self._p = [variance, 0.0, 0.0, variance, 0.0, variance]
        self._usual_residual = 0.0
        self.steps = 0
        self.clipped = 0

    @property
    def prefill_us_per_token(self) -> float:
        """What one more prefill token adds to a step."""
        return max(0.0, self._theta[2]) / self._prefill_scale

    @property
    def decode_us_per_request(self) -> float:
        """What one more decoding request adds to a step."""
        return max(0.0, self._theta[1]) / _DECODE_SCALE

    def step_base_us(self, decode_requests: float) -> float:
        """A step's time without prefill."""
        return max(0.0, self._theta[0] + self._theta[1] * decode_requests / _DECODE_SCALE)

    def predict_us(self, prefill_tokens: float, decode_requests: float) -> float:
        """A step's time."""
        return self.step_base_us(decode_requests) + self.prefill_us_per_token * prefill_tokens

    def observe(
        self,
        prefill_tokens: float,
        decode_requests: float,
        duration_us: float,
        group_prefill_tokens: float | None = None,
    ) -> None:
        """Learns from one step; one with a figure that is none is ignored.

        Args:
            prefill_tokens: prompt tokens this engine computed in it.
            decode_requests: requests that decoded in it.
            duration_us: from its start to the next one's.
            group_prefill_tokens: the most that any engine of the group computed in it, when known.
        """
        group = prefill_tokens if group_prefill_tokens is None else group_prefill_tokens
        largest = self._largest
        if not (
            0.0 < duration_us < LONGEST_STEP_US
            and 0.0 <= prefill_tokens <= largest
            and 0.0 <= group <= largest
            and 0.0 <= decode_requests <= largest
        ):
            return
        x1 = decode_requests / _DECODE_SCALE
        x2 = (group if group > prefill_tokens else prefill_tokens) / self._prefill_scale
        base, decode, prefill = self._theta
        missed = duration_us - base - decode * x1 - prefill * x2
        residual, self._usual_residual = clipped(missed, self._usual_residual, self.steps)
        self.clipped += residual != missed
        p00, p01, p02, p11, p12, p22 = self._p
        v0 = p00 + p01 * x1 + p02 * x2
        v1 = p01 + p11 * x1 + p12 * x2
        v2 = p02 + p12 * x1 + p22 * x2
        scale = 1.0 / (FORGETTING + v0 + v1 * x1 + v2 * x2)
        gain = residual * scale
        base, decode, prefill = base + v0 * gain, decode + v1 * gain, prefill + v2 * gain
        p00, p01, p02 = p00 - v0 * v0 * scale, p01 - v0 * v1 * scale, p02 - v0 * v2 * scale
        p11, p12, p22 = p11 - v1 * v1 * scale, p12 - v1 * v2 * scale, p22 - v2 * v2 * scale
        trace = p00 + p11 + p22
        # One sum tells whether any of them is no number.
        figures = base + decode + prefill + trace + self._usual_residual
        if not -_INFINITY < figures < _INFINITY:
            self._start()
            return
        forget = 1.0 / FORGETTING if trace < MAX_VARIANCE else 1.0
        self._theta = [base, decode, prefill]
        p00, p01, p02 = p00 * forget, p01 * forget, p02 * forget
        self._p = [p00, p01, p02, p11 * forget, p12 * forget, p22 * forget]
        self.steps += 1
