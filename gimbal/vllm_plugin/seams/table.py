"""One row of the tables: a symbol of vLLM and the signature Gimbal expects."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seam:
    """One symbol of vLLM.

    Attributes:
        module: dotted module below ``vllm``, for example ``v1.engine.core_client``.
        symbol: qualified name inside the module, for example ``DPLBAsyncMPClient.__init__``.
        parameters: parameter names in order, ``*`` marks as in a signature; empty for a class or
            a module-level name, where only existence is checked.
        level: the Gimbal level (or ``cpu_backend``) that stops working without it.
        why: what Gimbal does with it.
        patched: True when Gimbal replaces it, False when it only calls or subclasses it.
        entry: ``module:function`` below ``gimbal.vllm_plugin`` that vLLM's call reaches, or that
            makes the function it reaches; empty where vLLM calls nothing of Gimbal's. An entry
            guards everything below it: a fault there ends in vLLM's behaviour for that call.
        since: the vLLM version that brought it, where older supported ones lack it.
        also: parameters that it has in other supported versions, and that serve as well.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    level: str
    why: str
    patched: bool = True
    entry: str = ""
    since: str = ""
    also: tuple[tuple[str, ...], ...] = ()
