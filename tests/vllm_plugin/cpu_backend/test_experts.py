"""The expert-parallel path against a dense float64 reference."""

import pytest
import torch
from reference import Layer, dense, expert_map, expert_parallel, torch_kernel, vllm_kernel

from gimbal.vllm_plugin.cpu_backend.experts import apply_local_experts
from gimbal.vllm_plugin.cpu_backend.recording import map_to_physical_and_record

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 32, 8, 3
LAYER = Layer.random(EXPERTS, HIDDEN, INTERMEDIATE)
# bf16 keeps 8 bits: two roundings per pair and one per rank, relative to the largest output.
TOLERANCE = 4 * 2.0**-8


def routed(tokens, experts=EXPERTS, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=g)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=g)
    return x, weights / weights.sum(1, keepdim=True), ids.int()


def error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("kernel", [torch_kernel, vllm_kernel])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_ranks_add_up_to_the_dense_layer(tokens, ranks, kernel):
    x, weights, ids = routed(tokens)
    placement = list(range(EXPERTS))
    got, pairs = expert_parallel(LAYER, x, weights, ids, placement, ranks, kernel)
    assert error(got, dense(LAYER, x, weights, ids)) < TOLERANCE
    assert sum(pairs) == tokens * TOP_K


def test_migrated_and_replicated_experts_give_the_same_output():
    x, weights, logical = routed(40)
    placement = [3, 1, 7, 3, 0, 5, 2, 6, 4, 3, 1, 0]  # 12 slots on 2 ranks, 3 replicas of expert 3
    count = torch.zeros(EXPERTS, dtype=torch.long)
    table = torch.full((EXPERTS, 6), -1)
    for slot, expert in enumerate(placement):
        table[expert, count[expert]] = slot
        count[expert] += 1
    load = torch.zeros(len(placement), dtype=torch.int32)
    physical = map_to_physical_and_record(logical, load, table, count, torch.tensor(True))
    got, pairs = expert_parallel(LAYER, x, weights, physical, placement, 2, vllm_kernel)
    assert error(got, dense(LAYER, x, weights, logical)) < TOLERANCE
    assert pairs == [int(load[:6].sum()), int(load[6:].sum())]
    assert len({int(p) for p in physical[logical == 3]}) == 3  # every replica serves some token


def test_a_broken_expert_map_is_far_outside_the_tolerance():
    x, weights, ids = routed(33)
    placement = list(range(EXPERTS))
    maps = [expert_map(EXPERTS, rank, 4) for rank in range(2)]
    maps[0][[0, 1]] = maps[0][[1, 0]]
    got, _ = expert_parallel(LAYER, x, weights, ids, placement, 2, vllm_kernel, maps)
    assert error(got, dense(LAYER, x, weights, ids)) > 10 * TOLERANCE


def test_a_rank_without_local_tokens_writes_zeros_and_calls_no_kernel():
    x, weights, ids = routed(5, experts=4)  # experts 0..3 live on rank 0
    calls = []
    out = torch.full_like(x, float("nan"))
    pairs = apply_local_experts(
        out, x, weights, ids, expert_map(EXPERTS, 1, 4), lambda *_: calls.append(1)
    )
    assert pairs == 0
    assert not calls
    assert torch.equal(out, torch.zeros_like(x))


def test_no_tokens_at_all():
    x, weights, ids = routed(1)
    out = x[:0].clone()
    table = expert_map(EXPERTS, 0, 4)
    assert apply_local_experts(out, x[:0], weights[:0], ids[:0], table, lambda *_: None) == 0


def test_negative_ids_are_no_expert():
    x, weights, ids = routed(6)
    ids[:, 1] = -1
    want = dense(LAYER, x, weights.clone().index_fill_(1, torch.tensor([1]), 0.0), ids.clamp(min=0))
    got, pairs = expert_parallel(LAYER, x, weights, ids, list(range(EXPERTS)), 2, vllm_kernel)
    assert sum(pairs) == 6 * (TOP_K - 1)
    assert error(got, want) < TOLERANCE


def test_an_id_beyond_the_map_raises_instead_of_reading_past_the_weights():
    x, weights, ids = routed(2)
    ids[0, 0] = EXPERTS
    with pytest.raises(IndexError):
        apply_local_experts(
            torch.empty_like(x), x, weights, ids, expert_map(EXPERTS, 0, 4), lambda *_: None
        )


def test_rows_given_to_the_kernel_are_exactly_the_local_pairs():
    x, weights, ids = routed(50)
    seen = []
    apply_local_experts(
        torch.empty_like(x),
        x,
        weights,
        ids,
        expert_map(EXPERTS, 1, 4),
        lambda out, rows, w, slots: seen.append(
            (rows.shape[0], int(slots.min()), int(slots.max()))
        ),
    )
    assert seen == [(int((ids >= 4).sum()), 0, 3)]
