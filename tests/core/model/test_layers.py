"""Rules by which families say what a layer is, beyond those of the published table."""

from __future__ import annotations

import pytest

from gimbal.core.errors import InputError
from gimbal.core.model import ModelConfig
from gimbal.core.model.layers import read_layers

LETTERS = {"full": "f", "sliding": "s", "linear": "l", "none": ".", "moe": "M", "dense": "d"}


def config(**values: object) -> ModelConfig:
    return ModelConfig({"num_hidden_layers": 6, **values}, "config.json")


@pytest.mark.parametrize(
    ("values", "mixers"),
    [
        ({}, "ffffff"),
        ({"sliding_window": 128}, "ssssss"),
        ({"sliding_window": 128, "use_sliding_window": False}, "ffffff"),
        ({"sliding_window": 128, "max_window_layers": 4}, "ffffss"),
        ({"sliding_window": 128, "sliding_window_pattern": 3}, "ssfssf"),
        ({"sliding_window": 128, "sliding_window_pattern": "LLG"}, "ssfssf"),
        ({"sliding_window": 128, "global_attn_every_n_layers": 2}, "sfsfsf"),
        ({"linear_num_value_heads": 4}, "lllfll"),
        ({"attn_layer_period": 3, "attn_layer_offset": 1}, "lfllfl"),
        ({"layer_group_size": 4}, "lllfll"),
        ({"layer_group_size": 4, "architectures": ["BailingMoeV3ForCausalLM"]}, "lllfff"),
        ({"full_attn_idxs": [0, 5]}, "fllllf"),
        ({"linear_attn_config": {"full_attn_layers": [1, 6]}}, "fllllf"),
        ({"hybrid_layer_pattern": [0, 1, 1, 0, 1, 1]}, "fssfss"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8}, "sssfss"),
        (
            {
                "model_type": "llama4_text",
                "attention_chunk_size": 8,
                "no_rope_layers": [1, 0, 1, 0, 1, 0],
            },
            "sfsfsf",
        ),
        ({"layer_types": ["attention", "mamba"] * 4}, "flflfl"),  # two speculative ones behind
    ],
)
def test_how_layers_mix_tokens(values: dict, mixers: str) -> None:
    assert "".join(LETTERS[kind] for kind in read_layers(config(**values)).mixers) == mixers


@pytest.mark.parametrize(
    ("values", "mlps"),
    [
        ({}, "MMMMMM"),
        ({"first_k_dense_replace": 2}, "ddMMMM"),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, "ddMdMd"),
        ({"moe_layer_freq": [0, 1, 1, 1, 0, 1]}, "dMMMdM"),
        ({"mlp_layer_types": ["dense", *["sparse"] * 5]}, "dMMMMM"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "dMdddM"),
        ({"interleave_moe_layer_step": 3}, "ddMddM"),
        ({"moe_layers": [1, 3]}, "dMdMdd"),
        ({"moe_layers_enum": "1,3"}, "dMdMdd"),
        ({"model_type": "step3p5"}, "dMMMMM"),
        ({"num_dense_layers": 1}, "dMMMMM"),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, "dMdMdM"),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 4}, "ddMMMd"),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, "dMMMMM"),
        ({"moe_layer_start_index": 0, "moe_layer_interval": 2}, "dMdMdM"),
    ],
)
def test_which_layers_have_experts(values: dict, mlps: str) -> None:
    assert "".join(LETTERS[kind] for kind in read_layers(config(**values)).mlps) == mlps


def test_a_pattern_has_a_mixer_or_an_mlp_in_a_layer() -> None:
    found = read_layers(config(hybrid_override_pattern="ME*-"))
    assert found.mixers == ("linear", "none", "full", "none")
    assert found.mlps == ("none", "moe", "none", "dense")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 6 layers"),
        ({"layer_types": ["hybrid"] * 6}, "layer_types: 'hybrid' is no kind of layer known here"),
        ({"layer_types": "full"}, "layer_types='full': expected a list"),
        ({"hybrid_override_pattern": "MX"}, "hybrid_override_pattern: 'X' is no kind of layer"),
        ({"mamba_d_state": 16}, "none of layer_types, layers_block_type, hybrid_override_pattern"),
        ({"block_configs": [{}]}, "block_configs: layers that differ so are not read"),
        ({"moe_layers_enum": "1,x"}, "moe_layers='1,x': expected layer numbers"),
        ({"moe_layers": 3}, "moe_layers=3: expected layer numbers"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers=1073741824: expected a whole number <="),
        ({"num_hidden_layers": None}, "none of num_hidden_layers, num_layers, n_layer"),
    ],
)
def test_what_is_not_known_is_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_layers(config(**values))
