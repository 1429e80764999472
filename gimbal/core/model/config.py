"""The configuration in a model's folder, and the part of it that describes the language model.

vLLM reads ``config.json`` (Hugging Face) or ``params.json`` (Mistral). Models that also see or hear
keep the language model in a section of it. ModelOpt up to 0.29 keeps the quantization in
``hf_quant_config.json`` beside it. (vLLM 0.33, `vllm/transformers_utils/config.py`,
`configs/mistral.py`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.files import reading
from gimbal.core.json_text import read_object
from gimbal.core.named_yaml import packaged_names, read_named_yaml
from gimbal.core.numbers import MOST_LAYERS, shown, whole

HUGGING_FACE, MISTRAL, MODELOPT = "config.json", "params.json", "hf_quant_config.json"
SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "lm_config")
"""Under which a model that also sees or hears keeps its language model; one may hold another."""
QUANTIZATION = ("quantization_config", "compression_config")
ARCHITECTURES = {
    "LongcatFlashForCausalLM": "longcat_flash",
    "LongcatFlashNgramForCausalLM": "longcat_flash",
}
"""Model types of published configurations that name none; vLLM has the same table."""
_PACKAGED = ("gimbal.core.model", "configs")
_DEEPSEEK = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "first_k_dense_replace": 3},
    "deepseek_v32": {**_DEEPSEEK, "first_k_dense_replace": 3},
    "kimi_k2": {**_DEEPSEEK, "first_k_dense_replace": 3},
    "llama4_text": {"attention_chunk_size": 8192},
}
"""What a key that is not given means: defaults of the configuration classes (Transformers 5.19)."""
MISTRAL_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "tied_embeddings": "tie_word_embeddings",
    "quantization": "quantization_config",
}
MISTRAL_MOE_KEYS = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "route_every_n": "moe_layer_freq",
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Values of one configuration, asked for by the names that families give them.

    Attributes:
        where: what complaints call it.
    """

    values: Mapping[str, Any]
    where: str

    @property
    def family(self) -> str:
        """``model_type``; empty where none is named and the architecture does not say it."""
        named = self.values.get("model_type")
        if not named:
            classes = self.values.get("architectures")
            names = classes if isinstance(classes, list) else []
            named = next((ARCHITECTURES[n] for n in map(str, names) if n in ARCHITECTURES), "")
        return str(named)

    def get(self, *names: str) -> Any:
        """The value of the first of `names` that is given and not null; None where none is."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return None

    def count(
        self, *names: str, default: int | None = None, least: int = 1, most: int = 2**20
    ) -> int:
        """The first of `names` that is given, as a whole number from `least` to `most`.

        A list with one value per layer counts as that value where all are equal. Zero stands for
        "none of it" in many families, so where `least` is above it, it is passed over.
        Raises InputError that names every key looked for where there is none and no `default`.
        """
        for name in names:
            value = self._uniform(name)
            if value is None or (not value and least > 0):
                continue
            return whole(value, f"{self.where}: {name}=", least, most)
        if default is None:
            raise self.missing(*names)
        return default

    def _uniform(self, name: str) -> Any:
        value = self.values.get(name)
        if not isinstance(value, list):
            return value
        if len(value) > MOST_LAYERS or any(item != value[0] for item in value):
            raise InputError(f"{self.where}: {name}={shown(value)}: differs between layers")
        return value[0] if value else None

    def entries(self, *names: str) -> list[Any] | None:
        """The list under the first of `names` that is given; raises InputError for no list."""
        value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) > MOST_LAYERS:
            name = next(name for name in names if self.values.get(name) is not None)
            raise InputError(f"{self.where}: {name}={shown(value)}: expected a list, one per layer")
        return list(value)

    def section(self, name: str) -> ModelConfig:
        """The values below `name`; an empty section where it is none."""
        below = self.values.get(name)
        values = below if isinstance(below, Mapping) else {}
        return ModelConfig(values, f"{self.where}: {name}")

    def missing(self, *names: str) -> InputError:
        """The complaint that none of `names` is given."""
        looked = names[0] if len(names) == 1 else f"none of {', '.join(names)}"
        return InputError(f"{self.where}: {'no ' if len(names) == 1 else ''}{looked}")


def model_names() -> list[str]:
    """Names of the packaged configurations."""
    return packaged_names(*_PACKAGED)


def find_model(name_or_path: str) -> ModelConfig:
    """The configuration of a packaged model by name, in a folder, or in a file.

    Raises InputError for none, see `read_config`.
    """
    path = Path(name_or_path)
    with reading(name_or_path):  # a name may be too long for a file
        if path.suffix == ".json" or path.exists():
            return read_config(path)
    if "/" in name_or_path:
        raise InputError(
            f"{name_or_path}: no such folder or file; packaged models: {', '.join(model_names())}"
        )
    values = read_named_yaml("model", *_PACKAGED, name_or_path)
    return ModelConfig(values, f"model {name_or_path}")


def read_config(model: Path) -> ModelConfig:
    """The configuration in a model's folder, or in a file.

    Raises InputError for a folder without one, and for what is no JSON object.
    """
    folder, path = model, model / HUGGING_FACE
    if model.is_file() or model.suffix == ".json":
        folder, path = model.parent, model
    elif not path.exists() and (folder / MISTRAL).exists():
        path = folder / MISTRAL
    # Published configurations hold infinities where nobody looks (time_step_limit of Nemotron).
    values = read_object(path, finite=False)
    named = any(section.get(key) for section in _nested(values) for key in QUANTIZATION)
    if path.name == HUGGING_FACE and not named and (folder / MODELOPT).exists():
        values = {**values, QUANTIZATION[0]: read_object(folder / MODELOPT, finite=False)}
    return ModelConfig(values, str(path))


def language_model(config: ModelConfig) -> ModelConfig:
    """The part of `config` that describes the language model, in Hugging Face's names.

    What a section does not say of quantization, weights' dtype and classes stands around it.
    """
    sections = list(_nested(config.values))
    inherited = (*QUANTIZATION, "torch_dtype", "dtype", "tie_word_embeddings", "architectures")
    values = {
        key: section[key]
        for section in sections
        for key in inherited
        if section.get(key) is not None
    }
    text = ModelConfig({**values, **sections[-1]}, config.where)
    if "dim" in text.values:
        return _from_mistral(text)
    text = ModelConfig({**DEFAULTS.get(text.family, {}), **text.values}, config.where)
    return _from_ernie_vl(text) if _is_ernie_vl(text) else _from_dbrx(text)


def _nested(values: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """`values`, and inwards every section that holds the language model."""
    yield values
    for name in SECTIONS:
        below = values.get(name)
        if isinstance(below, Mapping) and below:
            yield from _nested(below)
            return


def _from_mistral(config: ModelConfig) -> ModelConfig:
    """``params.json`` in Hugging Face's names, as vLLM's `adapt_config_dict` renames it."""
    values = {MISTRAL_KEYS.get(key, key): value for key, value in config.values.items()}
    moe = config.section("moe").values
    if moe:
        values |= {MISTRAL_MOE_KEYS.get(key, key): value for key, value in moe.items()}
    values.setdefault("model_type", "deepseek_v3" if values.get("kv_lora_rank") else "mixtral")
    windows = values.get("sliding_window")
    if isinstance(windows, list) and windows:  # one per layer, repeated
        layers = config.count("n_layers", most=MOST_LAYERS)
        kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
        values["layer_types"] = (kinds * layers)[:layers]
        values["sliding_window"] = next((w for w in windows if w is not None), None)
    return ModelConfig(values, config.where)


def _from_dbrx(config: ModelConfig) -> ModelConfig:
    """DBRX's names and sections in those of the others."""
    if "ffn_config" not in config.values:
        return config
    feed_forward, attention = config.section("ffn_config"), config.section("attn_config")
    values = {
        **config.values,
        "hidden_size": config.get("hidden_size", "d_model"),
        "num_hidden_layers": config.get("num_hidden_layers", "n_layers"),
        "num_attention_heads": config.get("num_attention_heads", "n_heads"),
        "num_key_value_heads": attention.get("kv_n_heads"),
        "intermediate_size": feed_forward.get("ffn_hidden_size"),
        "moe_num_experts": feed_forward.get("moe_num_experts"),
        "moe_top_k": feed_forward.get("moe_top_k"),
    }
    return ModelConfig(values, config.where)


def _is_ernie_vl(config: ModelConfig) -> bool:
    return config.family.startswith("ernie") and isinstance(config.get("moe_num_experts"), list)


def _from_ernie_vl(config: ModelConfig) -> ModelConfig:
    """ERNIE-4.5-VL has experts for text and others for images; those for text come first."""
    both = {key: value for key, value in config.values.items() if key.startswith("moe_")}
    text = {key: value[0] for key, value in both.items() if isinstance(value, list) and value}
    return ModelConfig({**config.values, **text}, config.where)
