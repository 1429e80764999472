"""Bytes per weight by method, and which parts keep 16 bits."""

from __future__ import annotations

from typing import Any

import pytest

from gimbal.core.errors import InputError
from gimbal.core.model import ModelConfig
from gimbal.core.model.layers import Layers
from gimbal.core.model.quantization import Quantization, read_quantization

LAYERS = Layers(("full",) * 6, ("dense", *("moe",) * 5))


def read(values: Any, layers: Layers = LAYERS, **besides: Any) -> Quantization:
    config = ModelConfig({"quantization_config": values, **besides}, "config.json")
    return read_quantization(config, layers)


def group(bits: int, kind: str, size: int | None, **more: Any) -> dict:
    weights = {"num_bits": bits, "type": kind, "group_size": size, "symmetric": True, **more}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        (None, 16),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, 8),
        ({"qformat_weight": "fp8_e4m3"}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 64}, 2 + 18 / 64),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "MXFP8"}}, 8.25),
        ({"quant_method": "compressed-tensors", **group(4, "int", 32)}, 4.5),
        ({"quant_method": "compressed_tensors", **group(4, "int", 32, symmetric=False)}, 4.625),
        ({"quant_method": "compressed-tensors", **group(8, "int", None)}, 8),
        ({"quant_method": "compressed-tensors", **group(8, "float", None)}, 8),
        ({"quant_method": "compressed-tensors", **group(4, "float", 16)}, 4.5),
        ({"quant_method": "compressed-tensors", **group(4, "float", 32)}, 4.25),
        (
            {
                "quant_method": "compressed-tensors",
                **group(8, "float", None, block_structure=[128, 128]),
            },
            8 + 32 / 128**2,
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}},
            },
            4.25,
        ),
    ],
)
def test_bits_of_an_expert_weight(values: Any, bits: float) -> None:
    assert read(values).parts["experts"].bytes_per_weight * 8 == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("excluded", "wide"),
    [
        ([], ""),
        (["lm_head", "gate", "model.layers.0.mlp.gate", "mlp.router"], ""),
        (["model.layers.*.self_attn"], "attention"),
        (["self_attn"], "attention"),
        (["model.layers.3.self_attn*", "model.layers.4.self_attn*"], "attention"),
        (["model.layers.1.self_attn*"], ""),  # the layer in the middle is another
        (["re:.*self_attn.*", "re:.*mlp\\.(gate|up|down)_proj.*"], "attention dense"),
        (["model.layers.0*"], "dense"),
        (["*.mlp.shared_expert.*"], "shared"),
        (["re:.*experts.*"], "experts shared"),
        (["language_model.model.layers.3.block_sparse_moe.experts"], "experts"),
        (["mlp"], "experts shared dense"),
    ],
)
@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert", "exclude_modules"])
def test_parts_left_out_keep_16_bits(excluded: list[str], wide: str, key: str) -> None:
    parts = read({"quant_method": "fp8", key: excluded}).parts
    kept = {name for name, format_ in parts.items() if format_.bytes_per_weight == 2}
    assert kept - {"linear"} == set(wide.split())


def test_a_group_of_its_own_for_the_experts() -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}},
        "group_1": {
            "targets": ["re:.*mlp.experts.*"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 32},
        },
    }
    parts = read({"quant_method": "compressed-tensors", "config_groups": groups}).parts
    assert (parts["experts"].name, parts["attention"].name) == ("mxfp4", "fp8")


def test_mixed_precision_names_its_layers() -> None:
    layers = {
        "model.layers.3.mlp.experts.0.up_proj": {"quant_algo": "NVFP4"},
        "model.layers.3.self_attn.q_proj": {"quant_algo": "FP8"},
    }
    values = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
    }
    parts = read(values).parts
    names = [parts[part].name for part in ("experts", "attention", "shared")]
    assert names == ["nvfp4", "fp8", "bf16"]


def test_each_part_is_looked_up_where_it_is() -> None:
    layers = Layers(("full", "none", "full", "none"), ("none", "moe", "none", "moe"))
    excluded = ["backbone.layers.2.mixer.q_proj", "backbone.layers.0.mixer.q_proj"]
    parts = read({"quant_method": "fp8", "ignore": excluded}, layers).parts
    assert (parts["attention"].name, parts["experts"].name) == ("bf16", "fp8")


@pytest.mark.parametrize(
    ("values", "kv_bytes"),
    [
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, 1.0),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, None),
        ({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 1.0),
        ({"quant_method": "fp8", "kv_cache_scheme": None}, None),
    ],
)
def test_the_checkpoint_may_choose_the_kv_cache(values: dict, kv_bytes: float | None) -> None:
    assert read(values).kv_bytes == kv_bytes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_X"}, "quant_algo='W4A8_X'"),
        ({"quant_method": "quark"}, "weight.dtype='None'"),
        ({"quant_method": "gptq"}, "quantization_config: no bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=.* two sizes"),
        ({"quant_method": "fp8", "ignore": ["re:("]}, r"'re:\(': .*unterminated"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {}}},
            "config_groups: g: weights: no num_bits",
        ),
        ("fp8", "quantization_config: expected an object"),
    ],
)
def test_what_is_not_known_is_refused(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(values)


def test_a_pattern_made_to_take_for_ever_is_refused() -> None:
    with pytest.raises(InputError, match="too many wildcards"):
        read({"quant_method": "fp8", "ignore": ["re:" + "(.*)*" * 20 + "x"]})
