"""Workloads: what arrives when, how long it is, what it shares, and the tokens it is made of.

Used alike by the live benchmark and the simulator, hence free of HTTP. `load_trace` is the front
door; a format is an entry of the table `formats.FORMATS`, a scenario a file in ``scenarios/``.
"""

from gimbal.workloads.load import BUILTIN_TRACES, WorkloadOptions, build_workload, load_trace
from gimbal.workloads.reader import TraceOptions
from gimbal.workloads.trace import Trace, TraceRequest

__all__ = [
    "BUILTIN_TRACES",
    "Trace",
    "TraceOptions",
    "TraceRequest",
    "WorkloadOptions",
    "build_workload",
    "load_trace",
]
