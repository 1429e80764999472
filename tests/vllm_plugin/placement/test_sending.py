"""From what workers route to the engine that dispatch chooses."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fakes import EXPERTS, LAYERS, Group, skewed

from gimbal.core.feedback.pressure import PERIOD_STEPS
from gimbal.vllm_plugin.placement.rows import Sources
from gimbal.vllm_plugin.placement.sending import SendMeter

WINDOW = 2 * PERIOD_STEPS


def run(meter, rows, steps, sources=Sources.PER_RANK):
    """`rows` [layers, slots] in every step; returns the steps at which news came."""
    window = torch.zeros((WINDOW, *np.shape(rows)), dtype=torch.int32)
    news = []
    for step in range(steps):
        window[step % WINDOW] = torch.tensor(rows, dtype=torch.int32)
        if meter.step(window, step % WINDOW, sources):
            news.append(step)
    return news


AWAY = [
    [1, 2, 10, 20],
    [3, 4, 30, 40],
]  # [layers, slots], two engines: 100 leave engine 0, 10 engine 1


@pytest.mark.parametrize(
    ("source", "ranks", "sources", "expected"),
    [
        (0, 1, Sources.PER_RANK, 0.5 * 100),
        (1, 1, Sources.PER_RANK, 0.5 * 10),
        (0, 2, Sources.PER_RANK, 0.5 * 100),  # a rank's own tokens, over its own bandwidth
        (0, 2, Sources.PER_ENGINE, 0.5 * 50),  # the engine's tokens, over two ranks' bandwidth
    ],
)
def test_pairs_that_leave_are_counted_where_they_went(source, ranks, sources, expected):
    meter = SendMeter(0.5, source, 2, ranks)
    news = run(meter, AWAY, 40 * PERIOD_STEPS, sources)
    assert news[:2] == [2 * PERIOD_STEPS - 1, 3 * PERIOD_STEPS - 1], "read one period later"
    assert meter.value_us == pytest.approx(expected, rel=1e-3)


def test_pressure_is_damped():
    meter = SendMeter(0.5, 0, 2, 1)
    run(meter, AWAY, 2 * PERIOD_STEPS)
    assert 0 < meter.value_us < 0.5 * 0.5 * 100


@pytest.mark.parametrize("sources", [None, Sources.UNKNOWN])
def test_nothing_is_said_while_nobody_knows_whose_tokens_they_are(sources):
    meter = SendMeter(0.5, 0, 2, 1)
    assert run(meter, AWAY, 4 * PERIOD_STEPS, sources) == []
    assert meter.value_us == 0


def test_a_migration_discards_what_was_counted_by_old_slots():
    meter = SendMeter(0.5, 0, 2, 1)
    run(meter, AWAY, PERIOD_STEPS)
    meter.moved()
    assert run(meter, AWAY, PERIOD_STEPS) == []


def test_a_load_that_cannot_be_measured_is_counted_and_ends_the_pressure():
    group = Group(2, feedback=True)
    worker = group.workers[0]
    worker.pressure_us = 7.0
    worker.models[0].state.expert_load_window = None
    for _ in range(PERIOD_STEPS):
        worker.measure(0)
    assert worker.guard.counts == {"pressure not measured": 1}
    assert worker.pressure_us == 0.0
    assert worker.pressure_news


def test_with_feedback_only_lasting_differences_move_experts():
    def swapped():
        return skewed(2)[::-1].copy()

    flipping, steady = Group(2, feedback=True), Group(2, feedback=True)
    for window in range(4):
        for _ in range(16):
            steady.run_step(skewed(2))
            flipping.run_step(swapped() if window % 2 else skewed(2))
        steady.rearrange()
        flipping.rearrange()
    assert steady.workers[0].rebalance_log.committed == 1
    assert steady.workers[0].models[0].outlook.windows > 4
    assert flipping.workers[0].rebalance_log.committed == 0
    assert flipping.workers[0].guard.counts == {}


def leaving(home: int) -> np.ndarray:
    """[ranks, layers, experts]: both engines ask for the experts of engine `home`."""
    counts = np.ones((2, LAYERS, EXPERTS))
    counts[:, :, home * EXPERTS // 2 : (home + 1) * EXPERTS // 2] = 1000.0
    return counts * [[[1.0]], [[1.01]]]  # equal rows would mean that all ranks see all tokens


@pytest.mark.parametrize("home", [0, 1])
def test_what_an_engine_sends_decides_where_the_next_request_goes(home, tmp_path):
    """Worker, step output, scheduler, board row, dispatcher: the whole way of the pressure."""
    pytest.importorskip("vllm")
    from gimbal.core.config import DispatchConfig
    from gimbal.core.contracts import DispatchRequest
    from gimbal.core.dispatch.dispatcher import Dispatcher
    from gimbal.core.snapshot import ROW_WIDTH, Field
    from gimbal.vllm_plugin.placement.hook import attach_news
    from tests.vllm_plugin import real_scheduler

    group = Group(2, feedback=True, gate=1e12)
    group.run_step(leaving(home))
    group.rearrange()  # until then nobody knows whose tokens a rank counts
    for _ in range(6 * PERIOD_STEPS):
        group.run_step(leaving(home))
    board = np.zeros((2, ROW_WIDTH))
    for engine, worker in enumerate(group.workers):
        folder = tmp_path / str(engine)
        folder.mkdir()
        scheduler = real_scheduler.build(folder, {"levels": ["dispatch", "feedback"]})
        scheduler.add_request(real_scheduler.request("a", 10, output=4))
        sent = scheduler.schedule()
        real_scheduler.finish_step(scheduler, sent, partial(attach_news, group.members[engine]))
        assert not worker.pressure_news
        board[engine] = scheduler.gimbal_signals.row
        assert board[engine, Field.PLACEMENT_PROPOSALS] == 1
        assert 0.0 < board[engine, Field.PLACEMENT_BALANCE] <= 1.0
        scheduler.shutdown()
    assert board[1 - home, Field.EXPERT_PRESSURE_US] > board[home, Field.EXPERT_PRESSURE_US]
    for field in Field:
        if field != Field.EXPERT_PRESSURE_US:
            board[1, field] = board[0, field]

    def choice(weight: float, order: int) -> int:
        dispatcher = Dispatcher(2, DispatchConfig(), feedback_weight=weight)
        request = DispatchRequest("r", 100, 0.0)
        for _ in range(order):  # ties go round
            dispatcher.dispatch(request, None, board, 0.0)
            dispatcher.finished("r")
        return dispatcher.dispatch(request, None, board, 0.0).engine

    assert {choice(0.0, 0), choice(0.0, 1)} == {0, 1}
    assert {choice(1.0, 0), choice(1.0, 1)} == {home}
