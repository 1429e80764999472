"""What a worker tells its engine: attributes that travel with a step's output."""

from __future__ import annotations

PRESSURE_US = "gimbal_expert_pressure_us"
"""The engine's expert pressure, microseconds per step."""
FALLBACKS = "gimbal_placement_fallbacks"
"""Fallbacks of level `placement` so far."""
OFF = "gimbal_placement_off"
"""Level `placement` does not act any more."""
PLACEMENT = "gimbal_placement_figures"
"""``{Field: value}``, what level `placement` has done so far (`RebalanceLog.figures`)."""
