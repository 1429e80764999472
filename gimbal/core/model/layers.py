"""What each layer of a model is: how it mixes tokens, and whether its MLP has experts.

Families say it by a list, a pattern or a rule of their own. Rules follow vLLM's model classes
(`vllm/model_executor/models`, 0.33) and the configuration classes of Transformers 5.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.model.config import ModelConfig
from gimbal.core.numbers import MOST_LAYERS, as_whole, shown

FULL, SLIDING, LINEAR, NONE = "full", "sliding", "linear", "none"
MOE, DENSE = "moe", "dense"

LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
TYPES = {
    "full_attention": FULL,
    "attention": FULL,
    "indexed_attention": FULL,
    "deepseek_sparse_attention": FULL,
    "qwen_sparse_attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": SLIDING,
    "linear_attention": LINEAR,
    "mamba": LINEAR,
    "conv": LINEAR,
    "moe": MOE,
    "mlp": DENSE,
}
"""``layer_types`` and ``layers_block_type``. A model that names "moe" or "mlp" among them has
either a mixer or an MLP in a layer, the others have both."""
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_num_skipped")
PATTERN = {"M": LINEAR, "*": FULL, "-": DENSE, "E": MOE}
"""``hybrid_override_pattern`` of Nemotron-H."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What the layers are, first to last.

    Attributes:
        mixers: FULL, SLIDING, LINEAR or NONE, one per layer.
        mlps: MOE, DENSE or NONE, one per layer.
    """

    mixers: tuple[str, ...]
    mlps: tuple[str, ...]


def read_layers(config: ModelConfig) -> Layers:
    """The layers of a language model; raises InputError for a kind of layer not known here."""
    for name in ("block_configs", "use_cla"):
        if config.get(name):
            raise InputError(f"{config.where}: {name}: layers that differ so are not read")
    kinds = _listed(config)
    if kinds is not None and not {MOE, DENSE}.isdisjoint(kinds):
        return Layers(
            tuple(NONE if kind in (MOE, DENSE) else kind for kind in kinds),
            tuple(kind if kind in (MOE, DENSE) else NONE for kind in kinds),
        )
    count = layer_count(config) if kinds is None else len(kinds)
    mixers = kinds or [_mixer_rule(config, count)(layer) for layer in range(count)]
    sparse = _sparse_layers(config, count)
    return Layers(tuple(mixers), tuple(MOE if is_moe else DENSE for is_moe in sparse))


def layer_count(config: ModelConfig) -> int:
    """Decoder layers, speculative ones left out."""
    # LongCat's num_hidden_layers counts attention sublayers where Transformers wrote it.
    names = ("num_layers", *LAYERS) if config.family.startswith("longcat") else LAYERS
    return config.count(*names, most=MOST_LAYERS)


def _listed(config: ModelConfig) -> list[str] | None:
    """One kind per layer, where the configuration lists them."""
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and len(pattern) <= MOST_LAYERS:
        return [_known(config, PATTERN, "hybrid_override_pattern", letter) for letter in pattern]
    types = config.entries("layers_block_type", "layer_types")
    if types is not None:
        name = "layers_block_type" if config.get("layers_block_type") else "layer_types"
        # Step's list covers its speculative layers too. Nemotron-H counts layers by the list.
        count = len(types) if "moe" in types or "mlp" in types else layer_count(config)
        return [_known(config, TYPES, name, kind) for kind in _covering(config, name, types, count)]
    for name, kinds in (
        ("attn_type_list", {0: LINEAR, 1: FULL}),  # MiniMax-01 and M1
        ("hybrid_layer_pattern", {0: FULL, 1: SLIDING}),  # MiMo-V2
    ):
        values = config.entries(name)
        if values is not None:
            covered = _covering(config, name, values, layer_count(config))
            return [_known(config, kinds, name, value) for value in covered]
    return None


def _covering(config: ModelConfig, name: str, values: Sequence[object], count: int) -> list[object]:
    if len(values) < count:
        raise InputError(f"{config.where}: {name} has {len(values)} entries for {count} layers")
    return list(values[:count])


def _known(config: ModelConfig, kinds: Mapping[Any, str], name: str, value: object) -> str:
    for known, kind in kinds.items():
        if value == known:
            return kind
    raise InputError(f"{config.where}: {name}: {shown(value)} is no kind of layer known here")


def _mixer_rule(config: ModelConfig, count: int) -> Callable[[int], str]:
    """How a layer mixes tokens, for configurations that do not list it."""
    linear = config.section("linear_attn_config")
    if linear.values:  # Kimi-Linear counts layers from 1
        full = linear.entries("full_attn_layers")
        if full is None:
            raise linear.missing("full_attn_layers")
        return lambda layer: FULL if layer + 1 in full else LINEAR
    if config.get("linear_num_value_heads"):  # Qwen3-Next: Transformers' default is 4
        every = config.count("full_attention_interval", default=4, most=MOST_LAYERS)
        return lambda layer: LINEAR if (layer + 1) % every else FULL
    if config.get("attn_layer_period"):  # Jamba
        every = config.count("attn_layer_period", most=MOST_LAYERS)
        offset = config.count("attn_layer_offset", least=0, most=every - 1)
        return lambda layer: FULL if layer % every == offset else LINEAR
    if config.get("layer_group_size"):  # Ring-linear; Ling 3 has no linear layer behind the groups
        every = config.count("layer_group_size", most=MOST_LAYERS)
        grouped = count - count % every if _is_ling3(config) else count
        return lambda layer: LINEAR if (layer + 1) % every and layer < grouped else FULL
    if config.get("full_attn_idxs"):  # LFM2
        attention = config.entries("full_attn_idxs")
        return lambda layer: FULL if layer in (attention or ()) else LINEAR
    if _unlisted_hybrid(config):
        raise config.missing("layer_types", "layers_block_type", "hybrid_override_pattern")
    return _window_rule(config)


def _is_ling3(config: ModelConfig) -> bool:
    return bool(config.get("architectures") == ["BailingMoeV3ForCausalLM"])


def _unlisted_hybrid(config: ModelConfig) -> bool:
    """Whether keys speak of layers without attention, and none says which layers those are."""
    return any(name.startswith(("mamba_", "ssm_", "linear_attn")) for name in config.values)


def _window_rule(config: ModelConfig) -> Callable[[int], str]:
    """Which layers look back over a window only."""
    if config.family.startswith("llama4"):
        if not config.get("attention_chunk_size"):
            return lambda layer: FULL
        without_rope = config.entries("no_rope_layers")
        if without_rope:  # 1: rotary and chunked
            return lambda layer: SLIDING if without_rope[layer % len(without_rope)] else FULL
        every = config.count("no_rope_layer_interval", default=4, most=MOST_LAYERS)
        return lambda layer: SLIDING if (layer + 1) % every else FULL
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return lambda layer: FULL
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:  # EXAONE: LLLG
        return lambda layer: SLIDING if pattern[layer % len(pattern)] == "L" else FULL
    if pattern or config.get("global_attn_every_n_layers"):
        names = ("sliding_window_pattern", "global_attn_every_n_layers")
        every = config.count(*names, most=MOST_LAYERS)
        return lambda layer: SLIDING if (layer + 1) % every else FULL
    if config.get("max_window_layers") is not None:
        first = config.count("max_window_layers", least=0, most=MOST_LAYERS)
        return lambda layer: SLIDING if layer >= first else FULL
    return lambda layer: SLIDING


def _sparse_layers(config: ModelConfig, count: int) -> list[bool]:
    """Whether each layer has experts."""
    listed = config.entries("mlp_layer_types")
    if listed is not None:
        return [kind == "sparse" for kind in _covering(config, "mlp_layer_types", listed, count)]
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):  # MiMo-V2: one flag per layer
        return [bool(flag) for flag in _covering(config, "moe_layer_freq", frequency, count)]
    named = config.get("moe_layers_enum", "moe_layers")  # Step, Llama-4
    if named is None and config.family.startswith("step3") and not config.get(DENSE_FIRST[0]):
        named = list(range(1, count))  # vLLM: all but the first
    if named is not None:
        parts = named.split(",") if isinstance(named, str) else named
        numbers = {as_whole(n) for n in parts} if isinstance(parts, list) else {None}
        if None in numbers:
            raise InputError(f"{config.where}: moe_layers={shown(named)}: expected layer numbers")
        return [layer in numbers for layer in range(count)]
    is_moe = _sparse_rule(config, count)
    return [is_moe(layer) for layer in range(count)]


def _sparse_rule(config: ModelConfig, count: int) -> Callable[[int], bool]:
    if config.get("expert_layer_period"):  # Jamba
        every = config.count("expert_layer_period", most=MOST_LAYERS)
        offset = config.count("expert_layer_offset", least=0, most=every - 1)
        return lambda layer: layer % every == offset
    if config.get("moe_layer_start_index", "moe_layer_interval") is not None:  # ERNIE
        first = config.count("moe_layer_start_index", default=0, least=0, most=count)
        last = config.count("moe_layer_end_index", default=count - 1, least=-1, most=MOST_LAYERS)
        last = count - 1 if last < 0 else last
        every = config.count("moe_layer_interval", default=1, most=MOST_LAYERS)
        return lambda layer: first <= layer <= last and (layer + 1) % every == 0
    step = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_frequency")
    if config.get(*step) is not None:  # Qwen, Llama-4, Arctic
        every = config.count(*step, most=MOST_LAYERS)
        dense = config.entries("mlp_only_layers") or []
        return lambda layer: (layer + 1) % every == 0 and layer not in dense
    dense_first = config.count(*DENSE_FIRST, default=0, least=0, most=count)
    every = config.count("moe_layer_freq", default=1, most=MOST_LAYERS)
    listed = config.entries("mlp_only_layers") or []
    return lambda layer: layer >= dense_first and layer % every == 0 and layer not in listed
