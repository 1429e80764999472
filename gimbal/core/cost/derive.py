"""An estimated profile for a model and a GPU nobody measured, from config.json and a data sheet.

Bytes and FLOPs of the model's kernels over what the data sheet says the GPU does, each kind as far
from it as the measured kernels of Qwen3-30B-A3B on H100 are (`kernels`). Expect tens of percent of
error, more on small steps, where launches and the host decide; `gimbal calibrate` replaces the
guess. How far off published runs it is: docs/simulator.md.

A profile counts MoE layers and says what each costs. Where a model has other layers too, a term is
the sum over all layers divided by the MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gimbal.core.cost.kernels import (
    GPU,
    GPUS,
    MODEL,
    ONE_RANK,
    OTHER_NODE_US,
    ROUTED_LINK,
    ROUTED_US,
    SEVERAL_RANKS,
    Efficiency,
    Gpu,
    gathered_bytes,
    measured,
    moved_bytes,
    small_bytes,
    tensor_bytes,
)
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
from gimbal.core.placement.backends import GATHER_BACKEND

USED_MEMORY, RESERVED_GB = 0.9, 2.0
"""vLLM's default ``--gpu-memory-utilization``, and what activations and CUDA graphs take of it."""
CONTEXT_TOKENS = 4096
"""Context at which a window is priced: a profile knows one rate per KV token, so layers that read
at most w tokens cost w / 4096 of it."""
RANKS_PER_NODE = 8


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
class _Kernels:
    """Terms of kernels on one GPU."""

    gpu: Gpu
    efficiency: Efficiency
    source: str

    @property
    def stream_us(self) -> float:
        """Per byte of weights."""
        return self.efficiency.stream / self.gpu.byte_per_us

    def gemm(self, weights: float, format_: Format = BF16, times: float = 1.0) -> Term:
        """`weights` multiplied with one token, `times` in a MoE layer of the profile."""
        e = self.efficiency
        flop_us = 2.0 * weights * e.multiply / self.gpu.flop_per_us(format_)
        floor = e.gemm_floor_us + weights * format_.bytes_per_weight * self.stream_us
        return Term(times * flop_us, times * e.gemm_us, times * floor, self.source)

    def small(self, bytes_per_token: float, times: float) -> Term:
        e = self.efficiency
        per_token = times * e.small * bytes_per_token / self.gpu.byte_per_us
        return Term(per_token, times * e.small_us, 0.0, self.source)

    def tensor(self, bytes_per_token: float, times: float) -> Term:
        e = self.efficiency
        per_token = times * e.tensor * bytes_per_token / (self.gpu.link_gbps * 1e3)
        return Term(per_token, times * e.tensor_us, 0.0, self.source)


def derive_profile(
    name: str,
    config: ModelConfig,
    gpu: str,
    layout: Layout,
    kv_dtype: str = "auto",
    backend: str = GATHER_BACKEND,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Profile:
    """The estimate for a model on `layout.ep` GPUs called `gpu`.

    Args:
        kv_dtype: vLLM's ``--kv-cache-dtype``.
        backend: one of `placement.backends.BACKENDS`.
        ranks_per_node: GPUs behind one NVLink switch.

    The result says ``estimated: true``, and so does every term. What the host takes and how far
    CUDA graphs reach are those of the measured H100 profile. Raises InputError for a GPU without a
    data sheet here, for a model that `read_architecture` refuses or that has no KV cache, and where
    `layout.tp` does not divide its attention heads.
    """
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu!r}{nearest(gpu, GPUS)}")
    model = read_architecture(config)
    rank_kv_bytes = model.kv_bytes_per_token(kv_dtype, layout.tp)
    _check(config, model, rank_kv_bytes, layout.tp)
    sheet, reference = GPUS[gpu], ONE_RANK if layout.ep == 1 else SEVERAL_RANKS
    source = f"estimate: FLOPs and bytes on {gpu}, efficiency of {reference}"
    kernels = _Kernels(sheet, measured(reference), source)
    weights, room = _rank_weights(model, layout), _room(sheet)
    notes = [*_provenance(reference, gpu), *model.remarks()]
    if weights >= room:
        notes.append(
            f"does not fit: {weights / 1e9:.1f} GB of weights per rank, {gpu} has "
            f"{room / 1e9:.1f} GB for them; kv_tokens is 0, so take more ranks"
        )
    host = load_profile(reference)
    head_bytes = model.vocabulary * model.hidden * ACTIVATION_BYTES / layout.tp
    head_us = kernels.efficiency.head * head_bytes / sheet.byte_per_us
    return replace(
        host,
        name=name,
        machine=f"{layout.ep}x {gpu}",
        model=model_shape(model, kv_dtype),
        layout=layout,
        per_rank_token=tuple(_dense_terms(model, kernels, layout.tp)),
        per_group_token=tuple(_collectives(model, kernels, layout.ep, backend, ranks_per_node)),
        attention=_attention_term(model, kernels, layout.tp, kv_dtype),
        moe=_moe_term(model, kernels, 1 if backend == GATHER_BACKEND else layout.ep),
        per_step=(
            Term(host.per_step[0].per_unit_us, head_us, 0.0, source),
            replace(host.per_step[1], source=source),
        ),
        interconnect=_interconnect(model, kernels, host.interconnect),
        launch_layer_us=host.launch_layer_us * model.mixers / model.experts.layers,
        kv_tokens=int(max(0.0, room - weights) / rank_kv_bytes),
        backend=backend,
        estimated=True,
        notes=tuple(notes),
    )


