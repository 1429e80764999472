"""Near replicas first, balance bounded: small cases by hand, the rest as properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.contracts import Topology
from gimbal.core.errors import InputError
from gimbal.core.placement.objective import pair_loads
from gimbal.core.placement.replica_split import near_split

TWO = Topology(ranks=2, slots_per_rank=2, ranks_per_source=1, ranks_per_node=2)
# Expert 0 is on both ranks, 1 on rank 0, 2 on rank 1.
PLACEMENT = np.array([[0, 1, 2, 0]], dtype=np.int32)


def rank_loads(
    counts: np.ndarray, placement: np.ndarray, shares: np.ndarray, topology: Topology
) -> np.ndarray:
    """[layers, ranks] pairs when `shares` of `near_split` decide the replicas."""
    index = np.broadcast_to(placement.astype(np.intp), shares.shape)
    pairs = (np.take_along_axis(counts, index, axis=2) * shares).sum(axis=0)
    return pairs.reshape(pairs.shape[0], topology.ranks, -1).sum(axis=2)


def split_local_share(
    counts: np.ndarray, placement: np.ndarray, shares: np.ndarray, topology: Topology
) -> float:
    """Share of all pairs served on their source's own ranks."""
    index = np.broadcast_to(placement.astype(np.intp), shares.shape)
    pairs = np.take_along_axis(counts, index, axis=2) * shares
    owner = np.arange(topology.slots) // topology.slots_per_rank // topology.ranks_per_source
    own = sum(float(pairs[s][:, owner == s].sum()) for s in range(counts.shape[0]))
    return own / max(float(counts.sum()), 1e-300)


@pytest.mark.parametrize(
    ("counts", "shares"),
    [
        # Balanced demand: each source is served by its own rank.
        ([[10, 5, 5], [10, 5, 5]], [[1, 0], [0, 1]]),
        # Only source 0 asks: its own rank up to the limit of 1.02 * 10, the rest spills.
        ([[20, 0, 0], [0, 0, 0]], [[0.51, 0.49], [0.5, 0.5]]),
        # No demand at all: even.
        ([[0, 3, 0], [0, 0, 3]], [[0.5, 0.5], [0.5, 0.5]]),
        # Rank 0 is full with expert 1: source 0 goes to rank 1.
        ([[6, 20, 0], [0, 0, 0]], [[0, 1], [0.5, 0.5]]),
    ],
)
def test_near_first_then_spill(counts, shares):
    demand = np.array(counts, dtype=float)[:, None, :]
    got = near_split(demand, PLACEMENT, TWO)
    np.testing.assert_allclose(got[:, 0][:, [0, 3]], shares, atol=1e-9)
    np.testing.assert_allclose(got[:, 0][:, [1, 2]], 1.0)


def test_own_engine_then_own_node_then_the_rest():
    topology = Topology(ranks=4, slots_per_rank=1, ranks_per_source=1, ranks_per_node=2)
    placement = np.array([[0, 0, 0, 1]], dtype=np.int32)
    counts = np.zeros((4, 1, 2))
    counts[3, 0, 1] = 100.0  # makes room everywhere
    counts[1, 0, 0] = 10.0
    assert near_split(counts, placement, topology)[1, 0].tolist() == [0, 1, 0, 1]
    counts[3, 0, 0] = 10.0  # source 3 holds no replica: rank 2 shares its node
    assert near_split(counts, placement, topology)[3, 0].tolist() == [0, 0, 1, 1]


@st.composite
def cases(draw):
    per_source = draw(st.sampled_from([1, 2]))
    sources = draw(st.integers(1, 4))
    ranks = per_source * sources
    experts = draw(st.integers(2, 12))
    slots = draw(st.integers(-(-experts // ranks), experts))
    topology = Topology(ranks, slots, per_source, max(1, ranks // draw(st.sampled_from([1, 2]))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    extra = rng.integers(experts, size=topology.slots - experts)
    rows = [rng.permutation(np.concatenate([np.arange(experts), extra])) for _ in range(2)]
    counts = rng.gamma(0.3, 100.0, (sources, 2, experts)) * (
        rng.random((sources, 2, experts)) < 0.8
    )
    return counts, np.array(rows, dtype=np.int32), topology


@settings(max_examples=150)
@given(cases())
def test_every_token_is_served_and_balance_is_bounded(case):
    counts, placement, topology = case
    shares = near_split(counts, placement, topology)
    assert (shares >= 0).all()
    for layer, slots in enumerate(placement):
        for expert in range(counts.shape[2]):
            total = shares[:, layer, slots == expert].sum(axis=1)
            np.testing.assert_allclose(total, 1.0, atol=1e-9)
    loads = rank_loads(counts, placement, shares, topology)
    np.testing.assert_allclose(loads.sum(axis=1), counts.sum(axis=(0, 2)), atol=1e-6)
    single = np.zeros_like(loads)
    for layer, slots in enumerate(placement):
        held = np.bincount(slots, minlength=counts.shape[2])
        for slot, expert in enumerate(slots):
            if held[expert] == 1:
                single[layer, slot // topology.slots_per_rank] += counts[:, layer, expert].sum()
    even = pair_loads(placement, counts.sum(axis=0), topology)
    bound = np.maximum(1.02 * loads.mean(axis=1), np.maximum(single.max(1), even.max(1)))
    assert (loads.max(axis=1) <= bound * (1 + 1e-6) + 1e-6).all()
    assert (near_split(counts, placement, topology) == shares).all()


def test_locality_rises_on_skewed_sources():
    rng = np.random.default_rng(0)
    topology = Topology(ranks=4, slots_per_rank=10, ranks_per_source=1, ranks_per_node=4)
    counts = rng.gamma(0.5, 100.0, (4, 3, 32))
    extra = rng.integers(32, size=(3, 8))
    placement = np.concatenate([np.tile(np.arange(32), (3, 1)), extra], axis=1).astype(np.int32)
    placement = rng.permuted(placement, axis=1)
    near = near_split(counts, placement, topology)
    even = near_split(np.zeros_like(counts), placement, topology)
    gain = split_local_share(counts, placement, near, topology) - split_local_share(
        counts, placement, even, topology
    )
    assert gain > 0.03


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"counts\[0, 0, 1\]: negative"):
        near_split(np.array([[[1.0, -1.0, 0]], [[0, 0, 0]]]), PLACEMENT, TWO)
    with pytest.raises(InputError, match=r"placement.*expert 2 is missing"):
        near_split(np.ones((2, 1, 3)), np.array([[0, 1, 1, 0]], dtype=np.int32), TWO)
