"""vLLM's CPU worker and model runner with expert parallelism and expert migration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Importing the worker loads its shared-memory library first, as vLLM asks.
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.cpu_backend.activation import activate


class ExpertParallelCPUModelRunner(CPUModelRunner):  # type: ignore[misc]
    """Checks that every expert layer can be split over ranks, and creates the EPLB state."""

    def load_model(self, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights)
        refuse_unsupported_experts(self.model)
        if self.parallel_config.enable_eplb:
            self._create_eplb_state()

    def _create_eplb_state(self) -> None:
        from vllm.distributed.eplb.eplb_state import EplbState
        from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

        self._moe_model = get_mixture_of_experts_model(self.model)
        if self._moe_model is None:
            raise InputError(
                f"--enable-eplb: {self.model_config.model} is not a Mixture-of-Experts model"
            )
        self.eplb_state = EplbState(self.parallel_config, self.device)
        self.eplb_state.add_model(self._moe_model, self.model_config)
        self.eplb_state.start_async_loop()


class ExpertParallelCPUWorker(CPUWorker):  # type: ignore[misc]
    """The CPU worker of an expert-parallel engine."""

    def init_device(self) -> None:
        ask_for_matrix_tiles()
        activate(eplb=self.parallel_config.enable_eplb)
        with _model_runner_class(ExpertParallelCPUModelRunner):
            super().init_device()

    def gimbal_migrations(self) -> dict[str, Any]:
        """Expert migrations so far (`MigrationReport`), for vLLM's ``collective_rpc``."""
        state = getattr(self.model_runner, "eplb_state", None)
        counter = getattr(state, "gimbal_migrations", None)
        return {} if counter is None else counter.as_dict()


def ask_for_matrix_tiles() -> None:
    """Asks the kernel for AMX tiles; does nothing on CPUs without them.

    vLLM's ``cpu_micro_gemm`` uses them without having asked. A worker whose first matrix product is
    vLLM's, so that nobody else has asked either, ends with SIGILL.
    """
    import torch

    with contextlib.suppress(Exception):
        torch._C._cpu._init_amx()


@contextlib.contextmanager
def _model_runner_class(runner: type) -> Iterator[None]:
    """``CPUWorker.init_device`` builds the runner class it finds under its module's name."""
    stock = cpu_worker.CPUModelRunner
    cpu_worker.CPUModelRunner = runner
    try:
        yield
    finally:
        cpu_worker.CPUModelRunner = stock


def refuse_unsupported_experts(model: Any) -> None:
    """Raises InputError when an expert layer would run a kernel that ignores the expert map.

    vLLM's quantized CPU kernels do: they would read past their weights and kill the worker.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    for name, layer in model.named_modules():
        if getattr(layer, "expert_map", None) is None or not hasattr(layer, "quant_method"):
            continue
        kernel = getattr(layer.quant_method, "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if not isinstance(experts, CPUUnquantizedExperts) or experts._use_zentorch:
            raise InputError(
                f"{name}: {type(experts).__name__} cannot run expert-parallel on CPU; "
                "use an unquantized checkpoint (bf16, fp16 or fp32)"
            )
