"""Derived profiles: close to the measured one where there is one, and marked as estimates."""

import numpy as np
import pytest

from gimbal.core.cost.derive import GPUS, derive_profile
from gimbal.core.cost.profile import Layout, load_profile
from gimbal.core.cost.step import BatchShape, expected_active, step_time
from gimbal.core.errors import InputError
from gimbal.core.model import ModelConfig


def config(**values) -> ModelConfig:
    return ModelConfig(values, "config.json")


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


@pytest.mark.parametrize(
    ("layout", "name"),
    [(Layout(1), "h100-qwen3-30b-a3b-tp1"), (Layout(2, 2), "h100-qwen3-30b-a3b")],
)
@pytest.mark.parametrize(("tokens", "kv", "pairs"), [(32, 32e3, 0), (256, 4e5, 0), (2048, 0, 2e6)])
def test_the_estimate_of_what_was_measured_is_the_measurement(layout, name, tokens, kv, pairs):
    derived = derive_profile("x", config(**QWEN3_30B), "h100", layout)
    measured = load_profile(name)
    ones, ranks, total = np.ones(layout.dp), layout.ep, layout.dp * tokens
    batch = BatchShape(tokens * ones, kv * ones, pairs * ones, 0 * ones, 32 * ones)
    active = expected_active(np.full(128, 8 / 128), total).reshape(ranks, -1).sum(axis=1)
    experts = np.tile(active, (48, 1)), np.full((48, ranks), total * 8 / ranks)
    got = step_time(derived, batch, *experts).total_us
    assert got == pytest.approx(step_time(measured, batch, *experts).total_us, rel=0.02)
    assert derived.kv_tokens == pytest.approx(measured.kv_tokens, rel=0.06)


def test_estimates_say_so_and_scale_with_the_data_sheet():
    slow = derive_profile("x", config(**QWEN3_30B), "a100", Layout(2, 2))
    fast = derive_profile("x", config(**QWEN3_30B), "h200", Layout(2, 2))
    assert slow.estimated
    assert slow.moe.source.startswith("estimate")
    assert slow.moe.per_active_expert_us > fast.moe.per_active_expert_us
    assert slow.kv_tokens < fast.kv_tokens


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 8,
    "first_k_dense_replace": 2,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "vocab_size": 129280,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_mla_caches_one_latent_on_every_rank():
    one = derive_profile("x", config(**DEEPSEEK), "h200", Layout(8))
    split = derive_profile("x", config(**DEEPSEEK), "h200", Layout(4, 2))
    assert one.model.kv_bytes_per_token == split.model.kv_bytes_per_token == 8 * 576 * 2
    # Tensor parallelism splits weights, not the latent: only what the weights leave is more.
    freed = (split.kv_tokens - one.kv_tokens) * 8 * 576 * 2
    assert 0 < freed < 141e9 * 0.1
    fp8 = derive_profile("x", config(**DEEPSEEK), "h200", Layout(8), "fp8")
    assert fp8.model.kv_bytes_per_token == 8 * 576
    assert fp8.kv_tokens == pytest.approx(2 * one.kv_tokens, abs=2)


def test_narrow_weights_read_and_multiply_faster():
    wide = derive_profile("x", config(**DEEPSEEK), "h200", Layout(8))
    narrow = derive_profile("x", config(**DEEPSEEK, quantization_config=FP8), "h200", Layout(8))
    assert narrow.model.expert_bytes == pytest.approx(wide.model.expert_bytes / 2, rel=1e-3)
    assert narrow.moe.per_active_expert_us == pytest.approx(
        wide.moe.per_active_expert_us / 2, rel=1e-3
    )
    faster = GPUS["h200"].fp8_tflops / GPUS["h200"].tflops
    assert narrow.moe.per_pair_us == pytest.approx(wide.moe.per_pair_us / faster)
    assert narrow.kv_tokens > wide.kv_tokens
    assert narrow.model.kv_bytes_per_token == wide.model.kv_bytes_per_token


