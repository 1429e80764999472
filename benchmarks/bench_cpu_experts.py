"""A rank's share of an MoE layer on CPU, against the same token-expert pairs without experts split.

The baseline is vLLM's own kernel on as many pairs, all of them local (tokens / ranks rows with the
full top-k). The expert-parallel path gets all tokens, finds the pairs that are local, computes
those and sums them per token. Both run in turns in one thread, whose CPU time is taken.
Expected at most 1.15 (`extra_info["ratio"]`).

    pytest benchmarks/bench_cpu_experts.py -o python_files='bench_*.py' --benchmark-only
"""

import statistics
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from gimbal.vllm_plugin.cpu_backend.experts import apply_local_experts  # noqa: E402

RANKS = 2
SHAPES = {
    "demo": (256, 128, 32, 4),
    "wide": (1024, 512, 32, 4),
}
"""name: hidden, expert width, experts, top-k. "wide" is half a Qwen3-30B-A3B expert each way."""


class Case:
    """One layer, half of its experts local, and a batch routed over all of them."""

    def __init__(self, shape, tokens):
        from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        torch.set_num_threads(1)
        hidden, width, experts, top_k = SHAPES[shape]
        local = experts // RANKS
        g = torch.Generator().manual_seed(tokens)
        weights = torch.randn(local, 2 * width, hidden, generator=g).mul_(0.05).bfloat16()
        self.w13 = cpu_prepack_moe_weight(weights, "vec")
        weights = torch.randn(local, hidden, width, generator=g).mul_(0.05).bfloat16()
        self.w2 = cpu_prepack_moe_weight(weights, "vec")
        self.fused = cpu_fused_moe
        self.x = torch.randn(tokens, hidden, generator=g).bfloat16()
        # Exactly tokens * top_k / RANKS local pairs, spread over tokens as routing spreads them.
        rng = np.random.default_rng(tokens)
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
        surplus = int((ids < local).sum()) - tokens * top_k // RANKS
        flat = ids.reshape(-1)
        if surplus > 0:
            flat[rng.permutation(np.flatnonzero(flat < local))[:surplus]] += local
        else:
            flat[rng.permutation(np.flatnonzero(flat >= local))[:-surplus]] -= local
        self.ids = torch.from_numpy(ids.astype(np.int32))
        self.weights = torch.rand(tokens, top_k, generator=g)
        self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
        self.expert_map[:local] = torch.arange(local, dtype=torch.int32)
        self.out = torch.empty_like(self.x)
        self._baseline_inputs(tokens // RANKS, local, top_k)

    def _baseline_inputs(self, rows, local, top_k):
        """`rows` tokens with all experts local, and as many pairs per expert as in our share."""
        pairs = np.sort(self.ids.numpy()[self.ids.numpy() < local])
        # Dealing the sorted pairs out row by row keeps the load of every expert.
        dealt = pairs.reshape(top_k, rows).T
        self.base_ids = torch.from_numpy(np.ascontiguousarray(dealt))
        self.base_x = self.x[:rows].contiguous()
        self.base_weights = self.weights[:rows].contiguous()
        self.base_out = torch.empty_like(self.base_x)

    def baseline(self):
        self._kernel(self.base_out, self.base_x, self.base_weights, self.base_ids)

    def expert_parallel(self):
        return apply_local_experts(
            self.out, self.x, self.weights, self.ids, self.expert_map, self._kernel
        )

    def _kernel(self, out, rows, weights, ids):
        self.fused(out, rows, self.w13, self.w2, None, None, weights, ids, "silu", "vec", False)


def in_turns_us(first, second, seconds=2.0):
    """Microseconds per call of both, in alternating short blocks; the 10th percentile of each.

    Thread time, because everything runs in this thread and a busy machine must not count; a low
    quantile, because what still disturbs a block (a cold cache) only makes it slower.
    """
    began = time.thread_time()
    first()
    calls = max(1, int(0.005 / (time.thread_time() - began)))
    times = ([], [])
    while time.thread_time() - began < seconds:
        for call, into in ((first, times[0]), (second, times[1])):
            start = time.thread_time()
            for _ in range(calls):
                call()
            into.append((time.thread_time() - start) / calls * 1e6)
    return tuple(statistics.quantiles(t, n=10)[0] for t in times)


@pytest.mark.parametrize("tokens", [2, 8, 32, 128, 512, 1024])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_expert_parallel_share(benchmark, shape, tokens):
    case = Case(shape, tokens)
    with torch.inference_mode():
        assert case.expert_parallel() == case.base_ids.numel()
        base_us, split_us = in_turns_us(case.baseline, case.expert_parallel)
        benchmark.pedantic(case.expert_parallel, rounds=5, iterations=3)
    benchmark.extra_info.update(
        baseline_us=round(base_us, 1), split_us=round(split_us, 1), ratio=split_us / base_us
    )
    print(
        f"\n{shape} {tokens} tokens, {case.base_ids.numel()} local pairs: without split "
        f"{base_us:.0f} us, expert-parallel {split_us:.0f} us, ratio {split_us / base_us:.3f}"
    )
