"""The load window reduced by age and kind, and carried over a migration."""

from types import SimpleNamespace

import numpy as np
import pytest

from gimbal.vllm_plugin.placement.rows import split_rows
from gimbal.vllm_plugin.placement.window import WindowNotes, carry_over, reduce_window, to_logical

torch = pytest.importorskip("torch")


LAYERS, EXPERTS, SLOTS = 2, 3, 4
MAP = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])


def model_state(window):
    return SimpleNamespace(expert_load_window=window, physical_to_logical_map=MAP)


def reduced(window, notes, now_step, stall_us=0.0):
    raw = to_logical(window, MAP.long(), EXPERTS).sum(dim=0)
    row = reduce_window(model_state(window), raw, notes, now_step, stall_us)
    return split_rows(row.numpy()[None], LAYERS, EXPERTS)


def test_replicas_of_an_expert_add_up():
    window = torch.zeros(3, LAYERS, SLOTS, dtype=torch.int32)
    window[0, 0] = torch.tensor([5, 1, 2, 3])
    notes = WindowNotes(3, half_life_steps=1e9)
    notes.written(0, 1, prefill_tokens=10, decode_tokens=0)
    rows = reduced(window, notes, 1, stall_us=7.0)
    assert rows.raw[0, 0].tolist() == [8, 1, 2]
    assert rows.pairs[0, 0].tolist() == [8, 1, 2]
    assert rows.active_steps[0, 0].tolist() == [1, 1, 1]
    assert rows.steps.tolist() == [1.0]
    assert rows.stall_us.tolist() == [7.0]
    assert rows.squares.tolist() == [rows.pairs.sum() ** 2]


def test_old_steps_fade_and_unwritten_slots_do_not_count():
    window = torch.ones(4, LAYERS, SLOTS, dtype=torch.int32)
    notes = WindowNotes(4, half_life_steps=10)
    notes.written(0, 0, 1, 0)
    notes.written(1, 10, 1, 0)
    notes.written(2, 20, 1, 0)
    rows = reduced(window, notes, 20)
    assert rows.steps[0] == pytest.approx(1.75)
    assert rows.pairs[0, 0, 1] == pytest.approx(1.75)
    assert rows.raw[0, 0, 1] == 4  # what vLLM sums stays what vLLM sums
    assert rows.recorded.tolist() == [3]


def test_mixed_steps_are_divided_by_tokens():
    window = torch.zeros(3, LAYERS, SLOTS, dtype=torch.int32)
    window[:, 0, 1] = torch.tensor([4, 8, 12], dtype=torch.int32)
    notes = WindowNotes(3, half_life_steps=1e9)
    notes.written(0, 1, 0, 4)
    notes.written(1, 2, 8, 0)
    notes.written(2, 3, 9, 3)
    rows = reduced(window, notes, 3)
    assert rows.pairs[0, 0, 1] == pytest.approx(24)
    assert rows.decode_pairs[0, 0, 1] == pytest.approx(4 + 0 + 3)


@pytest.mark.parametrize("seed", range(5))
def test_a_migration_does_not_change_what_was_counted(seed):
    rng = np.random.default_rng(seed)
    window = torch.from_numpy(rng.integers(0, 9, (5, LAYERS, SLOTS)).astype(np.int32))
    after = torch.from_numpy(np.stack([rng.permutation([0, 1, 2, e]) for e in (1, 2)]))
    before = to_logical(window, MAP.long(), EXPERTS)
    carry_over(window, MAP, after, EXPERTS)
    assert torch.equal(to_logical(window, after.long(), EXPERTS), before)
    first = {e: int(np.flatnonzero(after[0].numpy() == e)[0]) for e in range(EXPERTS)}
    others = [s for s in range(SLOTS) if s not in first.values()]
    assert (window[:, 0, others] == 0).all()
