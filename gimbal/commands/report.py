"""``gimbal report``: one HTML page from the records of a run or of a reproduction."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="file to write (default: DIRECTORY/report.html)"
)
def command(directory: Path, out: Path | None) -> None:
    """Write one self-contained HTML page with tables and plots for the run in DIRECTORY.

    DIRECTORY is what `gimbal bench` or `gimbal simulate` wrote with --out, or the one of
    `gimbal reproduce`. Plots also go to `plots` beside the page, as SVG and (with matplotlib,
    `pip install 'gimbal-moe[plot]'`) as PNG.
    """
    from gimbal.report.report import write_report

    if (directory / "result.json").exists():  # of a whole reproduction
        from gimbal.commands.reproduce import laboratory

        path = laboratory("report").write_reproduction(directory, out)
    else:
        path = write_report(directory, out)
    png = "SVG and PNG" if find_spec("matplotlib") else "SVG (PNG needs matplotlib)"
    click.echo(f"wrote {path} and plots as {png} in {path.parent / 'plots'}")
