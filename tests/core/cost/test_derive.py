"""Derived profiles: close to the measured one where there is one, and marked as estimates."""

import numpy as np
import pytest

from gimbal.core.cost.derive import derive_profile, model_shape
from gimbal.core.cost.profile import Layout, load_profile
from gimbal.core.cost.step import BatchShape, expected_active, step_time
from gimbal.core.errors import InputError

QWEN3_30B = {  # Qwen/Qwen3-30B-A3B config.json
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(("tokens", "kv", "pairs"), [(32, 32e3, 0), (256, 4e5, 0), (2048, 0, 2e6)])
def test_h100_estimate_is_near_the_measured_profile(tokens, kv, pairs):
    derived = derive_profile("x", QWEN3_30B, "h100", Layout(2, 2))
    measured = load_profile("h100-qwen3-30b-a3b")
    two = np.ones(2)
    batch = BatchShape(tokens * two, kv * two, pairs * two, 0 * two, 32 * two)
    active = expected_active(np.full(128, 8 / 128), 2 * tokens).reshape(4, -1).sum(axis=1)
    experts = np.tile(active, (48, 1)), np.full((48, 4), 2 * tokens * 8 / 4.0)
    got = step_time(derived, batch, *experts).total_us
    assert got == pytest.approx(step_time(measured, batch, *experts).total_us, rel=0.35)


def test_estimates_say_so_and_scale_with_the_data_sheet():
    slow = derive_profile("x", QWEN3_30B, "a100", Layout(2, 2))
    fast = derive_profile("x", QWEN3_30B, "h200", Layout(2, 2))
    assert slow.estimated
    assert slow.moe.source.startswith("estimate")
    assert slow.moe.per_active_expert_us > fast.moe.per_active_expert_us
    assert slow.kv_tokens < fast.kv_tokens


def test_other_families_call_their_experts_otherwise():
    mixtral = {k: v for k, v in QWEN3_30B.items() if k not in ("num_experts", "head_dim")}
    mixtral |= {"num_local_experts": 8, "intermediate_size": 14336, "num_experts_per_tok": 2}
    del mixtral["moe_intermediate_size"]
    shape = model_shape(mixtral)
    assert (shape.experts, shape.top_k) == (8, 2)
    assert shape.expert_bytes == 3 * 2048 * 14336 * 2


@pytest.mark.parametrize(
    ("config", "gpu", "message"),
    [
        ({**QWEN3_30B, "num_experts": 0}, "h100", "not a MoE model"),
        ({k: v for k, v in QWEN3_30B.items() if k != "hidden_size"}, "h100", "no hidden_size"),
        (QWEN3_30B, "h1000", "did you mean 'h100'"),
    ],
)
def test_bad_input(config, gpu, message):
    with pytest.raises(InputError, match=message):
        derive_profile("x", config, gpu, Layout(2))
