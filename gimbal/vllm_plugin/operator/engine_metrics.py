"""Engines in ``/metrics``, read from the board at every scrape and set in a thread.

Setting the gauges of 256 engines takes some 15 ms, with several API servers 45 ms. A front end
that knows of scrapes leaves them to this module. With one engine, or behind an external load
balancer, there is no front end and nobody else who counts either.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gimbal.core.contracts import EngineLoads
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.dispatch.metrics import dispatch_metrics
from gimbal.vllm_plugin.metrics import model_name
from gimbal.vllm_plugin.operator.load import loads_of

if TYPE_CHECKING:
    from gimbal.vllm_plugin.operator.routes import Operator

METRICS = "/metrics"
_guard = LevelGuard("metrics")


class EngineMetrics:
    """The metrics of one API server's engines.

    Args:
        operator: of this API server.
        counts: it is the first of its server, see `row_metrics`.
    """

    def __init__(self, operator: Operator, counts: bool) -> None:
        self.operator = operator
        self.metrics = dispatch_metrics()
        self._turn = asyncio.Lock()
        if operator.front_end is None:
            reader = operator.reader
            ranks = range(reader.first, reader.first + reader.engines)
            self.metrics.serve(model_name(operator.engine_client.vllm_config), ranks, counts)
        self.metrics.at_scrape = True

    async def refresh(self) -> None:
        """Shows what the engines have published last; one scrape after the other."""
        async with self._turn:
            loads = _guard.run("refresh", self._read)
            if loads is not None:
                await asyncio.to_thread(_guard.run, "refresh", self._show, loads)

    def _read(self) -> EngineLoads:
        """Counts what nobody else counts. The accounts go on while a thread reads: a copy."""
        operator = self.operator
        loads = loads_of(operator)
        if operator.front_end is None:
            levels = operator.board.read_control().get("levels", operator.config.levels)
            self.metrics.levels_in_force([level for level in levels if level != "dispatch"])
            self.metrics.count(operator.reader.first, loads)
        return loads._replace(
            unacked_requests=loads.unacked_requests.copy(),
            unacked_tokens=loads.unacked_tokens.copy(),
            unacked_cached_tokens=loads.unacked_cached_tokens.copy(),
        )

    def _show(self, loads: EngineLoads) -> None:
        front_end = self.operator.front_end
        decision = None if front_end is None else front_end.decision
        self.metrics.show(self.operator.reader.first, loads, decision)


def metrics_at_scrape(operator: Operator | None) -> EngineMetrics | None:
    """None where Gimbal is off."""
    if operator is None:
        return None
    index = getattr(operator.engine_client.engine_core, "client_index", 0)
    return _guard.run("serve", EngineMetrics, operator, index == 0)


class ReadAtScrape:
    """ASGI middleware: what ``/metrics`` is about to show is read first."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and _path(scope) == METRICS:
            metrics = getattr(scope["app"].state, "gimbal_engine_metrics", None)
            if metrics is not None:
                await metrics.refresh()
        await self.app(scope, receive, send)


def _path(scope: Any) -> str:
    """Without what a proxy before this server has put in front."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/")
