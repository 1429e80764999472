"""What a kernel takes on a GPU that nobody measured: by data sheet, as efficient as on an H100.

The packaged H100 profiles are fitted to measured kernels of Qwen3-30B-A3B. What they take over what
the data sheet says they could take is an efficiency per kind of kernel, which carries over to other
sizes, weights and GPUs; what a kernel takes however little it has to do carries over as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from gimbal.core.cost.profile import Term, load_profile
from gimbal.core.model import Architecture, find_model, read_architecture
from gimbal.core.model.architecture import ACTIVATION_BYTES
from gimbal.core.model.quantization import BF16, Format

MODEL, GPU = "qwen3-30b-a3b", "h100"
ONE_RANK, SEVERAL_RANKS = "h100-qwen3-30b-a3b-tp1", "h100-qwen3-30b-a3b"
"""Profiles of measured kernels, of `MODEL` on `GPU`."""
SMALL_CHANNELS = 10
"""Hidden states that a layer's norms, rotation and KV write move."""
ROUTED_LINK = 0.55
"""Of NVLink: 240 to 270 of 450 GB/s (AIConfigurator's DeepEP tables, H100, eight GPUs)."""
ROUTED_US = 14.0
"""A dispatch or a combine of one token (the same tables)."""
OTHER_NODE_US = 10.0
"""A hop to another node (AIConfigurator's ``p2p_latency``)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data-sheet figures of one GPU: GB/s, dense TFLOP/s, GB, and GB/s per direction.

    Attributes:
        tflops: in bf16.
        memory_gb: what its driver says there is, in 1e9 bytes.
        fp8_tflops, fp4_tflops: 0 where the GPU does not multiply in that format.
    """

    memory_gbps: float
    tflops: float
    memory_gb: float
    link_gbps: float
    other_node_gbps: float = 50.0
    fp8_tflops: float = 0.0
    fp4_tflops: float = 0.0

    def flop_per_us(self, format_: Format) -> float:
        """What weights of this format can be multiplied at; in the next wider one where the GPU
        lacks it (vLLM's weight-only kernels)."""
        by_bits = ((4, self.fp4_tflops), (8, self.fp8_tflops), (16, self.tflops))
        fitting = (rate for bits, rate in by_bits if bits >= format_.activation_bits and rate)
        return next(fitting) * 1e6

    @property
    def byte_per_us(self) -> float:
        return self.memory_gbps * 1e3


GPUS = {
    "a100": Gpu(2039, 312, 85.9, 300),
    "h100": Gpu(3350, 989, 85.5, 450, fp8_tflops=1979),
    "h200": Gpu(4800, 989, 150.7, 450, fp8_tflops=1979),
    "b200": Gpu(8000, 2250, 192.2, 900, 100, fp8_tflops=4500, fp4_tflops=9000),
    "l40s": Gpu(864, 362, 48.3, 32, fp8_tflops=733),
}
"""Vendor data sheets, SXM where there is one; dense rates without sparsity."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Measured time over that of the data sheet, by kind of kernel; and fixed times.

    Attributes:
        stream, multiply: weights read, and multiplied with many tokens, by a GEMM.
        gemm_us, gemm_floor_us: a GEMM's offset, and the least that one takes.
        small, small_us: norms, rotation, KV write.
        tensor, tensor_us: collectives of one layer within a tensor-parallel group.
        gather, gather_us: one all-gather or reduce-scatter over all ranks.
        read, attend: KV read by decodes, products of prefill.
        attention_us, attention_floor_us: offset and least of a layer's attention.
        experts, move: products of fused experts; hidden states sorted, activated and summed.
        experts_us, norm: of the fused kernel, see `MoeTerm`.
        head: weights of the vocabulary.
    """

    stream: float
    multiply: float
    gemm_us: float
    gemm_floor_us: float
    small: float
    small_us: float
    tensor: float
    tensor_us: float
    gather: float
    gather_us: float
    read: float
    attend: float
    attention_us: float
    attention_floor_us: float
    experts: float
    move: float
    experts_us: float
    norm: float
    head: float


