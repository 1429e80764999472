"""What the placement level adds to a rearrangement inside a vLLM worker.

Run: ``pytest benchmarks/bench_placement_hook.py``. One thread. "Reduce" is this rank's part of the
gather (vLLM's own sum over the window not included), "split" the replica shares of all sources,
"tables" one rank's replica tables.
"""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gimbal.core.contracts import Topology  # noqa: E402
from gimbal.core.placement.replica_split import near_split  # noqa: E402
from gimbal.vllm_plugin.placement.replicas import write_tables  # noqa: E402
from gimbal.vllm_plugin.placement.window import (  # noqa: E402
    WindowNotes,
    reduce_window,
    to_logical,
)

# layers, experts, ranks, redundant experts; windows of 1,000 steps as vLLM's default.
SHAPES = {"48x128 R4 +16": (48, 128, 4, 16), "58x256 R32 +32": (58, 256, 32, 32)}
WINDOW = 1000


def setup(name):
    layers, experts, ranks, redundant = SHAPES[name]
    rng = np.random.default_rng(0)
    slots = np.concatenate([np.arange(experts), rng.integers(0, experts, redundant)])
    placement = np.stack([rng.permutation(slots) for _ in range(layers)]).astype(np.int32)
    counts = rng.gamma(0.5, 1000.0, (ranks, layers, experts))
    return placement, counts, Topology(ranks, len(slots) // ranks)


@pytest.mark.parametrize("name", list(SHAPES))
def test_reduce_window(benchmark, name):
    torch.set_num_threads(1)
    placement, counts, _ = setup(name)
    window = torch.randint(0, 5, (WINDOW, *placement.shape), dtype=torch.int32)
    state = SimpleNamespace(
        expert_load_window=window, physical_to_logical_map=torch.from_numpy(placement).long()
    )
    notes = WindowNotes(WINDOW, 1000.0)
    for step in range(WINDOW):
        notes.written(step, step, 100, step % 50)
    index = state.physical_to_logical_map
    raw = to_logical(window, index, counts.shape[2]).sum(dim=0)
    benchmark.pedantic(reduce_window, (state, raw, notes, WINDOW, 0.0), rounds=5)


@pytest.mark.parametrize("name", list(SHAPES))
def test_near_split(benchmark, name):
    placement, counts, topology = setup(name)
    near_split(counts, placement, topology)
    benchmark(near_split, counts, placement, topology)


@pytest.mark.parametrize("name", list(SHAPES))
def test_write_tables(benchmark, name):
    torch.set_num_threads(1)
    placement, counts, topology = setup(name)
    shares = near_split(counts, placement, topology)[0]
    layers, experts = counts.shape[1:]
    state = SimpleNamespace(
        logical_to_physical_map=torch.full((layers, experts, 1024), -1),
        logical_replica_count=torch.ones(layers, experts, dtype=torch.long),
    )
    benchmark(write_tables, state, placement, shares)
