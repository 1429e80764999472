"""Mapping and counting as vLLM's GPU kernel does them, spelled out pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.vllm_plugin.cpu_backend.recording import map_to_physical_and_record

ON, OFF = torch.tensor(True), torch.tensor(False)


def tables(placement, logical, replicas=8):
    count = torch.zeros(logical, dtype=torch.long)
    table = torch.full((logical, replicas), -1)
    for slot, expert in enumerate(placement):
        table[expert, count[expert]] = slot
        count[expert] += 1
    return table, count


def spelled_out(ids, load, table, count, record, unpadded):
    out = torch.empty_like(ids)
    for token in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            expert = int(ids[token, j])
            if 0 <= expert < count.shape[0]:
                hashed = (token * 2654435769) & 0xFFFFFFFF
                slot = int(table[expert, hashed % max(int(count[expert]), 1)])
            else:
                slot = -1
            out[token, j] = slot
            if record and token < unpadded and 0 <= slot < load.shape[0]:
                load[slot] += 1
    return out


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 40),
    redundant=st.integers(0, 6),
    padding=st.integers(0, 5),
    record=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_matches_the_rules_pair_by_pair(seed, tokens, redundant, padding, record, dtype):
    g = torch.Generator().manual_seed(seed)
    logical, k = 6, 2
    placement = torch.cat(
        [torch.randperm(logical, generator=g), torch.randint(0, logical, (redundant,), generator=g)]
    ).tolist()
    table, count = tables(placement, logical)
    ids = torch.randint(-1, logical + 1, (tokens, k), generator=g).to(dtype)
    unpadded = max(0, tokens - padding)
    load = torch.arange(len(placement), dtype=torch.int32)
    want_load = load.clone()
    want = spelled_out(ids, want_load, table, count, record, unpadded)
    got = map_to_physical_and_record(
        ids, load, table, count, ON if record else OFF, torch.tensor(unpadded, dtype=torch.int32)
    )
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(load, want_load)


def test_counts_into_the_given_view_of_a_larger_buffer():
    table, count = tables([1, 0], 2)
    buffer = torch.zeros(3, 2, dtype=torch.int32)
    map_to_physical_and_record(torch.tensor([[0], [0], [1]]), buffer[1], table, count, ON)
    assert buffer.tolist() == [[0, 0], [1, 2], [0, 0]]


@pytest.mark.parametrize("unpadded", [0, 1])
def test_a_dummy_batch_counts_only_real_tokens(unpadded):
    table, count = tables([0, 1], 2)
    load = torch.zeros(2, dtype=torch.int32)
    map_to_physical_and_record(
        torch.tensor([[0, 1], [0, 1]]), load, table, count, ON, torch.tensor(unpadded)
    )
    assert load.tolist() == [unpadded, unpadded]
