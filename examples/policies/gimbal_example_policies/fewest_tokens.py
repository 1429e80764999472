"""Dispatch to the engine with the fewest prompt tokens left to compute."""

from gimbal.contracts import DispatchRequest, EngineLoads, Field, FloatArray


class FewestTokens:
    def costs(self, request: DispatchRequest, loads: EngineLoads) -> FloatArray:
        """[engines] prompt tokens: those ahead of this request, and its own less the cached."""
        ahead = loads.column(Field.WAITING_PREFILL_TOKENS)
        running = loads.column(Field.RUNNING_PREFILL_TOKENS)
        return ahead + running + loads.unacked_tokens + request.prompt_tokens - loads.cached_tokens
