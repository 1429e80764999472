"""``gimbal report``: one HTML page from the records of a run or of a reproduction."""

from __future__ import annotations

from pathlib import Path

import click

from gimbal.commands.options import OutFile
from gimbal.commands.output import echo_json, notes, progress_bar


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", type=OutFile(), help="file to write (default: DIRECTORY/report.html)")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def command(directory: Path, out: Path | None, as_json: bool) -> None:
    """Write one self-contained HTML page with tables and charts for the run in DIRECTORY.

    DIRECTORY is what `gimbal bench` or `gimbal simulate` wrote with --out, or the one of
    `gimbal reproduce`. The charts also go to `plots` beside the page, each as an SVG file.

    Example: gimbal report runs/mine --out report.html
    """
    from gimbal.report.report import write_report

    with progress_bar(notes(), "drawing"):
        if (directory / "result.json").exists():  # of a whole reproduction
            from gimbal.commands.reproduce import laboratory

            path = laboratory("report").write_reproduction(directory, out)
        else:
            path = write_report(directory, out)
    if as_json:
        echo_json({"page": str(path), "plots": str(path.parent / "plots")})
        return
    click.echo(f"wrote {path} and its charts as SVG in {path.parent / 'plots'}")
