"""What the placement level adds to a rearrangement inside a vLLM worker.

Run: ``pytest benchmarks/bench_placement_hook.py``. One thread. "Reduce" is this rank's part of the
gather (vLLM's own sum over the window not included), "split" the replica shares of all sources,
"tables" one rank's replica tables, "propose" all from the gathered rows to this rank's vote, which
`make bench-scale` runs with up to 320 ranks.
"""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gimbal.core.config import PlacementConfig  # noqa: E402
from gimbal.core.contracts import Topology  # noqa: E402
from gimbal.core.guard import LevelGuard  # noqa: E402
from gimbal.core.placement.planner import ModelFacts, planner_for  # noqa: E402
from gimbal.core.placement.replica_split import near_split  # noqa: E402
from gimbal.vllm_plugin.placement.controller import Controller  # noqa: E402
from gimbal.vllm_plugin.placement.replicas import write_tables  # noqa: E402
from gimbal.vllm_plugin.placement.rows import PLANES, SCALARS  # noqa: E402
from gimbal.vllm_plugin.placement.view import ModelView, Place  # noqa: E402
from gimbal.vllm_plugin.placement.window import (  # noqa: E402
    WindowNotes,
    reduce_window,
    to_logical,
)

# layers, experts, ranks, redundant experts; windows of 1,000 steps as vLLM's default.
SHAPES = {"48x128 R4 +16": (48, 128, 4, 16), "58x256 R32 +32": (58, 256, 32, 32)}
LARGE = {"58x256 R96 +32": (58, 256, 96, 32), "58x256 R320 +64": (58, 256, 320, 64)}
WINDOW = 1000


def setup(name):
    layers, experts, ranks, redundant = (SHAPES | LARGE)[name]
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


@pytest.mark.parametrize(
    "name", [*SHAPES, *(pytest.param(name, marks=pytest.mark.scale) for name in LARGE)]
)
def test_propose(benchmark, name):
    """From the rows of all ranks, in host memory already, to a vote; every source its own taste."""
    placement, counts, _ = setup(name)
    ranks, layers, experts = counts.shape
    state = SimpleNamespace(
        logical_replica_count=torch.ones(layers, experts, dtype=torch.long),
        model=SimpleNamespace(moe_layers=[]),
    )
    config, facts = (
        PlacementConfig(gate=0.0),
        ModelFacts(44e6, 8, 14336.0, False, "deepep_low_latency", 3000),
    )
    controller = Controller(config, Place(0, ranks, 1, 8), LevelGuard("placement"), WINDOW)
    controller.models.append(ModelView(state, planner_for(config, facts)))
    gathered = np.zeros((ranks, PLANES * layers * experts + SCALARS))
    planes = gathered[:, :-SCALARS].reshape(ranks, PLANES, layers, experts)
    planes[:, :2] = counts[:, None]
    planes[:, 2] = counts / 4
    planes[:, 3] = np.minimum(counts, WINDOW)
    gathered[:, -SCALARS:] = WINDOW, WINDOW, 0.0, 1e9
    rows, old = torch.from_numpy(gathered), torch.from_numpy(placement).long()
    benchmark.extra_info["gathered_mib"] = gathered.nbytes / 2**20
    arguments = 0, rows, (layers, experts), old
    controller.propose(*arguments)  # compiles
    benchmark.pedantic(controller.propose, arguments, rounds=3)
    print(f"\n{name}: rows of all ranks {benchmark.extra_info['gathered_mib']:.0f} MiB")
    assert controller.guard.counts == {}
