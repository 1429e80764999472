"""``gimbal serve``: vLLM's OpenAI server with Gimbal on."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
from rich.console import Console

from gimbal.commands.options import OutFolder
from gimbal.commands.output import notes, progress_bar


@click.command(
    # Unknown options are vLLM's, among them short ones that contain an h.
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
)
@click.option("--demo", is_flag=True, help="make a tiny MoE and serve it with DP=2 and EP")
@click.option(
    "--demo-dir",
    type=OutFolder(),
    help="folder of the demo model (default: a cache)",
)
@click.option("--levels", help="comma-separated levels, or all, or none (default: all)")
@click.option(
    "--gimbal-config", type=click.Path(path_type=Path), help="YAML file (see `gimbal config`)"
)
@click.option("--verbose", is_flag=True, help="show vLLM's whole log while starting")
@click.option("--dry-run", is_flag=True, help="check, print the vLLM command, start nothing")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    demo: bool,
    demo_dir: Path | None,
    levels: str | None,
    gimbal_config: Path | None,
    verbose: bool,
    dry_run: bool,
    arguments: tuple[str, ...],
) -> None:
    """Serve MODEL through vLLM's own OpenAI server, with Gimbal's levels on.

    ARGUMENTS are MODEL and any flags of `vllm serve`, passed on untouched. Gimbal's settings come
    from --gimbal-config, then vLLM's --additional-config '{"gimbal": {...}}', then --levels;
    later ones win.

    Example: gimbal serve Qwen/Qwen3-30B-A3B -dp 2 -ep
    """
    from gimbal.vllm_plugin.placement import compiling
    from gimbal.vllm_plugin.serve.plan import plan_server
    from gimbal.vllm_plugin.serve.supervisor import Supervisor

    with progress_bar(notes(), "making the demo model" if demo else "checking"):
        plan = plan_server(
            arguments,
            demo=demo or demo_dir is not None,
            demo_dir=demo_dir,
            levels=levels,
            config_file=gimbal_config,
        )
    for warning in plan.warnings:
        click.echo(f"gimbal: {warning}", err=True)
    if dry_run:
        words = [f"{name}={shlex.quote(value)}" for name, value in plan.environment.items()]
        click.echo(" ".join([*words, shlex.join(plan.command)]))
        return
    if plan.places_experts:
        compiling.in_background()  # the supervisor ends every process below this one
    sys.exit(Supervisor(plan, verbose=verbose, console=Console(soft_wrap=True)).run())
