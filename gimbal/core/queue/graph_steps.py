"""Keeps steps small enough for CUDA graphs where two such steps are cheaper than a large one.

vLLM captures CUDA graphs for steps of up to ``max_cudagraph_capture_size`` tokens (512 unless set).
A larger step launches its kernels one by one, and until it holds enough work to hide the launches
it takes as long with 600 tokens as with 1,500: on four H100 with Qwen3-30B-A3B some 25 ms, where
a step of 500 tokens takes 16 (docs/simulator.md). A backlog of 700 tokens then costs decodes less,
and its first prompts too, in two steps that replay graphs than in one that cannot.

Engines in lock step run without graphs as soon as one of them must (vLLM takes the least of their
modes), so all decide by the engine that has most.
"""

from __future__ import annotations

from gimbal.core.cost.online import OnlineStepCost

LEAST_ROOM = 0.25
"""Share of a graph's tokens that decodes must leave: with less, prefill would hardly move."""
FARTHEST = 4.0
"""Larger steps, in multiples of a graph's tokens, say nothing about those just above it."""
LEAST_STEPS = 8
"""Steps with prefill to learn from, with graphs and without, before anything is said."""
LEAST_GAIN = 0.1
"""Share of the delay that small steps must save: without a floor both kinds cost the same."""


class GraphStepCosts:
    """Learns what prefill costs in steps that replay a graph and in those that cannot.

    Two `OnlineStepCost`, because the two kinds share no line: beyond the graphs a step has a floor.

    Args:
        graph_tokens: the largest step that a graph covers.
    """

    def __init__(self, graph_tokens: int) -> None:
        self.graph_tokens = graph_tokens
        self._small = OnlineStepCost(graph_tokens)
        self._large = OnlineStepCost(2 * graph_tokens)
        self._small_steps = self._large_steps = 0

    def observe(
        self,
        prefill_tokens: float,
        decodes: float,
        duration_us: float,
        group_prefill_tokens: float,
        group_tokens: float,
    ) -> None:
        """Learns from one step.

        Args:
            prefill_tokens, decodes, duration_us: of this engine, as `OnlineStepCost.observe`.
            group_prefill_tokens: the most that any engine of the group prefilled in it.
            group_tokens: the most tokens that any of them had in it, decodes included.
        """
        if group_tokens <= self.graph_tokens:
            self._small.observe(prefill_tokens, decodes, duration_us, group_prefill_tokens)
            self._small_steps += group_prefill_tokens > 0
        elif group_tokens <= FARTHEST * self.graph_tokens and group_prefill_tokens > 0:
            self._large.observe(prefill_tokens, decodes, duration_us, group_prefill_tokens)
            self._large_steps += 1

    def small_steps_pay(self, backlog_tokens: float, decodes: float) -> bool:
        """Whether prefilling `backlog_tokens` beside `decodes` delays those less in small steps.

        Compares what it adds to the steps that decode anyway; False until both kinds are known.
        """
        if min(self._small_steps, self._large_steps) < LEAST_STEPS:
            return False
        small_us = backlog_tokens * self._small.prefill_us_per_token
        large_us = self._large.predict_us(backlog_tokens, decodes)
        added_us = large_us - self._small.step_base_us(decodes)
        return small_us < (1.0 - LEAST_GAIN) * added_us


def fits_graph_steps(
    backlog_tokens: float, decode_tokens: float, graph_tokens: int, most_steps: float
) -> bool:
    """Whether a backlog is prefilled in at most `most_steps` steps that replay graphs.

    The limit is what protects TTFT: a prompt that is cut waits for as many whole steps.

    Args:
        backlog_tokens: prefill that waits or runs, on the engine of the group that has most.
        decode_tokens: of a step, on the engine that has most.
        graph_tokens: the largest step that a graph covers.
        most_steps: 0 for never.
    """
    room = graph_tokens - decode_tokens
    return room >= LEAST_ROOM * graph_tokens and backlog_tokens <= most_steps * room