def test_weight_only_formats_and_old_gpus_multiply_in_bf16():
    mxfp4 = {"quant_method": "mxfp4"}
    wide = derive_profile("x", config(**QWEN3_30B), "h100", Layout(2))
    narrow = derive_profile("x", config(**QWEN3_30B, quantization_config=mxfp4), "h100", Layout(2))
    assert narrow.moe.per_pair_us == wide.moe.per_pair_us
    assert narrow.model.expert_bytes == wide.model.expert_bytes * 4.25 / 16
    ampere = [
        derive_profile("x", config(**values), "a100", Layout(2)).moe.per_pair_us
        for values in (QWEN3_30B, {**QWEN3_30B, "quantization_config": FP8})
    ]
    assert ampere[0] == ampere[1]


def test_terms_of_other_layers_are_shared_out_over_the_moe_layers():
    plain = derive_profile("x", config(**QWEN3_30B), "h100", Layout(2))
    sparse = {**QWEN3_30B, "decoder_sparse_step": 2, "intermediate_size": 6144}
    half = derive_profile("x", config(**sparse), "h100", Layout(2))
    assert (plain.model.layers, half.model.layers) == (48, 24)
    assert half.model.kv_bytes_per_token == plain.model.kv_bytes_per_token
    # Two attentions a MoE layer now, and a dense MLP besides.
    assert half.attention.per_decode_kv_token_us == 2 * plain.attention.per_decode_kv_token_us
    assert half.per_rank_token[0].floor_us == 2 * plain.per_rank_token[0].floor_us
    assert len(half.per_rank_token) == len(plain.per_rank_token) + 2


def test_layers_without_a_cache_cost_no_kv():
    hybrid = {
        **QWEN3_30B,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    plain = derive_profile("x", config(**QWEN3_30B), "h100", Layout(2))
    found = derive_profile("x", config(**hybrid), "h100", Layout(2))
    assert found.model.kv_bytes_per_token == plain.model.kv_bytes_per_token / 4
    assert found.attention.per_decode_kv_token_us == plain.attention.per_decode_kv_token_us / 4
    assert any("36 layers keep a state" in note for note in found.notes)


def test_a_window_is_read_as_far_as_it_reaches():
    kinds = ["sliding_attention", "full_attention"] * 24
    mixed = {**QWEN3_30B, "layer_types": kinds, "sliding_window": 1024}
    plain = derive_profile("x", config(**QWEN3_30B), "h100", Layout(2))
    found = derive_profile("x", config(**mixed), "h100", Layout(2))
    reach = (1 + 1024 / 4096) / 2
    full_us = plain.attention.per_decode_kv_token_us
    assert found.attention.per_decode_kv_token_us == pytest.approx(reach * full_us)
    assert found.model.kv_bytes_per_token == plain.model.kv_bytes_per_token


def test_a_model_that_does_not_fit_says_so():
    found = derive_profile("x", config(**DEEPSEEK), "l40s", Layout(1))
    assert found.kv_tokens == 0
    assert any(note.startswith("does not fit: ") for note in found.notes)


@pytest.mark.parametrize(
    ("values", "gpu", "message"),
    [
        ({**QWEN3_30B, "num_experts": 0}, "h100", "not a MoE model"),
        ({k: v for k, v in QWEN3_30B.items() if k != "hidden_size"}, "h100", "no hidden_size"),
        (QWEN3_30B, "h1000", "did you mean 'h100'"),
        ({**QWEN3_30B, "layer_types": ["mamba"] * 48, "mamba_d_state": 16}, "h100", "no layer has"),
        ({**DEEPSEEK, "model_type": "new"}, "h100", "not known whether vLLM caches the latent"),
    ],
)
def test_bad_input(values, gpu, message):
    with pytest.raises(InputError, match=message):
        derive_profile("x", config(**values), gpu, Layout(2))
