"""The step that a placement is planned for: the one the average token is in.

Prefill comes in few large steps, bound by token-expert pairs, between many small ones that are
bound by the distinct experts they read. The mean of both never runs. What a better balance saves
lies in the large steps, nearly in proportion to their tokens, so a window of S steps with x_i
tokens each is planned as ``(sum x)^2 / sum x^2`` equal steps, and the gain spread over all S.
"""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import RoutingCounts


def typical_share(tokens: float, squares: float, steps: float) -> float:
    """Steps as large as the average token's, over all steps: in (0, 1], 1 when all are alike.

    Args:
        tokens, squares: sums over the window's steps of their tokens, and of these squared.
        steps: of the window.
    """
    if not (tokens > 0.0 and squares > 0.0 and steps > 0.0):
        return 1.0
    return float(np.clip(tokens**2 / squares / steps, 1.0 / max(steps, 1.0), 1.0))


def at_typical_step(routing: RoutingCounts, share: float) -> RoutingCounts:
    """The same window as fewer, larger steps.

    A larger step activates an expert unless each of its mean-sized parts does not:
    ``1 - (1 - active)^(1 / share)``.
    """
    active = routing.active
    if active is not None:
        active = np.asarray(1.0 - (1.0 - active) ** (1.0 / share))
    return RoutingCounts(routing.counts, active, max(1, round(routing.steps * share)))
