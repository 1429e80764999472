"""The engine's waiting queue: orderings by name, the heap, prefill budget and KV admission.

An ordering is one file with one class; registering it is one line here.
"""

from __future__ import annotations

from gimbal.core.contracts import QueueOrdering
from gimbal.core.registry import Registry

ORDERINGS: Registry[QueueOrdering] = Registry("queue ordering", "gimbal.ordering", ("key",))
ORDERINGS.register("gimbal", "gimbal.core.queue.gimbal:GimbalOrdering")
ORDERINGS.register("fcfs", "gimbal.core.queue.fcfs:FcfsOrdering")
ORDERINGS.register("sjf", "gimbal.core.queue.sjf:SjfOrdering")
ORDERINGS.register("hrrn", "gimbal.core.queue.hrrn:HrrnOrdering")
