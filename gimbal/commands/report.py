"""``gimbal report``: one HTML page from the records of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="file to write (default: DIRECTORY/report.html)"
)
def command(directory: Path, out: Path | None) -> None:
    """Write one self-contained HTML page with tables and plots for the run in DIRECTORY.

    DIRECTORY is what `gimbal bench` or `gimbal simulate` wrote with --out.
    """
    from gimbal.bench.report import write_report

    click.echo(f"wrote {write_report(directory, out)}")
