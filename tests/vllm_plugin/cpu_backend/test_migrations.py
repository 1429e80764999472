"""Counting committed maps, and noticing an asynchronous worker that is dead or stuck."""

from types import SimpleNamespace

import torch

from gimbal.vllm_plugin.cpu_backend.migrations import STUCK_AFTER_S, MigrationCounter


def state(maps, is_async=False, alive=True):
    model = SimpleNamespace(physical_to_logical_map=torch.tensor(maps), rebalanced=False)
    thread = SimpleNamespace(is_alive=lambda: alive)
    return SimpleNamespace(model_states={"m": model}, is_async=is_async, async_worker=thread)


def commit(eplb, maps):
    eplb.model_states["m"].physical_to_logical_map.copy_(torch.tensor(maps))


def test_counts_changed_slots_layers_and_rearrangements():
    counter, eplb = MigrationCounter(), state([[0, 1, 2], [0, 1, 2]])
    counter.after_step(eplb)
    counter.after_step(eplb)
    assert counter.as_dict() == {"rearrangements": 0, "layers": 0, "slots": 0, "worker": "none"}
    commit(eplb, [[1, 0, 2], [0, 1, 2]])
    counter.after_step(eplb)
    commit(eplb, [[1, 0, 2], [2, 0, 1]])
    counter.after_step(eplb)
    assert counter.as_dict() == {"rearrangements": 2, "layers": 2, "slots": 5, "worker": "none"}


def test_an_asynchronous_rearrangement_counts_once_when_its_last_layer_is_in():
    counter, eplb = MigrationCounter(), state([[0, 1], [0, 1]], is_async=True)
    model = eplb.model_states["m"]
    counter.after_step(eplb, now_s=0)
    model.rebalanced = True
    commit(eplb, [[1, 0], [0, 1]])
    counter.after_step(eplb, now_s=1)
    assert counter.report.rearrangements == 0
    commit(eplb, [[1, 0], [1, 0]])
    model.rebalanced = False
    counter.after_step(eplb, now_s=2)
    assert (counter.report.rearrangements, counter.report.layers) == (1, 2)
    assert counter.report.worker == "alive"


def test_reports_a_dead_worker(caplog):
    counter = MigrationCounter()
    eplb = state([[0, 1]], is_async=True, alive=False)
    counter.after_step(eplb, now_s=0)
    counter.after_step(eplb, now_s=1)
    assert counter.report.worker == "dead"
    assert len([r for r in caplog.records if "is dead" in r.message]) == 1


def test_reports_a_worker_that_makes_no_progress(caplog):
    counter, eplb = MigrationCounter(), state([[0, 1]], is_async=True)
    counter.after_step(eplb, now_s=0)
    eplb.model_states["m"].rebalanced = True
    counter.after_step(eplb, now_s=STUCK_AFTER_S - 1)
    assert counter.report.worker == "alive"
    counter.after_step(eplb, now_s=STUCK_AFTER_S + 1)
    assert counter.report.worker == "stuck"
    assert "is stuck" in caplog.text