def _check(config: ModelConfig, model: Architecture, rank_kv_bytes: float, tp: int) -> None:
    if not rank_kv_bytes:
        raise InputError(f"{config.where}: no layer has a KV cache")
    for group in model.attention:
        if group.heads % tp:
            raise InputError(
                f"{config.where}: {group.heads} attention heads do not divide over "
                f"tensor-parallel size {tp}"
            )


def _interconnect(model: Architecture, kernels: _Kernels, known: Interconnect) -> Interconnect:
    """Of routed pairs and of migration; `known` is that of `GPU`."""
    near, far = kernels.gpu.link_gbps * 1e3, kernels.gpu.other_node_gbps * 1e3
    card = known.other_node_bytes_per_us / (GPUS[GPU].other_node_gbps * 1e3)
    # A pair counts 16 bits there and back; DeepEP sends 8 there for experts that multiply in 8.
    pairs = 1.0 if model.quantization.parts["experts"].activation_bits > 8 else 4 / 3
    return Interconnect(
        near * ROUTED_LINK * pairs,
        far * card * pairs,
        known.migration_bytes_per_us * near / (GPUS[GPU].link_gbps * 1e3),
        known.migration_layer_us,
        kernels.source,
    )


def _provenance(reference: str, gpu: str) -> Iterator[str]:
    """What of an estimate was measured, and what was not."""
    yield "an estimate: measure with gimbal calibrate before trusting absolute times"
    yield (
        f"fitted: efficiencies and fixed times of {reference} (measured kernels of {MODEL} on {GPU}"
        "): GEMMs, attention, fused experts, collectives"
    )
    yield f"scaled by bytes and FLOPs: every kernel, from {MODEL} on {GPU} to this model on {gpu}"
    yield "assumed, as on h100: host and launch times, sampler, front end"


def _room(gpu: Gpu) -> float:
    """Bytes of a GPU's memory for weights and KV cache."""
    return gpu.memory_gb * 1e9 * USED_MEMORY - RESERVED_GB * 1e9


def _rank_weights(model: Architecture, layout: Layout) -> float:
    """Bytes of weights on one GPU: its share of the experts, the rest split over TP only."""
    experts = model.experts.layers * model.experts.experts * model.expert_bytes
    return experts / layout.ep + model.other_bytes / layout.tp


