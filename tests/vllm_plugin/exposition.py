"""Gimbal's metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from gimbal.core.contracts import EngineLoads
from gimbal.core.snapshot import ROW_WIDTH, Field
from gimbal.vllm_plugin.dispatch.metrics import DispatchMetrics, dispatch_metrics
from gimbal.vllm_plugin.queue.metrics import SIZE_CLASSES, _histogram


def served(model: str, engines: int = 2) -> DispatchMetrics:
    """A server of `model` that has just started with every level on."""
    metrics = dispatch_metrics()
    metrics.serve(model, range(engines))
    metrics.policy_in_force("gimbal")
    metrics.levels_in_force(("dispatch", "queue", "placement", "feedback"))
    for _, label in SIZE_CLASSES:
        _histogram().labels(model, label)
    return metrics


def rows(engines: int = 2, epoch: float = 1.0, **values: Any) -> np.ndarray:
    """[engines, ROW_WIDTH] snapshots; `values` by field name."""
    board = np.zeros((engines, ROW_WIDTH))
    board[:, Field.SEQUENCE], board[:, Field.EPOCH] = 1, epoch
    for name, value in values.items():
        board[:, Field[name]] = value
    return board


def refresh(metrics: DispatchMetrics, board: np.ndarray) -> None:
    """Shows `board` of a front end without requests."""
    none = np.zeros(len(board))
    metrics.at_scrape = False
    metrics.refresh(0, EngineLoads(board, none, none, none, none, none, none, none), None)


def families() -> list[Any]:
    """All of Gimbal's families in the registry that vLLM serves."""
    return [family for family in REGISTRY.collect() if family.name.startswith("gimbal_")]


def samples(model: str) -> dict[tuple[str, str, str], float]:
    """Samples of `model` by name, engine and reason; "" for a label that is not there."""
    return {
        (s.name, s.labels.get("engine", ""), s.labels.get("reason", "")): s.value
        for family in families()
        for s in family.samples
        if s.labels.get("model_name") == model and "le" not in s.labels
    }


def text() -> bytes:
    """What ``/metrics`` says of Gimbal."""

    class Ours:
        def collect(self) -> Iterator[Any]:
            yield from families()

    registry = CollectorRegistry()
    registry.register(Ours())
    return generate_latest(registry)
