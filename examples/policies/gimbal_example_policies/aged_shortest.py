"""Shortest prompt first, but a prompt that waits overtakes later ones after a while."""

from dataclasses import dataclass

from gimbal.contracts import OrderingTraits, Positive, QueuedRequest, QueueState, option


@dataclass(frozen=True)
class AgedShortestOptions:
    tokens_per_s: Positive = option(500.0, "prompt tokens that one second of waiting is worth")


class AgedShortest:
    Options = AgedShortestOptions
    # Keys are static and count tokens: running prefills share their steps with newcomers.
    traits = OrderingTraits(age_limit=True, shares_steps=True, passes_blocked=True)

    def __init__(self, options: AgedShortestOptions) -> None:
        self.tokens_per_s = options.tokens_per_s

    def key(self, request: QueuedRequest, state: QueueState) -> float:
        return request.uncached_tokens + self.tokens_per_s * state.now_s
