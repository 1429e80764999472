"""A dense MoE layer in float64, and its split over ranks through the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gimbal.vllm_plugin.cpu_backend.experts import apply_local_experts


@dataclass(frozen=True)
class Layer:
    """Weights of `experts` logical experts: w13 [e, 2*i, h] (gate, up) and w2 [e, h, i]."""

    w13: torch.Tensor
    w2: torch.Tensor

    @classmethod
    def random(cls, experts: int, hidden: int, intermediate: int, seed: int = 0) -> Layer:
        g = torch.Generator().manual_seed(seed)
        w13 = torch.randn(experts, 2 * intermediate, hidden, generator=g) * 0.05
        w2 = torch.randn(experts, hidden, intermediate, generator=g) * 0.05
        return cls(w13.bfloat16(), w2.bfloat16())

    def rank(self, physical_to_logical: list[int], rank: int, slots: int) -> Layer:
        mine = physical_to_logical[rank * slots : (rank + 1) * slots]
        return Layer(self.w13[mine], self.w2[mine])


def expert_map(physical: int, rank: int, slots: int) -> torch.Tensor:
    """[physical] this rank's slot of each physical expert, -1 elsewhere."""
    out = torch.full((physical,), -1, dtype=torch.int32)
    out[rank * slots : (rank + 1) * slots] = torch.arange(slots, dtype=torch.int32)
    return out


def one_expert(layer: Layer, slot: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x.double() @ layer.w13[slot].double().T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ layer.w2[slot].double().T


def dense(layer: Layer, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] float64 output of the whole layer for logical `ids`."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            out[token] += weight.double() * one_expert(layer, int(expert), x[token])
    return out


def torch_kernel(layer: Layer):
    """The expert kernel in plain torch, for rows with one expert each."""

    def kernel(out, rows, weights, slots):
        for i in range(rows.shape[0]):
            out[i] = (weights[i, 0] * one_expert(layer, int(slots[i, 0]), rows[i])).to(out.dtype)

    return kernel


def vllm_kernel(layer: Layer):
    """vLLM's own CPU kernel on packed weights."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    w13 = cpu_prepack_moe_weight(layer.w13.contiguous(), "vec")
    w2 = cpu_prepack_moe_weight(layer.w2.contiguous(), "vec")

    def kernel(out, rows, weights, slots):
        cpu_fused_moe(out, rows, w13, w2, None, None, weights, slots, "silu", "vec", False)

    return kernel


def expert_parallel(layer, x, weights, ids, placement, ranks, kernel_of, maps=None):
    """Sum over ranks of their local outputs; `ids` are physical. Returns it and pairs per rank."""
    slots = len(placement) // ranks
    total = torch.zeros(x.shape, dtype=torch.float64)
    pairs = []
    for rank in range(ranks):
        out = torch.full_like(x, float("nan"))
        table = expert_map(len(placement), rank, slots) if maps is None else maps[rank]
        kernel = kernel_of(layer.rank(placement, rank, slots))
        pairs.append(apply_local_experts(out, x, weights, ids, table, kernel))
        total += out.double()
    return total, pairs
