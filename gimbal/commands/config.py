"""``gimbal config``: the effective configuration with defaults and descriptions."""

from __future__ import annotations

from pathlib import Path

import click

from gimbal.commands.output import echo_json
from gimbal.core.config_sources import (
    merge_config,
    parse_levels,
    read_config_file,
    to_mapping,
    to_yaml,
)


@click.command()
@click.option(
    "--gimbal-config", "file", type=click.Path(path_type=Path), help="YAML file to start from"
)
@click.option("--levels", help="comma-separated levels, or all, or none")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of YAML")
def command(file: Path | None, levels: str | None, as_json: bool) -> None:
    """Print the effective configuration with defaults and descriptions.

    The output is itself a valid --gimbal-config file.

    Example: gimbal config --levels dispatch,queue
    """
    sources = []
    if file is not None:
        sources.append((str(file), read_config_file(file)))
    if levels is not None:
        sources.append(("--levels", {"levels": parse_levels(levels)}))
    config = merge_config(sources)
    if as_json:
        echo_json(to_mapping(config), indent=2)
    else:
        click.echo(to_yaml(config), nl=False)