@lru_cache(maxsize=2)
def measured(name: str) -> Efficiency:
    """The efficiencies that a packaged profile of `MODEL` on `GPU` shows."""
    profile, model, gpu = load_profile(name), read_architecture(find_model(MODEL)), GPUS[GPU]
    tp = profile.layout.tp
    sized = [(term, re.search(r"GEMM (\d+)x(\d+)", term.source)) for term in profile.per_rank_token]
    gemms = [(term, int(size[1]) * int(size[2])) for term, size in sized if size]
    small, *tensor = [term for term, size in sized if not size]
    flop_per_us = gpu.flop_per_us(BF16)
    kv_bytes = model.layer_kv_bytes(model.attention[0], tp=tp)
    head_bytes = model.vocabulary * model.hidden * ACTIVATION_BYTES / tp
    attention, moe, gathers = profile.attention, profile.moe, profile.per_group_token
    return Efficiency(
        stream=moe.per_active_expert_us / (model.expert_bytes / gpu.byte_per_us),
        multiply=sum(t.per_unit_us for t, _ in gemms)
        / (2.0 * sum(size for _, size in gemms) / flop_per_us),
        gemm_us=sum(t.base_us for t, _ in gemms) / len(gemms),
        gemm_floor_us=min(t.floor_us for t, _ in gemms),
        small=small.per_unit_us / (small_bytes(model) / gpu.byte_per_us),
        small_us=small.base_us,
        tensor=_over(tensor, tensor_bytes(model, tp) / (gpu.link_gbps * 1e3)),
        tensor_us=sum(t.base_us for t in tensor),
        gather=_over(
            gathers, len(gathers) * gathered_bytes(model, profile.layout.ep) / (gpu.link_gbps * 1e3)
        ),
        gather_us=sum(t.base_us for t in gathers) / max(1, len(gathers)),
        read=attention.per_decode_kv_token_us / (kv_bytes / gpu.byte_per_us),
        attend=attention.per_prefill_pair_us / (pair_flops(model, tp) / flop_per_us),
        attention_us=attention.base_us,
        attention_floor_us=attention.floor_us,
        experts=moe.per_pair_us / (2.0 * model.experts.parameters / flop_per_us),
        move=moe.per_group_token_us / (moved_bytes(model) / gpu.byte_per_us),
        experts_us=moe.base_us,
        norm=moe.norm,
        head=profile.per_step[0].base_us / (head_bytes / gpu.byte_per_us),
    )


def _over(terms: tuple[Term, ...] | list[Term], ideal_us: float) -> float:
    """Sum of the terms' rates over `ideal_us`; 1 without terms, which nothing asks for."""
    return sum(t.per_unit_us for t in terms) / ideal_us if terms else 1.0


def small_bytes(model: Architecture) -> float:
    """What the small kernels of a layer move for one token."""
    return SMALL_CHANNELS * model.hidden * ACTIVATION_BYTES


def tensor_bytes(model: Architecture, tp: int) -> float:
    """What a GPU exchanges with the others of its tensor-parallel group for a token of a layer."""
    return 2.0 * model.hidden * ACTIVATION_BYTES * (tp - 1) / tp


def gathered_bytes(model: Architecture, ranks: int) -> float:
    """What a GPU takes in of one token in an all-gather over `ranks`, on the mean."""
    return model.experts.inputs * ACTIVATION_BYTES * (ranks - 1) / ranks


def pair_flops(model: Architecture, tp: int) -> float:
    """Of a pair of a new and an earlier token in a full-attention layer."""
    group = model.attention[0]
    return 2.0 * group.heads * group.prefill_channels / tp


def moved_bytes(model: Architecture) -> float:
    """Hidden states that fused experts read and write for one token."""
    return 3.0 * model.experts.top_k * model.experts.inputs * ACTIVATION_BYTES
