"""An estimated profile for a model and a GPU nobody measured, from config.json and a data sheet.

Roofline with the efficiencies that the measured H100 tables show: 0.85 of memory bandwidth, 0.72
of dense FLOP/s, 0.75 of link bandwidth, and 5 us per kernel. Expect tens of percent of error,
more on small steps, where launches and the host decide; `gimbal calibrate` replaces the guess.

A profile counts MoE layers and says what each costs. Where a model has other layers too, a term is
the sum over all layers divided by the MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from gimbal.core.model import Architecture, ModelConfig, read_architecture
from gimbal.core.model.architecture import ACTIVATION_BYTES
from gimbal.core.model.quantization import BF16, Format

MEMORY, COMPUTE, LINK = 0.85, 0.72, 0.75
KERNEL_US = 5.0
MOE_NORM = 2.0
SAMPLER_US = 150.0
USED_MEMORY, RESERVED_GB = 0.9, 2.0
"""vLLM's default ``--gpu-memory-utilization``, and what activations and CUDA graphs take of it."""
CONTEXT_TOKENS = 4096
"""Context at which a window is priced: a profile knows one rate per KV token, so layers that read
at most w tokens cost w / 4096 of it."""
HOST_PROFILE = "h100-qwen3-30b-a3b"
"""Whose host times an estimate takes: no data sheet says them."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data-sheet figures of one GPU: GB/s, dense TFLOP/s, GB, and GB/s per direction.

    Attributes:
        tflops: in bf16.
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
        return next(fitting) * 1e6 * COMPUTE


GPUS = {
    "a100": Gpu(2039, 312, 80, 300),
    "h100": Gpu(3350, 989, 80, 450, fp8_tflops=1979),
    "h200": Gpu(4800, 989, 141, 450, fp8_tflops=1979),
    "b200": Gpu(8000, 2250, 180, 900, 100, fp8_tflops=4500, fp4_tflops=9000),
    "l40s": Gpu(864, 362, 48, 32, fp8_tflops=733),
}
"""Vendor data sheets, SXM where there is one; dense rates without sparsity."""


def model_shape(architecture: Architecture, kv_dtype: str = "auto") -> ModelShape:
    """What a profile keeps of a model."""
    experts = architecture.experts
    return ModelShape(
        layers=experts.layers,
        experts=experts.experts,
        top_k=experts.top_k,
        hidden=architecture.hidden,
        expert_bytes=round(architecture.expert_bytes),
        kv_bytes_per_token=round(architecture.kv_bytes_per_token(kv_dtype)),
    )


@dataclass(frozen=True, slots=True)
class _Roofline:
    """What kernels of one GPU can be expected to reach."""

    gpu: Gpu
    source: str

    @property
    def byte_per_us(self) -> float:
        return self.gpu.memory_gbps * 1e3 * MEMORY

    @property
    def link_per_us(self) -> float:
        return self.gpu.link_gbps * 1e3 * LINK

    def gemm(self, weights: float, format_: Format = BF16, times: float = 1.0) -> Term:
        """`weights` multiplied with one token, `times` in a MoE layer of the profile."""
        flop_us = 2.0 * weights / self.gpu.flop_per_us(format_)
        floor = KERNEL_US + weights * format_.bytes_per_weight / self.byte_per_us
        return Term(times * flop_us, times * KERNEL_US, times * floor, self.source)

    def elementwise(self, bytes_per_token: float, times: float) -> Term:
        per_token = times * bytes_per_token / self.byte_per_us
        return Term(per_token, times * 2 * KERNEL_US, 0.0, self.source)

    def transfer(self, bytes_per_token: float, times: float = 1.0) -> Term:
        per_token = times * bytes_per_token / self.link_per_us
        return Term(per_token, times * KERNEL_US, 0.0, self.source)


def derive_profile(
    name: str, config: ModelConfig, gpu: str, layout: Layout, kv_dtype: str = "auto"
) -> Profile:
    """The estimate for a model on `layout.ep` GPUs called `gpu`.

    Args:
        kv_dtype: vLLM's ``--kv-cache-dtype``.

    The result says ``estimated: true``, and so does every term. What the host takes and how far
    CUDA graphs reach are those of the measured H100 profile. Raises InputError for a GPU without a
    data sheet here, and for a model that `read_architecture` refuses or that has no KV cache.
    """
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu!r}{nearest(gpu, GPUS)}")
    model = read_architecture(config)
    rank_kv_bytes = model.kv_bytes_per_token(kv_dtype, layout.tp)
    if not rank_kv_bytes:
        raise InputError(f"{config.where}: no layer has a KV cache")
    sheet = GPUS[gpu]
    source = f"estimate: roofline of the {gpu} data sheet"
    roofline = _Roofline(sheet, source)
    inputs_bytes = model.experts.inputs * ACTIVATION_BYTES
    gathers = 2 if layout.ep > 1 else 0  # dispatch and combine
    head_us = model.vocabulary * model.hidden * ACTIVATION_BYTES / layout.tp / roofline.byte_per_us
    weights = _rank_weights(model, layout)
    free = sheet.memory_gb * 1e9 * USED_MEMORY - weights - RESERVED_GB * 1e9
    notes = ["an estimate: measure with gimbal calibrate before trusting absolute times"]
    notes += model.remarks()
    if free <= 0:
        notes.append(
            f"does not fit: {weights / 1e9:.1f} GB of weights per rank, {gpu} has "
            f"{(free + weights) / 1e9:.1f} GB for them; kv_tokens is 0, so take more ranks"
        )
    host = load_profile(HOST_PROFILE)
    return replace(
        host,
        name=name,
        machine=f"{layout.ep}x {gpu}",
        model=model_shape(model, kv_dtype),
        layout=layout,
        per_rank_token=tuple(_dense_terms(model, roofline, layout.tp)),
        per_group_token=(roofline.transfer(inputs_bytes),) * gathers,
        attention=_attention_term(model, roofline, layout.tp, kv_dtype),
        moe=_moe_term(model, roofline),
        per_step=(Term(0.3, head_us + SAMPLER_US, 0.0, source),),
        interconnect=Interconnect(
            roofline.link_per_us,
            sheet.other_node_gbps * 1e3 * LINK,
            roofline.link_per_us,
            15_000.0,
            source,
        ),
        launch_layer_us=host.launch_layer_us * model.mixers / model.experts.layers,
        kv_tokens=int(max(0.0, free) / rank_kv_bytes),
        estimated=True,
        notes=tuple(notes),
    )


def _rank_weights(model: Architecture, layout: Layout) -> float:
    """Bytes of weights on one GPU: its share of the experts, the rest split over TP only."""
    experts = model.experts.layers * model.experts.experts * model.expert_bytes
    return experts / layout.ep + model.other_bytes / layout.tp


def _dense_terms(model: Architecture, roofline: _Roofline, tp: int) -> Iterator[Term]:
    """Everything outside the routed experts and the attention kernel itself."""
    experts, formats, per = model.experts, model.quantization.parts, model.experts.layers
    token_bytes = model.hidden * ACTIVATION_BYTES
    for group in model.attention:
        for inputs, outputs, is_split in group.projections:
            weights = inputs * outputs / (tp if is_split else 1)
            yield roofline.gemm(weights, formats["attention"], group.layers / per)
    if model.linear_layers:
        weights = model.linear_parameters / tp
        yield roofline.gemm(weights, formats["linear"], model.linear_layers / per)
    for part, width, times in (
        ("shared", experts.shared_width, 1.0),
        ("dense", experts.dense_width, experts.dense_mlps / per),
    ):
        if width and times:
            weights = model.hidden * width / tp
            yield roofline.gemm((experts.matrices - 1) * weights, formats[part], times)
            yield roofline.gemm(weights, formats[part], times)
    yield roofline.gemm(model.hidden * (experts.experts + experts.zero_experts))
    yield roofline.elementwise(10 * token_bytes, model.mixers / per)
    if tp > 1:
        yield roofline.transfer(2 * token_bytes * (tp - 1) / tp, model.mixers / per)


def _attention_term(
    model: Architecture, roofline: _Roofline, tp: int, kv_dtype: str
) -> AttentionTerm:
    decode_us = pair_us = prefix_us = times = 0.0
    flop_per_us = roofline.gpu.flop_per_us(BF16)
    for group in model.attention:
        share = group.layers / model.experts.layers
        window = group.window_tokens or CONTEXT_TOKENS
        reach = share * min(1.0, window / CONTEXT_TOKENS)
        kv_bytes = model.layer_kv_bytes(group, kv_dtype, tp)
        read_us = reach * (kv_bytes - group.index_bytes) / roofline.byte_per_us
        read_us += share * group.index_bytes / roofline.byte_per_us
        flop_us = reach * 2.0 * group.heads * group.decode_channels / tp / flop_per_us
        decode_us += max(read_us, flop_us)
        prefix_us += read_us
        pair_us += reach * 2.0 * group.heads * group.prefill_channels / tp / flop_per_us
        times += share
    return AttentionTerm(
        floor_us=times * 2 * KERNEL_US,
        base_us=times * 2 * KERNEL_US,
        per_decode_kv_token_us=decode_us,
        per_mixed_decode_kv_token_us=decode_us,
        per_prefill_pair_us=pair_us,
        per_prefill_kv_token_us=prefix_us,
        source=roofline.source,
    )


def _moe_term(model: Architecture, roofline: _Roofline) -> MoeTerm:
    experts, format_ = model.experts, model.quantization.parts["experts"]
    flops = 2.0 * experts.parameters  # a multiplication and an addition each
    moved = 3 * experts.top_k * experts.inputs * ACTIVATION_BYTES
    return MoeTerm(
        base_us=5 * KERNEL_US,
        per_active_expert_us=model.expert_bytes / roofline.byte_per_us,
        per_pair_us=flops / roofline.gpu.flop_per_us(format_),
        per_group_token_us=moved / roofline.byte_per_us,
        norm=MOE_NORM,
        source=roofline.source,
    )
