"""Engines as actors of a local Ray: they and every API server find one board, all levels act.

Ray is not among what `make install` brings: `.venv/bin/pip install '.[ray]'`.
"""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gimbal.demo.manifest import load_manifest
from tests.live.client import burst, call
from tests.live.conftest import DemoServer
from tests.live.test_placement import CONFIG, EPLB, load

MOVE_TIMEOUT_S = 240.0
FOLDERS = [str(Path(__file__).with_name(name)) for name in ("ray_on_cpu", "on_import")]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (*FOLDERS, os.environ.get("PYTHONPATH")))),
    "RAY_USAGE_STATS_ENABLED": "0",
}
GIMBAL = {"admin": True, "placement": CONFIG}
FLAGS = (
    *("--data-parallel-backend", "ray"),
    *("--eplb-config", json.dumps(EPLB | {"use_async": False})),
    *("--additional-config", json.dumps({"gimbal": GIMBAL})),
)
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)"),
]


def servers(count: int) -> Any:
    """The test's parameter, with its server."""
    flags = (*FLAGS, "--api-server-count", str(count))
    return pytest.param(
        count,
        id=f"{count}-api-servers",
        marks=pytest.mark.server(*flags, env=ENVIRONMENT),
    )


@pytest.mark.parametrize("count", [servers(1), servers(2)])
def test_all_levels_act(server: DemoServer, count: int) -> None:
    from gimbal.vllm_plugin.serve.plan import demo_model

    burst(server, 8)  # the first rows come
    decisions = "gimbal_dispatch_decisions_total"
    before = server.total(decisions, reason="policy")
    burst(server, 40)
    assert server.total(decisions, reason="policy") - before == 40
    assert server.total("gimbal_fallback_total") == 0
    board = Path(call(f"{server.root}/gimbal/status")["board"]["path"])
    assert sorted(board.parent.glob("gimbal-*.board")) == [board]
    rows = server.metric_by_engine("gimbal_engine_snapshots_total")
    assert min(rows["0"], rows["1"]) > 10, rows

    call(f"{server.root}/gimbal/control", {"queue_ordering": "sjf"})
    deadline_s = time.monotonic() + 60
    while server.log.read_text(errors="replace").count("Gimbal: queue ordering sjf") < 2:
        assert time.monotonic() < deadline_s, "not every engine follows"
        burst(server, 8)

    manifest, rng = load_manifest(demo_model()), np.random.default_rng(0)
    deadline_s = time.monotonic() + MOVE_TIMEOUT_S
    while not server.total("gimbal_placement_moved_experts_total"):
        assert time.monotonic() < deadline_s, "no experts moved"
        load(server, manifest, rng)
