"""The shape of a model: layers by kind, experts, what a token caches, how many bytes weights take.

Everything comes from the published configuration. What it does not say, or says in a way that no
rule here knows, is refused by an error that names the keys looked for; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gimbal.core.errors import InputError, nearest
from gimbal.core.model.attention import MLA_LAYERS, Attention, read_attention
from gimbal.core.model.config import ModelConfig, language_model
from gimbal.core.model.experts import Experts, read_experts, require_experts
from gimbal.core.model.families import FAMILIES
from gimbal.core.model.layers import LINEAR, read_layers
from gimbal.core.model.linear import linear_parameters
from gimbal.core.model.quantization import Quantization, read_quantization
from gimbal.core.numbers import MOST_VOCABULARY, shown

ACTIVATION_BYTES = 2
"""vLLM serves in bfloat16 or float16; it casts what is stored in float32 (``--dtype auto``)."""
KV_DTYPES = {
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes of one cached number by vLLM's ``--kv-cache-dtype``; "auto" is the checkpoint's choice."""
SPARSE_FP8_BYTES = 656
"""One token in a layer of DeepSeek-V3.2: 512 values of 8 bits, 4 floats of scale, 64 rotary
channels of 16 bits (vLLM's ``fp8_ds_mla``)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A language model as vLLM serves it, speculative layers left out.

    Attributes:
        family: ``model_type``.
        layers: decoder layers.
        hidden: channels of the residual stream.
        vocabulary: tokens; 0 where the configuration does not say.
        head_copies: matrices of `vocabulary` by `hidden`: 1 where input and output share one.
        attention: the layers that cache, by kind.
        linear_layers, linear_parameters: layers that keep a state instead, and weights of one.
        experts: routed experts, shared experts and dense MLPs.
        quantization: formats of the weights and of the KV cache.
    """

    family: str
    layers: int
    hidden: int
    vocabulary: int
    head_copies: int
    attention: tuple[Attention, ...]
    linear_layers: int
    linear_parameters: int
    experts: Experts
    quantization: Quantization

    @property
    def mixers(self) -> int:
        """Layers that mix tokens, by attention or otherwise."""
        return sum(group.layers for group in self.attention) + self.linear_layers

    @property
    def expert_bytes(self) -> float:
        """Weights of one routed expert of one layer."""
        format_ = self.quantization.parts["experts"]
        return self.experts.parameters * format_.bytes_per_weight

    @property
    def weights(self) -> dict[str, int]:
        """How many weights each part has, in all layers together."""
        e = self.experts
        router = self.hidden * (e.experts + e.zero_experts)
        latent = 2 * self.hidden * e.inputs if e.inputs != self.hidden else 0
        return {
            "experts": e.layers * e.experts * e.parameters,
            "shared": e.layers * e.matrices * self.hidden * e.shared_width,
            "dense": e.dense_mlps * e.matrices * self.hidden * e.dense_width,
            "attention": sum(group.layers * group.parameters for group in self.attention),
            "linear": self.linear_layers * self.linear_parameters,
            "other": self.head_copies * self.vocabulary * self.hidden
            + e.layers * (router + latent),
        }

    @property
    def parameters(self) -> int:
        """All weights; norms, biases and what sees or hears left out."""
        return sum(self.weights.values())

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: of the vocabulary, the output matrix."""
        e = self.experts
        idle = e.layers * max(0, e.experts - e.top_k) * e.parameters
        return self.parameters - idle - (self.head_copies - 1) * self._embedding

    @property
    def _embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def other_bytes(self) -> float:
        """Weights outside the routed experts; the vocabulary and routers are never quantized."""
        parts = self.quantization.parts
        wide = self.weights["other"] * ACTIVATION_BYTES
        named = {part: count for part, count in self.weights.items() if part in parts}
        del named["experts"]
        return wide + sum(count * parts[part].bytes_per_weight for part, count in named.items())

    def kv_bytes_per_token(self, dtype: str = "auto", tp: int = 1) -> float:
        """What one token takes in the caches of all layers, windows not yet full.

        Args:
            dtype: vLLM's ``--kv-cache-dtype``.
            tp: tensor-parallel ranks; the figure is one rank's share.

        Raises InputError for a dtype not in `KV_DTYPES`.
        """
        return sum(group.layers * self.layer_kv_bytes(group, dtype, tp) for group in self.attention)

    def layer_kv_bytes(self, group: Attention, dtype: str = "auto", tp: int = 1) -> float:
        """`kv_bytes_per_token` of one layer."""
        value = self._value_bytes(dtype)
        if group.kind == MLA_LAYERS and group.index_bytes and value == 1:
            return SPARSE_FP8_BYTES + group.index_bytes
        return group.rank_values(tp) * value + group.index_bytes

    def _value_bytes(self, dtype: str) -> float:
        if dtype == "auto":
            checkpoint = self.quantization.kv_bytes
            return ACTIVATION_BYTES if checkpoint is None else checkpoint
        if dtype not in KV_DTYPES:
            raise InputError(f"unknown KV cache dtype {dtype!r}{nearest(dtype, KV_DTYPES)}")
        return KV_DTYPES[dtype]

    def remarks(self) -> Iterable[str]:
        """What a user of these figures should know."""
        if self.family and self.family not in FAMILIES:
            yield f"model_type {shown(self.family)} was not tried: read by the names of its keys"
        if not self.vocabulary:
            yield "no vocab_size: the vocabulary's weights are not counted"
        if self.linear_layers:
            yield f"{self.linear_layers} layers keep a state per request, which is not counted"
        for group in self.attention:
            if group.window_tokens and group.kind != MLA_LAYERS:
                yield (
                    f"{group.layers} layers cache the last {group.window_tokens} tokens only; "
                    "KV bytes per token count them as if they kept all"
                )
        if self.experts.zero_experts:
            yield (
                f"{self.experts.zero_experts} choices of the router compute nothing; "
                f"top_k {self.experts.top_k} counts them"
            )


def read_architecture(config: ModelConfig, cached: bool = True) -> Architecture:
    """What a configuration says; raises InputError for no MoE model, and for what is not known.

    Args:
        cached: False leaves attention out, for those to whom the KV cache does not matter.
    """
    text = language_model(config)
    require_experts(text)  # the likeliest complaint comes first
    layers = read_layers(text)
    experts = read_experts(text, layers)
    linear = layers.mixers.count(LINEAR)
    return Architecture(
        family=text.family,
        layers=len(layers.mixers),
        hidden=text.count("hidden_size"),
        vocabulary=text.count("vocab_size", default=0, most=MOST_VOCABULARY),
        head_copies=1 if text.get("tie_word_embeddings") is True else 2,
        attention=read_attention(text, layers) if cached else (),
        linear_layers=linear,
        linear_parameters=linear_parameters(text) if linear else 0,
        experts=experts,
        quantization=read_quantization(text, layers),
    )
