"""Pages about deployments: flags, metrics and plugins that they name are there."""

from __future__ import annotations

import re

import yaml

from gimbal.commands.serve import command
from gimbal.vllm_plugin.dispatch.row_metrics import ENGINE
from gimbal.vllm_plugin.serve.command_line import vllm_table
from tests.test_docs import ROOT
from tests.test_docs_commands import VLLM

ROUTERS = ROOT / "docs" / "routers.md"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OF_ROUTERS = {
    "--intra-node-data-parallel-size",
    "--policy",
    "--service-discovery",
    "--vllm-pd-disaggregation",
    "--worker-startup-check-interval",
    "--worker-urls",
}
"""Flags of vllm-router (`docs/cli_reference.md` there, read at df71929)."""


def test_flags_are_vllms_gimbals_or_a_routers() -> None:
    known = {name for flag in vllm_table(VLLM)["flags"] for name in flag["flags"]}
    known |= {name for option in command.params for name in option.opts}
    named = set(FLAG.findall(ROUTERS.read_text(encoding="utf-8")))
    assert named - known == OF_ROUTERS
    assert len(named & known) >= 5


def test_metrics_that_a_router_reads_are_exported() -> None:
    named = set(re.findall(r"gimbal_engine_(\w+)", ROUTERS.read_text(encoding="utf-8")))
    assert named
    assert named <= {name for name, _ in ENGINE.values()}


def test_the_pickers_configuration_names_what_it_declares() -> None:
    text = ROUTERS.read_text(encoding="utf-8")
    picker = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    declared = {plugin.get("name", plugin["type"]) for plugin in picker["plugins"]}
    used = {step["pluginRef"] for part in picker["schedulingProfiles"] for step in part["plugins"]}
    assert used <= declared
    extractor, scorer = (plugin["parameters"] for plugin in picker["plugins"][:2])
    (engine,) = extractor["engineConfigs"]
    (metric,) = engine["customMetrics"]
    assert metric["attributeKey"] == scorer["attributeKey"]
