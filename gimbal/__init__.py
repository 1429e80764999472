"""Gimbal: coordinated dispatch, queueing and expert placement for MoE serving on vLLM.

Authors of policies use `gimbal.contracts` and `gimbal.testing`; both are loaded when first asked
for, so that whoever imports Gimbal for less does not pay for them.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

__all__ = ["__version__", "contracts", "testing"]


def __getattr__(name: str) -> object:
    if name in ("contracts", "testing"):
        return _import_module(f"gimbal.{name}")
    raise AttributeError(f"module 'gimbal' has no attribute {name!r}")