def _dense_terms(model: Architecture, kernels: _Kernels, tp: int) -> Iterator[Term]:
    """Everything outside the routed experts and the attention kernel itself."""
    experts, formats, per = model.experts, model.quantization.parts, model.experts.layers
    for group in model.attention:
        for inputs, outputs, is_split in group.projections:
            weights = inputs * outputs / (tp if is_split else 1)
            yield kernels.gemm(weights, formats["attention"], group.layers / per)
    if model.linear_layers:
        weights = model.linear_parameters / tp
        yield kernels.gemm(weights, formats["linear"], model.linear_layers / per)
    for part, width, times in (
        ("shared", experts.shared_width, 1.0),
        ("dense", experts.dense_width, experts.dense_mlps / per),
    ):
        if width and times:
            weights = model.hidden * width / tp
            yield kernels.gemm((experts.matrices - 1) * weights, formats[part], times)
            yield kernels.gemm(weights, formats[part], times)
    yield kernels.gemm(model.hidden * (experts.experts + experts.zero_experts))
    yield kernels.small(small_bytes(model), model.mixers / per)
    if tp > 1:
        yield kernels.tensor(tensor_bytes(model, tp), model.mixers / per)


def _collectives(
    model: Architecture, kernels: _Kernels, ranks: int, backend: str, ranks_per_node: int
) -> Iterator[Term]:
    """Dispatch and combine of a MoE layer.

    An all-gather brings every token to every GPU: over NVLink all of them, over the network cards
    of a node those of other nodes, a share each; the slower of both. The volume of routed pairs
    depends on where experts are, and is the simulator's to price.
    """
    if ranks == 1:
        return
    gpu, e = kernels.gpu, kernels.efficiency
    nodes = -(-ranks // ranks_per_node)
    for _ in ("dispatch", "combine"):
        if backend != GATHER_BACKEND:
            hops = OTHER_NODE_US if nodes > 1 else 0.0
            yield Term(0.0, ROUTED_US + hops, 0.0, kernels.source)
            continue
        near = e.gather * gathered_bytes(model, ranks) / (gpu.link_gbps * 1e3)
        far = gathered_bytes(model, nodes) / ranks_per_node / (gpu.other_node_gbps * 1e3)
        base = e.gather_us + (nodes - 1) * OTHER_NODE_US
        yield Term(max(near, e.gather * far), base, 0.0, kernels.source)


def _attention_term(
    model: Architecture, kernels: _Kernels, tp: int, kv_dtype: str
) -> AttentionTerm:
    decode_us = pair_us = prefix_us = times = 0.0
    gpu, e = kernels.gpu, kernels.efficiency
    flop_per_us = gpu.flop_per_us(BF16)
    for group in model.attention:
        share = group.layers / model.experts.layers
        window = group.window_tokens or CONTEXT_TOKENS
        reach = share * min(1.0, window / CONTEXT_TOKENS)
        kv_bytes = model.layer_kv_bytes(group, kv_dtype, tp)
        read_us = reach * (kv_bytes - group.index_bytes) + share * group.index_bytes
        read_us *= e.read / gpu.byte_per_us
        flop_us = reach * 2.0 * group.heads * group.decode_channels / tp / flop_per_us
        decode_us += max(read_us, e.multiply * flop_us)
        prefix_us += read_us
        pair_flops = reach * 2.0 * group.heads * group.prefill_channels / tp
        pair_us += e.attend * pair_flops / flop_per_us
        times += share
    return AttentionTerm(
        floor_us=times * e.attention_floor_us,
        base_us=times * e.attention_us,
        per_decode_kv_token_us=decode_us,
        per_mixed_decode_kv_token_us=decode_us,
        per_prefill_pair_us=pair_us,
        per_prefill_kv_token_us=prefix_us,
        source=kernels.source,
    )


def _moe_term(model: Architecture, kernels: _Kernels, spread: int) -> MoeTerm:
    """`spread`: ranks that share the tokens' rows, 1 where every rank has them all."""
    experts, format_ = model.experts, model.quantization.parts["experts"]
    gpu, e = kernels.gpu, kernels.efficiency
    flops = 2.0 * experts.parameters  # a multiplication and an addition each
    return MoeTerm(
        base_us=e.experts_us,
        per_active_expert_us=model.expert_bytes * kernels.stream_us,
        per_pair_us=e.experts * flops / gpu.flop_per_us(format_),
        per_group_token_us=e.move * moved_bytes(model) / spread / gpu.byte_per_us,
        norm=e.norm,
        source=kernels.source,
    )
