"""vLLM engines as replicas of Ray Serve, chosen by Gimbal's router: what `benchmarks/ray_serve.py`
measures, in short. Ray is not among what `make install` brings: `.venv/bin/pip install '.[ray]'`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gimbal.records.store import RunReader

ROOT = Path(__file__).resolve().parents[2]
missing = find_spec("ray") is None or find_spec("ray.serve") is None
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing, reason="Ray Serve is not installed (the extra `ray`)"),
]


def test_every_request_ends_and_a_dead_replica_costs_what_was_on_it(
    server_pool: Any, tmp_path: Path
) -> None:
    server_pool.stop()
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "benchmarks.ray_serve", str(folder)]
    command += ["--turns", "2", "--span", "16"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    requests = list(RunReader(folder).requests())
    assert {request.arm for request in requests} == {"ray", "gimbal"}
    assert {request.status for request in requests} == {"ok"}
    assert all(r.output_tokens == r.expected_output_tokens for r in requests)
    beside = json.loads((folder / "beside.json").read_text())
    for served in beside["served"]["gimbal"]:
        assert len(served) == 2, "one of the replicas got nothing"
    for arm, found in beside["kills"].items():
        assert found["lost"] <= found["in_flight"], (arm, found)
        assert found["served_after"] >= 0.9 * found["sent_after"], (arm, found)
