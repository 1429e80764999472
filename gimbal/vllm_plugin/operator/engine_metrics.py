"""Engines in ``/metrics`` where no front end dispatches: read from the board at every scrape.

With one engine, or behind an external load balancer, nobody refreshes the metrics of the engines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.dispatch.metrics import dispatch_metrics
from gimbal.vllm_plugin.metrics import model_name

if TYPE_CHECKING:
    from gimbal.vllm_plugin.operator.routes import Operator

METRICS = "/metrics"
_guard = LevelGuard("metrics")


class EngineMetrics:
    """The metrics of one API server without a front end.

    Args:
        operator: of this API server.
        counts: it is the first of its server, see `row_metrics`.
    """

    def __init__(self, operator: Operator, counts: bool) -> None:
        self.operator = operator
        self.metrics = dispatch_metrics()
        reader = operator.reader
        ranks = range(reader.first, reader.first + reader.engines)
        self.metrics.serve(model_name(operator.engine_client.vllm_config), ranks, counts)

    def refresh(self) -> None:
        """Shows the newest rows, and the levels in force; dispatch is not among them."""
        levels = self.operator.board.read_control().get("levels", self.operator.config.levels)
        self.metrics.levels_in_force([level for level in levels if level != "dispatch"])
        self.metrics.show_engines(self.operator.reader.first, self.operator.reader.read())


def metrics_without_front_end(operator: Operator | None) -> EngineMetrics | None:
    """Made where they are needed; None where Gimbal is off, or a front end has its own."""
    if operator is None or operator.front_end is not None:
        return None
    index = getattr(operator.engine_client.engine_core, "client_index", 0)
    return _guard.run("serve", EngineMetrics, operator, index == 0)


class ReadAtScrape:
    """ASGI middleware: what ``/metrics`` is about to show is read first."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == METRICS:
            metrics = getattr(scope["app"].state, "gimbal_engine_metrics", None)
            if metrics is not None:
                _guard.run("refresh", metrics.refresh)
        await self.app(scope, receive, send)
