"""An estimated profile for a model and a GPU nobody measured, from config.json and a data sheet.

Roofline with the efficiencies that the measured H100 tables show: 0.85 of memory bandwidth, 0.72
of dense bf16 FLOP/s, 0.75 of link bandwidth, and 5 us per kernel. Expect tens of percent of error,
more on small steps, where launches and the host decide; `gimbal calibrate` replaces the guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gimbal.core.cost.profile import (
    AttentionTerm,
    Interconnect,
    Layout,
    ModelShape,
    MoeTerm,
    Profile,
    Term,
    load_profile,
)
from gimbal.core.errors import InputError, nearest
from gimbal.core.numbers import MOST_EXPERTS, MOST_LAYERS, MOST_VOCABULARY, shown, whole

MEMORY, COMPUTE, LINK = 0.85, 0.72, 0.75
KERNEL_US = 5.0
MOE_NORM = 2.0
BF16_BYTES = 2
SAMPLER_US = 150.0
HOST_PROFILE = "h100-qwen3-30b-a3b"
"""Whose host times an estimate takes: no data sheet says them."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data-sheet figures of one GPU: GB/s, dense bf16 TFLOP/s, GB, and GB/s per direction."""

    memory_gbps: float
    tflops: float
    memory_gb: float
    link_gbps: float
    other_node_gbps: float = 50.0


GPUS = {
    "a100": Gpu(2039, 312, 80, 300),
    "h100": Gpu(3350, 989, 80, 450),
    "h200": Gpu(4800, 989, 141, 450),
    "b200": Gpu(8000, 2250, 180, 900, 100),
    "l40s": Gpu(864, 362, 48, 32),
}
"""Vendor data sheets, SXM where there is one; dense rates without sparsity."""


EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Under which a Hugging Face configuration counts its experts, by family."""


def model_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """What a Hugging Face configuration fixes; raises InputError when it is no MoE model's."""
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: expected an object, got {shown(config)}")
    if not any(config.get(key) for key in EXPERT_KEYS):
        raise InputError(f"{where}: none of {', '.join(EXPERT_KEYS)}: not a MoE model")
    _, kv_heads, head_dim = _attention_heads(config, where)
    hidden = _size(config, where, ("hidden_size",))
    layers = _size(config, where, ("num_hidden_layers",), most=MOST_LAYERS)
    dense = _size(config, where, ("first_k_dense_replace",), 0, least=0, most=layers - 1)
    # Models without dense layers (Mixtral) have one width only.
    width = _size(config, where, ("moe_intermediate_size", "intermediate_size"))
    return ModelShape(
        layers=layers - dense,
        experts=_size(config, where, EXPERT_KEYS, most=MOST_EXPERTS),
        top_k=_size(config, where, ("num_experts_per_tok",), most=MOST_EXPERTS),
        hidden=hidden,
        expert_bytes=3 * hidden * width * BF16_BYTES,
        kv_bytes_per_token=layers * 2 * kv_heads * head_dim * BF16_BYTES,
    )


