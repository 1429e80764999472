"""Breaks a running server's expert map on purpose, so that a check can be seen to fail."""

from __future__ import annotations

from typing import Any


class BreakExpertMap:
    """A vLLM worker extension (``--worker-extension-cls``)."""

    model_runner: Any

    def gimbal_break_expert_map(self) -> dict[str, int]:
        """Swaps the physical slots of logical experts 0 and 1 in the first layer only."""
        for model in self.model_runner.eplb_state.model_states.values():
            table = model.logical_to_physical_map[0]
            table[[0, 1]] = table[[1, 0]].clone()
        return {"layers": 1, "experts": 2}
