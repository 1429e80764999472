"""The engine's waiting queue: orderings by name, the heap, prefill budget and KV admission.

An ordering is one file with one class; registering it is one line here.
"""

from __future__ import annotations

from typing import Any

from gimbal.core.contracts import QueueOrdering, traits_of
from gimbal.core.registry import Registry


def _declared(ordering: Any) -> tuple[str, ...]:
    return ("keys",) if traits_of(ordering).dynamic else ()


ORDERINGS: Registry[QueueOrdering] = Registry(
    "queue ordering", "gimbal.ordering", ("key",), _declared
)
ORDERINGS.register("gimbal", "gimbal.core.queue.gimbal:GimbalOrdering")
ORDERINGS.register("fcfs", "gimbal.core.queue.fcfs:FcfsOrdering")
ORDERINGS.register("sjf", "gimbal.core.queue.sjf:SjfOrdering")
ORDERINGS.register("hrrn", "gimbal.core.queue.hrrn:HrrnOrdering")
