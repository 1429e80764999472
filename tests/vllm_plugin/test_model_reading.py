"""What is read from published configurations is what vLLM and Transformers read from them."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest

pytest.importorskip("vllm.config")

from transformers import AutoConfig, PreTrainedConfig
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.transformers_utils.configs.mistral import adapt_config_dict
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from gimbal.core.model import ModelConfig, count_experts, count_top_k, read_architecture
from gimbal.core.model.attention import MLA_LAYERS
from gimbal.core.model.experts import TOP_K
from scripts import models_page

NOT_COUNTED_BY_VLLM = ("databricks/dbrx-instruct",)
"""vLLM looks for experts at the top level only; its class of the model finds them."""
PER_LAYER = ("google/gemma-4-26B-A4B",)
"""Transformers makes one configuration per layer of it."""
KINDS = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
    "mamba": "linear",
    "conv": "linear",
    "moe": "moe",
}


READ = [model for model in models_page.read_table()[0] if model.name not in PER_LAYER]
published = pytest.mark.parametrize("model", READ, ids=lambda model: model.name)


def _as_vllm_has_it(values: dict[str, Any]) -> Any:
    """The configuration object that vLLM makes of a file with `values`."""
    values = deepcopy({k: v for k, v in values.items() if k != "quantization_config"})
    if "dim" in values:
        scaling = {"original_max_position_embeddings": 8192, "beta": 0.1}
        return adapt_config_dict({**values, "llama_4_scaling": scaling}, {})
    kind = values.pop("model_type", "longcat_flash")
    if "llm_config" in values:  # vLLM renames it
        values["text_config"] = AutoConfig.for_model(**values.pop("llm_config"))
    if kind in _CONFIG_REGISTRY:
        return _CONFIG_REGISTRY[kind](**values)
    try:
        return AutoConfig.for_model(kind, **values)
    except ValueError:  # a class that comes with the checkpoint
        return PreTrainedConfig(model_type=kind, **values)


@published
def test_vllm_reads_the_same(model: Any) -> None:
    config = _as_vllm_has_it(dict(model.config.values))
    text = config.get_text_config()
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    theirs, ours = convertor(config, text), read_architecture(model.config)
    if model.name not in NOT_COUNTED_BY_VLLM:
        assert theirs.get_num_experts() == count_experts(model.config)
        assert theirs.get_num_experts_per_token() == count_top_k(model.config)
    assert theirs.get_num_hidden_layers() == ours.layers
    assert theirs.get_vocab_size() == ours.vocabulary
    assert theirs.is_deepseek_mla() == (ours.attention[0].kind == MLA_LAYERS)
    latent = ours.attention[0].kind == MLA_LAYERS
    full = theirs.get_head_size() * (1 if latent else theirs.get_total_num_kv_heads())
    values = ours.attention[0].cached_values
    assert values == full if latent else values <= 2 * full  # values may be narrower than keys


@published
def test_transformers_derives_the_same_layers(model: Any) -> None:
    text = _as_vllm_has_it(dict(model.config.values)).get_text_config()
    types = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    if types is None:
        pytest.skip("Transformers has no list of this family's layers")
    ours = read_architecture(model.config)
    kinds = Counter({"linear": ours.linear_layers})
    for group in ours.attention:
        kinds["full" if group.kind == MLA_LAYERS else group.kind] += group.layers
    theirs = Counter(KINDS[kind] for kind in types if KINDS[kind] != "moe")
    assert +kinds == theirs


@published
def test_a_live_configuration_object_has_the_top_k(model: Any) -> None:
    """As the placement hook asks for it, of the object that vLLM holds."""
    text = _as_vllm_has_it(dict(model.config.values)).get_text_config()
    if model.name in NOT_COUNTED_BY_VLLM:
        pytest.skip("its experts are in a section")
    assert any(name in vars(text) for name in TOP_K)
    assert count_top_k(ModelConfig(vars(text), "live")) == model.values["experts"][1]
