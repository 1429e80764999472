"""A dead or stuck asynchronous worker is reported once."""

from types import SimpleNamespace

from gimbal.vllm_plugin.placement.watch import STUCK_AFTER_S, WorkerWatch

ALIVE = SimpleNamespace(is_alive=lambda: True)
DEAD = SimpleNamespace(is_alive=lambda: False)


def test_a_dead_worker_is_reported_once():
    watch = WorkerWatch()
    assert watch.look(None, False, 0, 0.0) == []
    assert watch.look(ALIVE, False, 0, 1.0) == []
    assert watch.look(DEAD, True, 0, 2.0) == ["dead"]
    assert watch.look(DEAD, True, 0, 3.0) == []


def test_stuck_means_busy_without_a_committed_layer():
    watch = WorkerWatch()
    assert watch.look(ALIVE, True, 1, 0.0) == []
    assert watch.look(ALIVE, True, 1, STUCK_AFTER_S) == []
    assert watch.look(ALIVE, True, 1, STUCK_AFTER_S + 1) == ["stuck"]
    assert watch.look(ALIVE, True, 1, STUCK_AFTER_S + 2) == []
    assert watch.look(ALIVE, True, 2, STUCK_AFTER_S + 3) == []  # it moves again
    assert watch.look(ALIVE, True, 2, 2 * STUCK_AFTER_S + 4) == ["stuck"]


def test_an_idle_worker_is_not_stuck():
    watch = WorkerWatch()
    assert watch.look(ALIVE, False, 3, 0.0) == []
    assert watch.look(ALIVE, False, 3, 10 * STUCK_AFTER_S) == []
    assert watch.look(ALIVE, True, 3, 10 * STUCK_AFTER_S + 1) == []
