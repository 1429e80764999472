"""Applies the CPU backend to one worker process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.cpu_backend.experts import apply_local_experts
from gimbal.vllm_plugin.cpu_backend.host_torch import HostTorch
from gimbal.vllm_plugin.cpu_backend.migrations import MigrationCounter
from gimbal.vllm_plugin.cpu_backend.recording import map_to_physical_and_record

COMMUNICATOR = "gimbal.vllm_plugin.cpu_backend.communicator.ExpertParallelCommunicator"
_GUARD = LevelGuard("cpu_backend")
EPLB_MODULES = ("eplb_state", "eplb_utils", "eplb_communicator", "async_worker")


def activate(eplb: bool) -> None:
    """Closes the gaps in this process; `eplb` also those of expert migration. Idempotent."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms.cpu import CpuPlatform

    _replace(CpuPlatform, "get_device_communicator_cls", lambda _: classmethod(_communicator))
    _replace(CPUUnquantizedExperts, "apply", _apply_with_expert_map)
    if not eplb:
        return
    for name in EPLB_MODULES:
        module: Any = import_module(f"vllm.distributed.eplb.{name}")
        module.torch = HostTorch()
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.model_executor.layers.fused_moe.router import base_router

    base_router.eplb_map_to_physical_and_record = map_to_physical_and_record
    _replace(EplbState, "__init__", _init_on_host)
    _replace(EplbState, "step", _counted_step)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Sets ``owner.name`` to ``make(original)``, once."""
    done = owner.__dict__.get("_gimbal_replaced", frozenset())
    if name not in done:
        setattr(owner, name, make(getattr(owner, name)))
        owner._gimbal_replaced = done | {name}


def _communicator(_platform: Any) -> str:
    return COMMUNICATOR


def _apply_with_expert_map(original: Any) -> Any:
    """``CPUUnquantizedExperts.apply`` that computes local experts when there is an expert map."""
    from vllm._custom_ops import cpu_fused_moe

    @functools.wraps(original)
    def apply(
        self: Any,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: Any,
        global_num_experts: int,
        expert_map: Any,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        if expert_map is None:
            original(
                self,
                output,
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                activation,
                global_num_experts,
                expert_map,
                *rest,
                **kwargs,
            )
            return
        already_weighted = bool(
            kwargs.get("apply_router_weight_on_input", rest[-1] if rest else False)
        )

        def kernel(out: Any, rows: Any, weights: Any, slots: Any) -> None:
            cpu_fused_moe(
                out,
                rows,
                w1,
                w2,
                self.w1_bias,
                self.w2_bias,
                weights,
                slots,
                activation.value,
                self.isa,
                already_weighted,
            )

        apply_local_experts(output, hidden_states, topk_weights, topk_ids, expert_map, kernel)

    return apply


def _init_on_host(original: Any) -> Any:
    """``EplbState.__init__`` with a device index, which the asynchronous worker insists on."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.gimbal_migrations = _GUARD.run("migrations", MigrationCounter)
        if self.device_index is None:
            self.device_index = 0

    return __init__


def _counted_step(original: Any) -> Any:
    """``EplbState.step`` followed by a look at what it committed."""

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        counter = self.gimbal_migrations
        if counter is not None and not _GUARD.disabled:
            _GUARD.run("migrations", counter.after_step, self)

    return step
