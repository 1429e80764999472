"""What an engine learns from its steps: what they take, and which of its group was the slowest."""

from __future__ import annotations

from collections.abc import Sequence

from gimbal.core.cost.online import smoothed
from gimbal.core.queue.budget import smoothed_share
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.engine.state import EngineState

_SEQUENCE, _STEP_BASE = int(Field.SEQUENCE), int(Field.STEP_BASE_US)
_TOKENS, _PREFILL = int(Field.STEP_TOKENS), int(Field.STEP_PREFILL_TOKENS)
_DEPTH = int(Field.STEP_PREFILL_DEPTH_TOKENS)


class StepLessons:
    """Feeds the learned costs in an `EngineState`, and the columns of its row that tell of them.

    Args:
        state: the engine's; only its row and its costs change.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._step_us = 0.0
        self._prefill_rate = 0.0
        # Of the step that ends, in the group: the most tokens, and decodes, of any engine; whether
        # all have been heard; tokens, pairs and base of the slowest prefill.
        self._tokens = self._decodes = 0.0
        self._complete = False
        self._slowest = (0.0, 0.0, 0.0)
        self._fullest = 0.0

    def look(self) -> None:
        """Reads what the group runs in the step that ends: a moment later those with less to do
        publish the next."""
        state = self._state
        if state.group is None:
            return
        rows = state.group.read()
        prefill = rows[:, _PREFILL]
        self._fullest = float(prefill.max())
        if self._fullest > 0.0:
            each, pairs = prefill.tolist(), (prefill * rows[:, _DEPTH]).tolist()
            slowest = state.depth.slowest(each, pairs)
            self._slowest = each[slowest], pairs[slowest], float(rows[:, _STEP_BASE].max())
        if state.graph_costs is not None:
            tokens = rows[:, _TOKENS]
            self._tokens = float(tokens.max())
            self._decodes = float((tokens - prefill).max())
            if not self._complete:
                # Behind an external load balancer other engines publish on boards of their own.
                self._complete = bool(rows[:, _SEQUENCE].all())

    def learn(self, step_us: float, tokens: int, prefill: Sequence[float], decodes: int) -> None:
        """Takes up a step that has ended.

        Args:
            step_us: what it took.
            tokens: all that this engine had in it.
            prefill: this engine's prompt tokens, and their depths summed (`PrefillDepthCost`).
            decodes: its requests that decoded.
        """
        state, row = self._state, self._state.row
        own, pairs = prefill
        self._step_us = smoothed(self._step_us, step_us)
        row[Field.STEP_TIME_US] = self._step_us
        if own:
            self._prefill_rate = smoothed(self._prefill_rate, own / max(step_us, 1.0) * 1e6)
            row[Field.PREFILL_TOKENS_PER_S] = self._prefill_rate
        alone, cost, graph_costs = state.group is None, state.cost, state.graph_costs
        fullest = own if alone else self._fullest
        state.prefill_share = smoothed_share(state.prefill_share, fullest > 0.0)
        if fullest > 0.0:
            slowest = (own, pairs, cost.step_base_us(decodes)) if alone else self._slowest
            state.depth.observe(slowest[0], slowest[1], step_us - slowest[2])
        cost.observe(own, decodes, step_us, None if alone else fullest)
        row[Field.PREFILL_US_PER_TOKEN] = cost.prefill_us_per_token
        row[Field.DECODE_US_PER_REQUEST] = cost.decode_us_per_request
        if graph_costs is None:
            return
        if alone:
            graph_costs.observe(tokens - own, step_us, own, float(tokens))
        elif self._complete:
            graph_costs.observe(self._decodes, step_us, fullest, self._tokens)
