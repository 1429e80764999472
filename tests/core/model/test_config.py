"""Which file of a folder is read, which part of it, and under which names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gimbal.core.errors import InputError
from gimbal.core.model import ModelConfig, count_experts, count_top_k, language_model, read_config

DENSE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {**DENSE, "num_experts": 16, "num_experts_per_tok": 2}


def config(**values: object) -> ModelConfig:
    return ModelConfig(values, "config.json")


def write(folder: Path, name: str, values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_config_json_comes_before_params_json(tmp_path: Path) -> None:
    write(tmp_path, "params.json", {"dim": 8})
    assert read_config(tmp_path).values == {"dim": 8}
    write(tmp_path, "config.json", MOE)
    assert read_config(tmp_path).values == MOE
    assert read_config(tmp_path).where == str(tmp_path / "config.json")


def test_modelopt_keeps_quantization_beside(tmp_path: Path) -> None:
    write(tmp_path, "config.json", MOE)
    write(tmp_path, "hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    found = read_config(tmp_path).get("quantization_config")
    assert found == {"quantization": {"quant_algo": "FP8"}}
    own = {"quant_method": "fp8"}
    write(tmp_path, "config.json", {"text_config": {**MOE, "quantization_config": own}})
    assert language_model(read_config(tmp_path)).get("quantization_config") == own


def test_an_infinity_where_nobody_looks_is_no_error(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {**MOE, "time_step_limit": [0.0, float("inf")]})
    assert count_experts(read_config(tmp_path)) == 16
    write(tmp_path, "config.json", {**MOE, "num_experts_per_tok": float("inf")})
    with pytest.raises(InputError, match=r"num_experts_per_tok='Infinity': expected a whole"):
        count_top_k(read_config(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{\n oops", r"config\.json:2: not JSON"),
        (None, "no such file"),
    ],
)
def test_a_folder_without_a_configuration(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"text_config": MOE},
        {"llm_config": MOE},
        {"language_config": MOE},
        {"thinker_config": {"text_config": MOE, "audio_config": {}}},
        {"text_config": MOE, "talker_config": {"text_config": {"num_experts": 4}}},
        {**DENSE, "text_config": MOE},
    ],
)
def test_the_language_model_is_found_below(values: dict) -> None:
    assert language_model(ModelConfig(values, "c")).values.items() >= MOE.items()
    assert count_experts(ModelConfig(values, "c")) == 16


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"num_local_experts": 8}, 8),
        ({"n_routed_experts": 64}, 64),
        ({"moe_num_experts": [64, 64]}, 64),
        ({"num_experts": [16, 16]}, 16),
        ({"block_configs": [{"block_type": "moe", "n_routed_experts": 96}, {}]}, 96),
        ({}, 0),
        ({"num_experts": 1}, 0),
        ({"num_experts": None, "enable_moe_block": False}, 0),
        ({"num_expert_group": 4}, None),
        ({"mixture": {"moe": {"count": 64}}}, None),
    ],
)
def test_experts_are_counted_or_not_known(values: dict, count: int | None) -> None:
    assert count_experts(config(**DENSE, **values)) == count


def test_no_language_model_is_not_known_either() -> None:
    assert count_experts(config(audio_config={"hidden_size": 8})) is None
    assert count_experts(config(num_attention_heads=8)) == 0


@pytest.mark.parametrize(
    "name",
    [
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "moe_k",
    ],
)
def test_top_k_under_every_name(name: str) -> None:
    assert count_top_k(config(**DENSE, num_experts=16, **{name: 3})) == 3


def test_complaints_name_every_key_looked_for() -> None:
    with pytest.raises(InputError, match=r"config\.json: none of num_experts_per_tok, .*moe_k$"):
        count_top_k(config(**DENSE, num_experts=16))
    with pytest.raises(InputError, match=r"config\.json: no hidden_size$"):
        config().count("hidden_size")
    with pytest.raises(InputError, match=r"moe_topk=.*: differs between layers"):
        config(moe_topk=[1, 2]).count("moe_topk")
    with pytest.raises(InputError, match="hidden_size=-3: expected a whole number >= 1"):
        config(hidden_size=-3).count("hidden_size")
