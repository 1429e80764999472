"""Gather, plan, agree, commit: over a group of faked workers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from fakes import EXPERTS, LAYERS, Group, skewed

from gimbal.bench.servers import free_port
from gimbal.core.placement import verify
from gimbal.core.placement.objective import local_share
from gimbal.vllm_plugin.placement import hook
from gimbal.vllm_plugin.placement.agreement import Verdict
from gimbal.vllm_plugin.placement.view import Place


def filled(*args, steps=8, **config):
    group = Group(*args, **config)
    for _ in range(steps):
        group.run_step(skewed(len(group.workers)))
    return group


def test_sources_are_kept_apart_and_experts_move_to_who_asks():
    group = filled(2)
    maps = group.rearrange()
    assert all((m == maps[0]).all() for m in maps)
    counts = group.workers[0].models[0].counts
    np.testing.assert_allclose(counts.routing.counts / counts.routing.steps, skewed(2), rtol=1e-9)
    topology = group.workers[0].place.topology(EXPERTS)
    start = np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, 1))
    assert local_share(start, skewed(2), topology) < 0.1
    assert local_share(maps[0].astype(np.int32), skewed(2), topology) > 0.9


def test_the_rows_of_all_ranks_are_held_once_and_until_they_are_planned_for():
    group = filled(2)
    group.rearrange()
    member, raw = group.members[0], torch.ones(LAYERS, EXPERTS)
    assert member._gathered is None
    made = []

    def all_gather(row):
        assert member._gathered is None, "an older buffer stands beside the new one"
        made.append(torch.stack([row, row]))
        return made[-1]

    for _ in range(2):  # the first is planned for by nobody
        member.begin(True)
        sums = member.gather([raw], all_gather)
        assert torch.equal(sums[0], 2 * raw)
        assert member._gathered is made[-1]


def gathering(rank, port):
    """One of two ranks; nothing of vLLM is needed but its group."""
    parallel_state = SimpleNamespace(
        get_ep_group=lambda: SimpleNamespace(device_group=dist.group.WORLD)
    )
    sys.modules["vllm.distributed.parallel_state"] = parallel_state
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    got = hook._all_gather(torch.arange(3, dtype=torch.float64) + 10 * rank)
    assert got.tolist() == [[0, 1, 2], [10, 11, 12]]
    dist.destroy_process_group()


def test_rows_are_gathered_in_rank_order():
    mp.spawn(gathering, (free_port(),), nprocs=2)


def test_without_drift_the_second_rearrangement_moves_nothing():
    group = filled(2)
    first = group.rearrange()
    for _ in range(8):
        group.run_step(skewed(2))
    second = group.rearrange()
    assert (first[0] == second[0]).all()
    assert group.workers[0].rebalance_log.committed == 1


def test_a_gate_that_cannot_be_passed_keeps_the_map():
    group = filled(2, gate=1e12)
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    assert (group.rearrange()[0] == before).all()
    assert not group.workers[0].rebalance_log.last.committed
    assert "does not exceed" in group.workers[0].rebalance_log.last.reason


@pytest.mark.parametrize(
    ("vote", "reason"),
    [
        ((Verdict.COMMIT, 123), "map not committed: disagree"),
        ((Verdict.KEEP, 0), "map not committed: disagree"),
        ((Verdict.REFUSE, 0), "map not committed: refuse"),
    ],
)
def test_one_rank_that_differs_keeps_the_old_map_everywhere(vote, reason):
    group = filled(2)
    group.votes[1] = vote
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    assert all((m == before).all() for m in group.rearrange())
    assert [w.guard.counts for w in group.workers] == [{reason: 1}] * 2


def test_one_rank_switched_off_hands_all_of_them_to_vllm():
    group = filled(2)
    group.workers[0].guard.disabled = True
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for placement in group.rearrange():
        np.testing.assert_array_equal(placement, np.roll(before, 1, axis=1))
    assert all(member.off for member in group.members)
    for member in group.members:
        member.begin(True)
        assert member.mode == "pass", "vLLM sums its loads again, and nobody votes"


def test_a_rank_without_a_controller_takes_part_and_votes_for_vllm():
    group = filled(2)
    group.members[1].controller = None
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for placement in group.rearrange():  # sums are checked there
        np.testing.assert_array_equal(placement, np.roll(before, 1, axis=1))
    assert all(member.off for member in group.members)


def test_a_group_of_another_size_is_vllms_to_place():
    group = filled(2)
    for worker in group.workers:
        worker.place = Place(worker.place.rank, 4, 1, 4)  # as it was before two ranks left
        worker.models[0].meter, worker.pressure_us = SimpleNamespace(), 7.0
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for placement in group.rearrange():
        np.testing.assert_array_equal(placement, np.roll(before, 1, axis=1))
    reason = "the expert-parallel group has another size"
    assert set(group.workers[0].guard.counts) == {reason}
    assert not group.workers[0].guard.disabled
    for worker in group.workers:  # what is sent where is no longer known either
        assert worker.models[0].meter is None
        assert (worker.pressure_us, worker.pressure_news) == (0.0, True)


def test_a_rank_that_still_compiles_is_waited_for():
    group = filled(2)
    group.workers[1].models[0].ready = False
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    assert all((m == before).all() for m in group.rearrange())
    assert [w.guard.counts for w in group.workers] == [{}, {}]
    group.workers[1].models[0].ready = True
    for _ in range(8):
        group.run_step(skewed(2))
    assert (group.rearrange()[0] != before).any()


def test_an_invalid_map_is_refused(monkeypatch):
    group = filled(2)
    monkeypatch.setattr(verify, "problems", lambda *_: "placement[0]: expert 3 is missing")
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    assert all((m == before).all() for m in group.rearrange())
    assert group.workers[0].guard.counts == {"map not committed: refuse": 1}


def test_a_placer_that_fails_is_counted_and_then_switched_off(monkeypatch):
    group = filled(2)

    def fail(*_args, **_kwargs):
        raise RuntimeError("no plan today")

    for worker in group.workers:
        monkeypatch.setattr(worker.models[0].planner, "decide", fail)
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    assert (group.rearrange()[0] == before).all()
    assert group.workers[0].guard.counts["no plan"] == 2  # the fake group plans twice
    assert (group.rearrange()[0] == before).all()
    assert group.workers[0].guard.disabled
    assert (group.rearrange()[0] == np.roll(before, 1, axis=1)).all()


def test_rows_that_cannot_be_reduced_still_take_part(monkeypatch):
    """The collective must happen: other ranks wait in it."""
    from gimbal.vllm_plugin.placement import controller

    def fail(*_args):
        raise RuntimeError("out of memory")

    group = filled(2)
    monkeypatch.setattr(controller, "reduce_window", fail)
    before = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    assert (group.rearrange()[0] == before).all()
    assert group.workers[0].guard.counts["window could not be reduced"] == 2


def test_vllm_plans_its_profile_run_and_elastic_scaling():
    group = filled(2)
    member = group.members[0]
    member.begin(False)
    old = group.workers[0].models[0].state.physical_to_logical_map
    result = member.rebalance_experts(None, EXPERTS, 1, 1, 2, old)
    np.testing.assert_array_equal(result.numpy(), np.roll(old.numpy(), 1, axis=1))


def gather_logits_first(group):
    """Makes every rank of `group` route all tokens."""
    for worker in group.workers:
        worker.models[0].state.model.moe_layers[0].do_naive_dispatch_combine = True


def test_equal_rows_of_one_window_keep_source_awareness_on():
    group = Group(2)
    for _ in range(4):
        group.run_step(np.repeat(skewed(2)[:1], 2, axis=0))
    group.rearrange()
    worker = group.workers[0]
    assert worker.models[0].counts.routing.counts.shape[0] == 2
    assert worker.guard.counts == {}


def test_ranks_that_count_all_tokens_switch_source_awareness_off_once():
    group = Group(2)
    gather_logits_first(group)
    for _ in range(4):
        group.run_step(np.repeat(skewed(2)[:1], 2, axis=0))
    group.rearrange()
    worker = group.workers[0]
    assert worker.models[0].counts.routing.counts.shape[0] == 1
    assert worker.guard.counts == {"source-awareness off": 1}
    group.rearrange()
    assert worker.guard.counts == {"source-awareness off": 1}


def test_replica_tables_serve_more_of_the_demand_at_home():
    group = filled(2, redundant=4)
    maps = group.rearrange()
    slots_per_rank = maps[0].shape[1] // 2
    near = even = 0.0
    for rank, worker in enumerate(group.workers):
        state = worker.models[0].state
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                held = np.flatnonzero(maps[0][layer] == expert)
                count = int(state.logical_replica_count[layer, expert])
                row = state.logical_to_physical_map[layer, expert].numpy()
                entries = row[:count]
                assert set(entries) <= set(held)
                assert (row[count:] == -1).all()
                assert count == (1 if len(held) == 1 else 32)
                demand = skewed(2)[rank, layer, expert]
                near += demand * (entries // slots_per_rank == rank).mean()
                even += demand * (held // slots_per_rank == rank).mean()
    assert near > even * 1.02


@pytest.mark.parametrize("reason", ["even", "naive"])
def test_replica_tables_are_left_alone(reason):
    group = filled(2, redundant=4, replicas="even" if reason == "even" else "near")
    if reason == "naive":
        gather_logits_first(group)
    group.rearrange()
    for worker in group.workers:
        state = worker.models[0].state
        assert int(state.logical_replica_count.sum()) == LAYERS * (EXPERTS + 4)


def test_records_hold_what_was_predicted_and_what_came_of_it(tmp_path):
    group = filled(2, records=str(tmp_path))
    group.rearrange()
    path = tmp_path / "rebalances.jsonl"
    (first,) = map(json.loads, path.read_text().splitlines())
    assert first["committed"]
    assert first["predicted_gain_us_per_step"] > 0
    assert first["realized_gain_us_per_step"] is None
    assert first["stall_us"] == 1000.0
    for _ in range(8):
        group.run_step(skewed(2))
    group.rearrange()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["realized_gain_us_per_step"] == pytest.approx(
        lines[0]["predicted_gain_us_per_step"], rel=1e-6
    )
    assert lines[0]["local_share_after"] > lines[0]["local_share_before"] + 0.5
    assert not lines[1]["committed"]


def test_straggling_belongs_to_the_engine_whose_experts_are_hot():
    group = Group(2)
    counts = np.ones((2, LAYERS, EXPERTS))
    counts[:, :, 0] = [[500.0] * LAYERS, [400.0] * LAYERS]
    for _ in range(4):
        group.run_step(counts)
    group.rearrange()
    straggling = group.workers[0].straggling_us
    assert straggling[0] > 0
    assert straggling[1] == 0