def _attention_heads(config: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Query heads, key/value heads, channels of one."""
    heads = _size(config, where, ("num_attention_heads",))
    kv_heads = _size(config, where, ("num_key_value_heads",), heads)
    narrow = max(1, _size(config, where, ("hidden_size",)) // heads)
    return heads, kv_heads, _size(config, where, ("head_dim",), narrow)


def _size(
    config: Mapping[str, Any],
    where: str,
    keys: Sequence[str],
    default: int | None = None,
    least: int = 1,
    most: int = 2**20,
) -> int:
    """The first of `keys` that says something, as a whole number; raises InputError."""
    for key in keys:
        if config.get(key):
            return whole(config[key], f"{where}: {key}=", least, most)
    if default is None:
        raise InputError(f"{where}: no {keys[0]}")
    return default


@dataclass(frozen=True, slots=True)
class _Roofline:
    """What kernels of one GPU can be expected to reach."""

    flop_per_us: float
    byte_per_us: float
    link_per_us: float
    source: str

    def gemm(self, inputs: int, outputs: float) -> Term:
        flops, weights = 2.0 * inputs * outputs, inputs * outputs * BF16_BYTES
        floor = KERNEL_US + weights / self.byte_per_us
        return Term(flops / self.flop_per_us, KERNEL_US, floor, self.source)

    def elementwise(self, bytes_per_token: float) -> Term:
        return Term(bytes_per_token / self.byte_per_us, 2 * KERNEL_US, 0.0, self.source)

    def transfer(self, bytes_per_token: float) -> Term:
        return Term(bytes_per_token / self.link_per_us, KERNEL_US, 0.0, self.source)

    def attention(self, width: float, kv_bytes_per_token: float) -> AttentionTerm:
        """Args: width, channels of all heads; kv_bytes_per_token, both of one layer of one rank."""
        kv_us = kv_bytes_per_token / self.byte_per_us
        return AttentionTerm(
            floor_us=2 * KERNEL_US,
            base_us=2 * KERNEL_US,
            per_decode_kv_token_us=kv_us,
            per_mixed_decode_kv_token_us=kv_us,
            per_prefill_pair_us=4.0 * width / self.flop_per_us,
            per_prefill_kv_token_us=kv_us,
            source=self.source,
        )

    def moe(self, model: ModelShape) -> MoeTerm:
        flops = 2.0 * model.expert_bytes / BF16_BYTES  # a multiplication and an addition each
        return MoeTerm(
            base_us=5 * KERNEL_US,
            per_active_expert_us=model.expert_bytes / self.byte_per_us,
            per_pair_us=flops / self.flop_per_us,
            per_group_token_us=3 * model.top_k * model.hidden * BF16_BYTES / self.byte_per_us,
            norm=MOE_NORM,
            source=self.source,
        )


def derive_profile(
    name: str, config: Mapping[str, Any], gpu: str, layout: Layout, where: str = "config.json"
) -> Profile:
    """The estimate for a model on `layout.ep` GPUs called `gpu`; raises InputError.

    The result says ``estimated: true``, and so does every term. What the host takes and how far
    CUDA graphs reach are those of the measured H100 profile.
    """
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu!r}{nearest(gpu, GPUS)}")
    sheet, model = GPUS[gpu], model_shape(config, where)
    source = f"estimate: roofline of the {gpu} data sheet"
    link_per_us = sheet.link_gbps * 1e3 * LINK
    flop_per_us, byte_per_us = sheet.tflops * 1e6 * COMPUTE, sheet.memory_gbps * 1e3 * MEMORY
    roofline = _Roofline(flop_per_us, byte_per_us, link_per_us, source)
    tp, hidden, token_bytes = layout.tp, model.hidden, model.hidden * BF16_BYTES
    heads, kv_heads, head_dim = _attention_heads(config, where)
    per_rank = [
        roofline.gemm(hidden, (heads + 2 * kv_heads) * head_dim / tp),
        roofline.gemm(hidden, heads * head_dim / tp),
        roofline.gemm(hidden, model.experts),
        roofline.elementwise(10 * token_bytes),
    ]
    if tp > 1:
        per_rank += [roofline.transfer(2 * token_bytes * (tp - 1) / tp)]
    gathers = 2 if layout.ep > 1 else 0  # dispatch and combine
    kv_layer = 2 * kv_heads * head_dim * BF16_BYTES / tp
    vocabulary = _size(config, where, ("vocab_size",), 0, most=MOST_VOCABULARY)
    head_us = vocabulary * token_bytes / tp / byte_per_us
    weights = model.layers * model.experts / layout.ep * model.expert_bytes
    free = max(0.0, sheet.memory_gb * 1e9 * 0.9 - 1.15 * weights)
    return replace(
        load_profile(HOST_PROFILE),
        name=name,
        machine=f"{layout.ep}x {gpu}",
        model=model,
        layout=layout,
        per_rank_token=tuple(per_rank),
        per_group_token=(roofline.transfer(token_bytes),) * gathers,
        attention=roofline.attention(heads * head_dim / tp, kv_layer),
        moe=roofline.moe(model),
        per_step=(Term(0.3, head_us + SAMPLER_US, 0.0, source),),
        interconnect=Interconnect(
            link_per_us, sheet.other_node_gbps * 1e3 * LINK, link_per_us, 15_000.0, source
        ),
        kv_tokens=int(free / (model.kv_bytes_per_token / tp)),
        estimated=True,
        notes=("an estimate: measure with gimbal calibrate before trusting absolute times",),
    )
