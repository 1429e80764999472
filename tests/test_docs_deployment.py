"""Pages about deployments: what they name is there, and the tables say something of every shape."""

from __future__ import annotations

import re
from itertools import takewhile

import yaml

from gimbal.commands.serve import command
from gimbal.vllm_plugin.dispatch.row_metrics import ENGINE
from gimbal.vllm_plugin.serve.command_line import vllm_table
from tests.test_docs import ROOT, TEST, defines_test
from tests.test_docs_commands import VLLM

ROUTERS = ROOT / "docs" / "routers.md"
DEPLOYMENT = ROOT / "docs" / "deployment.md"
LEVELS = ["dispatch", "queue", "placement", "feedback"]
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
    assert set(FLAG.findall(DEPLOYMENT.read_text(encoding="utf-8"))) <= known
    assert named - known == OF_ROUTERS
    assert len(named & known) >= 5


def test_metrics_that_a_router_reads_are_exported() -> None:
    named = set(re.findall(r"gimbal_engine_(\w+)", ROUTERS.read_text(encoding="utf-8")))
    assert named
    # The other gauge of engines is no column of the row.
    predicted = "predicted_time_to_first_token_seconds"
    assert named <= {predicted, *(name for name, _ in ENGINE.values())}


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


CELL = re.compile(r"(acts|steps aside and says so)(?: \((read)\)| \(tested: `([^`]+)`\))?")


def shapes(text: str) -> dict[str, list[str]]:
    """Shape -> its cells, of the table of levels in `text`."""
    table = text.partition("| shape |")[2].splitlines()
    assert [word.strip() for word in table[0].strip("|").split("|")] == LEVELS
    lines = takewhile(lambda line: line.startswith("|"), table[2:])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {shape: rest for shape, *rest in cells}


def test_every_shape_and_level_has_a_word_and_its_test_is_there() -> None:
    found = shapes(DEPLOYMENT.read_text(encoding="utf-8"))
    assert len(found) >= 15
    for shape, cells in found.items():
        assert len(cells) == len(LEVELS), shape
        for cell in cells:
            match = CELL.fullmatch(cell)
            assert match is not None, (shape, cell)
            word, read, test = match.groups()
            assert word != "acts" or read or test, (shape, cell)
            if test is not None:
                named = TEST.fullmatch(test)
                assert named is not None, cell
                assert defines_test(ROOT / named[1], named[2]), cell


def test_the_readmes_table_is_the_long_one_in_short() -> None:
    short = shapes((ROOT / "README.md").read_text(encoding="utf-8"))
    long = shapes(DEPLOYMENT.read_text(encoding="utf-8"))
    kinds = {"acts (t": "acts (tested)", "acts (r": "acts (read)", "steps a": "steps aside"}
    assert short == {shape: [kinds[cell[:7]] for cell in cells] for shape, cells in long.items()}
