"""What activation changes in a worker process, and what it leaves alone.

It patches vLLM for the life of a process, so the assertions run in processes of their own.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from gimbal.core.errors import InputError

COMMON = """
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from gimbal.vllm_plugin.cpu_backend.activation import COMMUNICATOR, activate
stock_apply, stock_event = cpu_moe.CPUUnquantizedExperts.apply, torch.Event
"""

EXPERT_PARALLEL_ONLY = """
activate(eplb=False)
once = cpu_moe.CPUUnquantizedExperts.apply
activate(eplb=False)
assert cpu_moe.CPUUnquantizedExperts.apply is once is not stock_apply
assert current_platform.get_device_communicator_cls() == COMMUNICATOR

experts = object.__new__(cpu_moe.CPUUnquantizedExperts)
torch.nn.Module.__init__(experts) if isinstance(experts, torch.nn.Module) else None
experts._use_zentorch = False
experts.quant_config = type("Q", (), {"w1_bias": None, "w2_bias": None})()
g = torch.Generator().manual_seed(0)
w13 = (torch.randn(4, 64, 64, generator=g) * 0.1).bfloat16()
w2 = (torch.randn(4, 64, 32, generator=g) * 0.1).bfloat16()
pack = lambda w: cpu_moe.cpu_prepack_moe_weight(w.contiguous(), "vec")
x = torch.randn(9, 64, generator=g).bfloat16()
ids = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(9)]).int()
weights = torch.rand(9, 2, generator=g)
def run(first, last, expert_map):
    out = torch.full_like(x, float("nan"))
    experts.apply(out, x, pack(w13[first:last]), pack(w2[first:last]), weights, ids,
                  MoEActivation.SILU, 4, expert_map, None, None, None, None, None, False)
    return out.float()
whole = run(0, 4, None)
halves = [run(0, 2, torch.tensor([0, 1, -1, -1], dtype=torch.int32)),
          run(2, 4, torch.tensor([-1, -1, 0, 1], dtype=torch.int32))]
assert (whole - sum(halves)).abs().max() <= 0.02 * whole.abs().max()

from vllm.distributed.eplb import eplb_state
assert eplb_state.torch is torch, "EPLB is left alone without --enable-eplb"
"""

WITH_EPLB = """
activate(eplb=True)
from vllm.distributed.eplb import async_worker, eplb_communicator, eplb_state, eplb_utils
from vllm.model_executor.layers.fused_moe.router import base_router
step = eplb_state.EplbState.step
activate(eplb=True)
assert eplb_state.EplbState.step is step
assert torch.Event is stock_event, "torch itself is never patched"
for module in (async_worker, eplb_communicator, eplb_state, eplb_utils):
    assert module.torch is not torch
config = type("P", (), {"eplb_config": None})()
state = eplb_state.EplbState(config, torch.device("cpu"))
assert state.device_index == 0
assert state.gimbal_migrations.report.rearrangements == 0
router = base_router.eplb_map_to_physical_and_record
table, load = torch.tensor([[1], [0]]), torch.zeros(2, dtype=torch.int32)
mapped = router(topk_ids=torch.tensor([[0], [0]]), expert_load_view=load,
                logical_to_physical_map=table, logical_replica_count=torch.tensor([1, 1]),
                record_enabled=torch.tensor(True), num_unpadded_tokens=torch.tensor(1))
assert mapped.tolist() == [[1], [1]] and load.tolist() == [0, 1]
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [EXPERT_PARALLEL_ONLY, WITH_EPLB], ids=["ep", "eplb"])
def test_activation_in_a_process(script):
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


def model_with(experts, expert_map="map"):
    kernel = SimpleNamespace(fused_experts=experts)
    layer = SimpleNamespace(expert_map=expert_map, quant_method=SimpleNamespace(moe_kernel=kernel))
    return SimpleNamespace(named_modules=lambda: [("model.layers.0.mlp.experts", layer)])


def test_experts_that_would_ignore_the_map_are_refused_by_name():
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from gimbal.vllm_plugin.cpu_backend.worker import refuse_unsupported_experts

    class Int4Experts: ...

    with pytest.raises(InputError, match=r"model.layers.0.mlp.experts: Int4Experts cannot"):
        refuse_unsupported_experts(model_with(Int4Experts()))
    refuse_unsupported_experts(model_with(Int4Experts(), expert_map=None))
    experts = object.__new__(CPUUnquantizedExperts)
    experts._use_zentorch = False
    refuse_unsupported_experts(model_with(experts))
    experts._use_zentorch = True
    with pytest.raises(InputError, match="CPUUnquantizedExperts cannot"):
        refuse_unsupported_experts(model_with(experts))
