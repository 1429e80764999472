"""Dispatch: which data-parallel engine a request goes to.

A policy is one class with one method (`contracts.DispatchPolicy`); registering it is one line
here, and nothing but its name is loaded before somebody asks for it.
"""

from __future__ import annotations

from typing import Any

from gimbal.core.contracts import DispatchPolicy
from gimbal.core.registry import Registry


def _declared(policy: Any) -> tuple[str, ...]:
    return ("priced", "session_bound_us") if getattr(policy, "term_names", ()) else ()


POLICIES: Registry[DispatchPolicy] = Registry(
    "dispatch policy", "gimbal.dispatch", ("costs",), _declared
)
_HERE = "gimbal.core.dispatch.policies"
POLICIES.register("gimbal", f"{_HERE}.gimbal:GimbalPolicy")
POLICIES.register("vllm", f"{_HERE}.vllm:VllmPolicy")
POLICIES.register("vllm-legacy", f"{_HERE}.vllm_legacy:VllmLegacyPolicy")
POLICIES.register("round-robin", f"{_HERE}.round_robin:RoundRobinPolicy")
POLICIES.register("total-tokens", f"{_HERE}.total_tokens:TotalTokensPolicy")
POLICIES.register("lmetric", f"{_HERE}.lmetric:LMetricPolicy")
POLICIES.register("dynamo", f"{_HERE}.dynamo:DynamoPolicy")
POLICIES.register("llm-d", f"{_HERE}.llm_d:LlmDPolicy")
