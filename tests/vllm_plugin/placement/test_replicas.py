"""Shares turned into table entries."""

import numpy as np
import pytest

from gimbal.vllm_plugin.placement.replicas import ENTRIES, quantize, weighted_rows


@pytest.mark.parametrize(
    ("shares", "entries"),
    [
        ([0.5, 0.5, 0.0], [16, 16, 0]),
        ([1.0, 0.0, 0.0], [32, 0, 0]),
        ([1 / 3, 1 / 3, 1 / 3], [11, 11, 10]),
        ([0.51, 0.49, 0.0], [16, 16, 0]),
        ([0.99, 0.01, 0.0], [32, 0, 0]),
    ],
)
def test_entries_are_shares_rounded(shares, entries):
    assert quantize(np.array([shares])).tolist() == [entries]


def test_rows_of_random_tables():
    rng = np.random.default_rng(0)
    extra = rng.integers(0, 6, (5, 4))
    placement = np.concatenate([np.tile(np.arange(6), (5, 1)), extra], axis=1)
    placement = rng.permuted(placement, axis=1).astype(np.int32)
    shares = rng.random(placement.shape)
    layers, experts, entries = weighted_rows(placement, shares, 6)
    expected = {
        (layer, expert)
        for layer in range(5)
        for expert in range(6)
        if (placement[layer] == expert).sum() > 1
    }
    assert set(zip(layers.tolist(), experts.tolist(), strict=True)) == expected
    for layer, expert, row in zip(layers, experts, entries, strict=True):
        held = np.flatnonzero(placement[layer] == expert)
        wanted = shares[layer, held] / shares[layer, held].sum() * ENTRIES
        got = np.array([(row == slot).sum() for slot in held])
        assert got.sum() == ENTRIES
        assert (np.abs(got - wanted) < 1).all()


def test_without_redundant_experts_there_is_nothing_to_write():
    rows = weighted_rows(np.array([[1, 0]], dtype=np.int32), np.ones((1, 2)), 2)
    assert [len(part) for part in rows] == [0, 0, 0]
