"""Keeps steps small enough for CUDA graphs where two such steps are cheaper than a large one.

vLLM captures CUDA graphs for steps of up to ``max_cudagraph_capture_size`` tokens (512 unless set).
A larger step launches its kernels one by one, and until it holds enough work to hide the launches
it takes as long with 600 tokens as with 1,100: by the packaged profile of four H100 (0.5 ms of
launches per layer, assumed) some 25 ms, where 512 tokens take 18 (`benchmarks/step_time.py`). A
backlog of 700 tokens then costs decodes less, and its first prompts too, in two steps that replay
graphs than in one that cannot.

Engines in lock step run without graphs as soon as one of them must (vLLM takes the least of their
modes), so all decide by the engine that has most.
"""

from __future__ import annotations

from collections import deque

from gimbal.core.cost.online import OnlineStepCost

LEAST_ROOM = 0.25
"""Share of a graph's tokens that decodes must leave: with less, prefill would hardly move."""
FARTHEST = 4
"""Larger steps, in multiples of a graph's tokens, are none that could have been small ones."""
SIZES = 4
"""Sizes of large steps that are told apart per multiple of a graph's tokens."""
REMEMBERED = 9
"""Large steps that are remembered of each size: frequent ones must not drive out the others."""
LEAST_STEPS = 8
"""Steps of either kind with prefill, the large ones comparable, before anything is said."""
LEAST_GAIN = 0.1
"""Share of the delay that small steps must save: without a floor both kinds cost the same."""
EXPLORE = 64
"""After so many decisions for small steps without a large one that they could have been, one is
turned round, to see what it takes now. All engines of a group see it, so they do not all do so."""
FLAT = 0.1
"""A step without graphs that takes this share more than the shortest such one is no longer free."""
ENOUGH = 3
"""Large steps of one size that say how long it takes."""
_INFINITY = float("inf")


class GraphStepCosts:
    """Learns what prefill costs in steps that replay a graph and in those that cannot.

    Small steps are a line (`OnlineStepCost`). Large ones are no line, they have a floor, and one in
    a while is a stall (a kernel compiled, experts moved), so they are remembered as they were. A
    large step takes at least as long as one that had less prefill, and at least as long as one that
    had more, less what the difference takes in a small step. The median of these bounds counts;
    without a floor it equals what small steps take.

    Args:
        graph_tokens: the largest step that a graph covers.
    """

    def __init__(self, graph_tokens: int) -> None:
        self.graph_tokens = graph_tokens
        self._small = OnlineStepCost(graph_tokens)
        self._small_steps = 0
        # Prefill tokens, decodes, microseconds.
        self._large: list[deque[tuple[float, float, float]]] = [
            deque(maxlen=REMEMBERED) for _ in range(FARTHEST * SIZES)
        ]
        self._decisions = 0
        self._flat_tokens: int | None = 0  # None: to be found again

    def observe(
        self, decodes: float, duration_us: float, prefill_tokens: float, step_tokens: float
    ) -> None:
        """Learns from one step; engines of a group, told the same, come to the same conclusions.

        A step with a figure that is negative or not finite is ignored.

        Args:
            decodes: tokens of decodes in it, on the engine of the group that had most.
            duration_us: see `OnlineStepCost.observe`.
            prefill_tokens: the most that any engine prefilled in it.
            step_tokens: the most tokens that any of them had in it, decodes included.
        """
        figures = decodes, duration_us, prefill_tokens, step_tokens
        # With a NaN in it a sum compares false.
        if min(figures) < 0.0 or not sum(figures) < _INFINITY:
            return
        if step_tokens <= self.graph_tokens:
            self._small.observe(prefill_tokens, decodes, duration_us)
            self._small_steps += prefill_tokens > 0
        elif 0 < prefill_tokens < FARTHEST * self.graph_tokens:
            step = prefill_tokens, decodes, duration_us
            self._large[self._size(prefill_tokens)].append(step)
            self._flat_tokens = None
            if prefill_tokens <= 2 * self.graph_tokens:
                self._decisions = 0

    def _size(self, prefill_tokens: float) -> int:
        return int(prefill_tokens * SIZES / self.graph_tokens)

    def small_steps_pay(self, backlog_tokens: float) -> bool:
        """Whether prefilling `backlog_tokens` in small steps delays those who decode less.

        Compares what it adds to steps that decode anyway. Changes nothing.
        """
        if self._small_steps < LEAST_STEPS:
            return False
        small = self._small
        us_per_token, us_per_decode = small.prefill_us_per_token, small.decode_us_per_request
        base_us = small.step_base_us(0)
        comparable = self._large[: self._size(backlog_tokens + self.graph_tokens)]
        large_us = sorted(
            us
            - base_us
            - us_per_decode * decodes
            - us_per_token * max(0.0, tokens - backlog_tokens)
            for steps in comparable
            for tokens, decodes, us in steps
        )
        if len(large_us) < LEAST_STEPS:
            return False
        small_us = us_per_token * backlog_tokens
        return small_us < (1.0 - LEAST_GAIN) * large_us[len(large_us) // 2]

    @property
    def flat_tokens(self) -> int:
        """Prefill that a step without graphs holds in the time of the shortest such one.

        Until it holds enough work to hide its launches it takes as long with more. Where nothing
        larger was seen than what was found to be free, one size more; 0 while nothing is known.
        """
        if self._flat_tokens is None:
            self._flat_tokens = self._find_flat_tokens()
        return self._flat_tokens

    def _find_flat_tokens(self) -> int:
        medians = {
            size: sorted(us for _, _, us in steps)[len(steps) // 2]
            for size, steps in enumerate(self._large)
            if len(steps) >= ENOUGH
        }
        if not medians:
            return 0
        most_us = (1.0 + FLAT) * min(medians.values())
        largest = max(size for size, us in medians.items() if us <= most_us)
        sizes = largest + 1 + (largest == max(medians))
        return sizes * self.graph_tokens // SIZES

    @property
    def exploring(self) -> bool:
        """The next step that could be small is to be a large one, see `EXPLORE`."""
        return self._decisions >= EXPLORE

    def decided(self) -> None:
        """A step was found to be better small; call once per step."""
        self._decisions += 1


def fits_graph_steps(
    backlog_tokens: float, decode_tokens: float, graph_tokens: int, most_steps: float
) -> bool:
    """Whether a backlog is prefilled in at most `most_steps` steps that replay graphs.

    The limit is what protects TTFT: who is prefilled last waits for as many whole steps.

    Args:
        backlog_tokens: prefill that waits or runs, on the engine of the group that has most.
        decode_tokens: of a step, on the engine that has most.
        graph_tokens: the largest step that a graph covers.
        most_steps: 0 for never.
    """
    room = graph_tokens - decode_tokens
    return room >= LEAST_ROOM * graph_tokens and backlog_tokens <= most_steps * room
