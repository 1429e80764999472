"""The demo served by somebody else's three policies, from a package with entry points.

The package is `examples/policies`; tests/test_plugin_package.py installs it by pip. Here only its
metadata are written, and its folder is on the path.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import tomllib
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live.client import burst, call

pytestmark = pytest.mark.live

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "policies"
SITE = Path(tempfile.gettempdir()) / "gimbal-live-foreign-policies"
NAMES = {"dispatch": "fewest-tokens", "ordering": "aged-shortest", "placer": "one-swap"}
CONFIG = {
    "admin": True,
    "dispatch": {"policy": NAMES["dispatch"]},
    "queue": {"ordering": NAMES["ordering"], "options": {"tokens_per_s": 300.0}},
    "placement": {"placer": NAMES["placer"], "gate": 0.0},
}
EPLB = {"window_size": 60, "step_interval": 80, "communicator": "torch_gloo"}
FLAGS = (
    *("--additional-config", json.dumps({"gimbal": CONFIG})),
    *("--eplb-config", json.dumps(EPLB)),
)
PATH = os.pathsep.join(filter(None, (str(SITE), str(EXAMPLE), os.environ.get("PYTHONPATH"))))
RUINED = """
import numpy as np


class Nan:
    def costs(self, request, loads):
        return np.full(len(loads.board), np.nan)
"""


@pytest.fixture(scope="module", autouse=True)
def site() -> Iterator[None]:
    """What pip would leave of the package beside its code; made before the server starts."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    shutil.rmtree(SITE, ignore_errors=True)
    record = SITE / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items())]
    (record / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (SITE / "ruined_policies.py").write_text(RUINED)
    yield
    shutil.rmtree(SITE, ignore_errors=True)


def decided(server: Any, policy: str) -> int:
    """Decisions that `policy` itself has made."""
    decisions = call(f"{server.root}/gimbal/status")["dispatch"]["decisions"]
    return sum(d["count"] for d in decisions if (d["policy"], d["reason"]) == (policy, "policy"))


@pytest.mark.server(*FLAGS, env={"PYTHONPATH": PATH})
def test_the_demo_serves_with_all_three(server: Any) -> None:
    assert call(f"{server.root}/gimbal/status")["policies"] == NAMES
    burst(server, 40)
    status = call(f"{server.root}/gimbal/status")
    assert decided(server, NAMES["dispatch"]) >= 40
    assert status["dispatch"]["fallbacks"] == {}
    for engine in status["engines"]:
        assert engine["queue_fallbacks"] == engine["placement_fallbacks"] == 0
    log = server.log.read_text(errors="replace")
    assert "queue ordering aged-shortest goes without graph_steps (sizes_steps)" in log


@pytest.mark.server(*FLAGS, env={"PYTHONPATH": PATH})
def test_an_operator_switches_between_foreign_policies(server: Any) -> None:
    control = f"{server.root}/gimbal/control"
    with pytest.raises(urllib.error.HTTPError) as error:
        call(control, {"policy": "fewest-token"})
    assert error.value.code == 400
    assert "did you mean 'fewest-tokens'" in error.value.read().decode()
    call(control, {"queue_ordering": NAMES["ordering"], "queue": {"options": {"tokens_per_s": 50}}})
    call(control, {"policy": "ruined_policies:Nan"})
    burst(server, 24)
    status = call(f"{server.root}/gimbal/status")
    assert status["dispatch"]["fallbacks"]["error"] >= 20
    assert status["dispatch"]["switched_itself_off"]
    assert status["policies"] == NAMES | {"dispatch": None}
    log = server.log.read_text(errors="replace")
    assert "dispatch policy 'ruined_policies:Nan': costs [nan, nan]" in log
    burst(server, 8)
