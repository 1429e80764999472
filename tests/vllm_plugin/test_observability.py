"""Rules, dashboard and pages name metrics that exist, and Prometheus' own tool accepts them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("prometheus_client")

from tests.vllm_plugin import exposition

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/observability"
RULES = FOLDER / "gimbal-rules.yaml"
RULE_TESTS = FOLDER / "gimbal-rules-test.yaml"
DASHBOARD = FOLDER / "grafana/dashboards/gimbal.json"
PAGES = [ROOT / "README.md", FOLDER / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
AREAS = "board|build|dispatch|engine|fallback|inflight|level|placement|queue|signal|unacknowledged"
METRIC = re.compile(rf"\bgimbal_(?:{AREAS})_[a-z0-9_]*[a-z0-9](?![a-z0-9_*])")


def rules() -> list[dict[str, Any]]:
    return [r for group in yaml.safe_load(RULES.read_text())["groups"] for r in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> list[str]:
    """Those of the dashboard, with its variables filled in."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [
        e.replace("$__rate_interval", "1m").replace("$model", "m").replace("$instance", ".*")
        for e in found
    ]


def names_in_metrics() -> set[str]:
    """Every name of a sample that ``/metrics`` can hold."""
    exposition.served("names")
    found = set()
    for family in exposition.families():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum", ""]}
        found |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    return found


@pytest.mark.parametrize("path", [RULES, RULE_TESTS, DASHBOARD, *PAGES], ids=lambda p: p.name)
def test_every_metric_that_is_named_exists(path: Path) -> None:
    named = set(METRIC.findall(path.read_text()))
    assert named or path in PAGES
    assert named - names_in_metrics() == set()


def test_every_recorded_metric_is_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = re.findall(r"\bgimbal:[a-z0-9_:]+", DASHBOARD.read_text() + RULES.read_text())
    assert set(used) == recorded


def test_vllms_metrics_of_the_dashboard_exist() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    loggers = Path(spec.submodule_search_locations[0], "v1/metrics/loggers.py").read_text()
    used = re.findall(r"vllm:[a-z_]+(?=_bucket)", DASHBOARD.read_text())
    assert used
    assert all(f'"{name}"' in loggers for name in used)


def test_every_alert_has_a_summary_and_a_test() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    fired = {
        label
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for case in test["promql_expr_test"]
        for sample in case["exp_samples"]
        for label in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    assert {alert["alert"] for alert in alerts} == fired
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert set(alert["annotations"]) == {"summary", "description"}


def test_the_dashboard_fits_together() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", DASHBOARD.read_text()))
    assert used <= variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covered = set(
            itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
        )
        assert not covered & cells, panel["title"]
        cells |= covered
    for panel in panels():
        assert panel["description"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["legendFormat"]
            assert target["datasource"]["uid"] == "${datasource}"


def test_the_compose_file_mounts_what_is_there() -> None:
    compose = yaml.safe_load((FOLDER / "docker-compose.yaml").read_text())
    for service in compose["services"].values():
        assert ":" in service["image"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (FOLDER / source).exists(), volume
    scraped = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert scraped["rule_files"] == [RULES.name]
    for path in (FOLDER / "grafana/provisioning").glob("*/*.yaml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1


def promtool(*arguments: str | Path) -> None:
    """Runs it in the example's folder; skips where it is missing."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool, of Debian's package prometheus, is not on the PATH")
    command = [found, *map(str, arguments)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yaml")
    promtool("check", "rules", "--lint-fatal", RULES.name)


def test_promtool_runs_the_tests_of_the_rules() -> None:
    promtool("test", "rules", RULE_TESTS.name)


def test_promtool_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [{"record": f"q:{i}", "expr": e} for i, e in enumerate(expressions())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": queries}]}))
    assert len(queries) > 40
    promtool("check", "rules", path)
