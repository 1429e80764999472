"""What the author of a policy needs, and nothing else: docs/writing-a-policy.md says how.

The classes live in `gimbal.core`; names here stay where they are between versions.
"""

from __future__ import annotations

from gimbal.core.contracts import (
    DispatchPolicy,
    DispatchRequest,
    DynamicOrdering,
    EngineLoads,
    FloatArray,
    IntArray,
    OrderingTraits,
    Placer,
    QueuedRequest,
    QueueOrdering,
    QueueState,
    RoutingCounts,
    TimedPolicy,
    Topology,
    argmin_rotating,
)
from gimbal.core.errors import InputError, PolicyError
from gimbal.core.options import (
    AtLeastOne,
    Count,
    Finite,
    NotNegative,
    Positive,
    PositiveCount,
    option,
)
from gimbal.core.snapshot import Field

__all__ = [
    "AtLeastOne",
    "Count",
    "DispatchPolicy",
    "DispatchRequest",
    "DynamicOrdering",
    "EngineLoads",
    "Field",
    "Finite",
    "FloatArray",
    "InputError",
    "IntArray",
    "NotNegative",
    "OrderingTraits",
    "Placer",
    "PolicyError",
    "Positive",
    "PositiveCount",
    "QueueOrdering",
    "QueueState",
    "QueuedRequest",
    "RoutingCounts",
    "TimedPolicy",
    "Topology",
    "argmin_rotating",
    "option",
]
