"""Routed experts, what stands beside them in every MoE layer, and the MLPs of dense layers.

Key names: vLLM's `get_num_experts` and `get_num_experts_per_token` (0.33,
`vllm/transformers_utils/model_arch_config_convertor.py`) and its model classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.model.config import ModelConfig, language_model
from gimbal.core.model.layers import DENSE, LAYERS, MOE, Layers
from gimbal.core.numbers import MOST_EXPERTS, as_whole

EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_hidden_dim")
DENSE_WIDTH = (
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "intermediate_size",
    "ffn_hidden_size",
)
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "share_expert_dim",
    "shared_intermediate_size",
)
"""Of all shared experts together."""
ONE_SHARED_WIDTH = "moe_shared_expert_intermediate_size"
NARROW_INPUT = ("moe_latent_size", "routed_expert_hidden_size")
BESIDE = ("gemma4_text", "arctic")
"""Families with a dense MLP beside the experts of every MoE layer."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The MLPs of a model.

    Attributes:
        layers: how many have routed experts.
        experts, top_k: of one of these.
        inputs, width: channels into one expert, and its intermediate ones.
        matrices: weight matrices of one MLP; 3 with a gate, 2 without.
        shared_width: intermediate channels of the shared experts together; 0 without any.
        zero_experts: choices of the router that compute nothing (LongCat).
        dense_mlps: in the whole model.
        dense_width: intermediate channels of one.
    """

    layers: int
    experts: int
    top_k: int
    inputs: int
    width: int
    matrices: int
    shared_width: int
    zero_experts: int
    dense_mlps: int
    dense_width: int

    @property
    def parameters(self) -> int:
        """Weights of one routed expert."""
        return self.matrices * self.inputs * self.width


def require_experts(config: ModelConfig) -> int:
    """`count_experts`; raises InputError that names the keys looked for where there are none."""
    experts = count_experts(config)
    if not experts:
        raise InputError(f"{config.where}: none of {', '.join(EXPERTS)}: not a MoE model")
    return experts


def read_experts(config: ModelConfig, layers: Layers) -> Experts:
    """The MLPs of a language model; raises InputError where it has no experts."""
    experts = require_experts(config)
    hidden, sparse = config.count("hidden_size"), layers.mlps.count(MOE)
    if not sparse:
        raise InputError(f"{config.where}: {experts} experts, and none of the layers has any")
    width = config.count(*WIDTH, "intermediate_size")
    dense = layers.mlps.count(DENSE)
    if config.family.startswith("longcat"):
        dense = 2 * sparse  # beside the experts, one after each attention
    elif config.family in BESIDE:
        dense += sparse
    return Experts(
        layers=sparse,
        experts=experts,
        top_k=count_top_k(config),
        inputs=config.count(*NARROW_INPUT, default=hidden),
        width=width,
        matrices=2 if config.family.startswith("nemotron_h") else 3,  # relu2 has no gate
        shared_width=_shared_width(config, width),
        zero_experts=config.count("zero_expert_num", default=0, least=0, most=MOST_EXPERTS),
        dense_mlps=dense,
        dense_width=config.count(*DENSE_WIDTH) if dense else 0,
    )


def _shared_width(config: ModelConfig, width: int) -> int:
    together = config.count(*SHARED_WIDTH, default=0)
    if together:
        return together
    default = 1 if config.family.startswith("llama4") else 0  # it has one, and no key for it
    return config.count(*SHARED, default=default) * config.count(ONE_SHARED_WIDTH, default=width)


def count_experts(config: ModelConfig) -> int | None:
    """Routed experts of one layer.

    0: a dense model, a language model whose configuration speaks of no experts. None: it cannot
    be told, because no language model is found, or experts are spoken of under other names.
    """
    text = language_model(config)
    counts = [_number(text.values.get(name)) for name in EXPERTS]
    blocks = text.get("block_configs")  # Nemotron: the largest of unequal layers
    if isinstance(blocks, list):
        counts += [_number(b.get("n_routed_experts")) for b in blocks if isinstance(b, Mapping)]
    largest = max((count for count in counts if count), default=0)
    if largest > 1:
        return largest
    found = text.get("hidden_size", "num_attention_heads", *LAYERS) is not None
    return 0 if found and not _speaks_of_experts(config.values) else None


def _number(value: Any) -> int:
    number = as_whole(value[0] if isinstance(value, list) and value else value)
    return number if number is not None and 0 < number <= MOST_EXPERTS else 0


def _speaks_of_experts(value: Any) -> bool:
    """Whether any key at any depth names experts, and says more than none or one of them."""
    if isinstance(value, Mapping):
        return any(
            (("expert" in key or "moe" in key) and _says_something(below))
            or _speaks_of_experts(below)
            for key, below in value.items()
        )
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and any(map(_speaks_of_experts, value))
    )


def _says_something(value: Any) -> bool:
    return bool(value) and value is not True and value not in (1, 1.0)


def count_top_k(config: ModelConfig) -> int:
    """Experts that one token goes to; raises InputError that names the keys looked for."""
    return language_model(config).count(*TOP_K, most=MOST_EXPERTS)
