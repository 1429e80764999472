"""``gimbal doctor``: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gimbal.commands.output import echo_json, notes, progress_bar
from gimbal.vllm_plugin.doctor.findings import Finding, report
from gimbal.vllm_plugin.doctor.machine import check_machine
from gimbal.vllm_plugin.doctor.seams_report import (
    check_bodies,
    check_levels,
    check_source_version,
    source_root,
)
from gimbal.vllm_plugin.doctor.software import check_software, vllm_root
from gimbal.vllm_plugin.doctor.surroundings import check_surroundings

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command()
@click.option(
    "--vllm-source",
    type=click.Path(path_type=Path),
    help="check only the symbols of this unpacked vLLM wheel, without importing it",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def command(vllm_source: Path | None, as_json: bool) -> None:
    """Check Python, vLLM, every symbol Gimbal relies on, and the machine.

    Exit code 1 when a check failed; warnings do not count.

    Example: gimbal doctor --json
    """
    findings = []
    with progress_bar(notes(), "checking") as bar:
        for finding in _findings(vllm_source):
            findings.append(finding)
            bar.say(f"checked {finding.check}")
    result = report(findings)
    if as_json:
        echo_json(result, indent=2)
    else:
        _show(findings)
    sys.exit(0 if result["ok"] else 1)


def _findings(vllm_source: Path | None) -> Iterator[Finding]:
    """One after the other: some take seconds."""
    if vllm_source is not None:
        root = source_root(vllm_source)
        yield check_source_version(root)
        yield from check_levels(root)
        yield check_bodies(root)
        return
    yield from check_software()
    installed = vllm_root()
    if installed is not None:
        yield from check_levels(installed)
        yield check_bodies(installed)
    yield from check_machine()
    yield from check_surroundings()


def _show(findings: list[Finding]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        colour = _COLOURS[finding.status]
        found = finding.found + (f"\n-> {finding.advice}" if finding.advice else "")
        table.add_row(Text(finding.status, style=colour), finding.check, found)
    # A pipe has no width: rich would cut lines at 80 columns there.
    console = Console()
    Console(width=None if console.is_terminal else 200, markup=False).print(table)
