"""``gimbal model``: make the demo model and measure its routing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gimbal.commands.options import OutFolder, Real, Whole
from gimbal.commands.output import echo_json, notes, progress_bar
from gimbal.demo.sizes import DemoSizes

if TYPE_CHECKING:
    from gimbal.vllm_plugin.cpu_backend.model_stats import ModelStats

TOKENS = Whole(1, 1 << 20)
_DEFAULTS = DemoSizes()
_HELP = {
    "seed": "seed of every random draw; the same seed gives the same bytes",
    "layers": "decoder layers, all of them MoE",
    "experts": "routed experts per layer",
    "top_k": "experts per token",
    "hidden": "width of the residual stream, a multiple of 32",
    "moe_intermediate": "width of one expert, a multiple of 32",
    "vocab": "tokens: 256 bytes, 3 special, the rest words",
    "domains": "groups of prompts that prefer different experts",
    "heads": "attention heads of 32 channels",
    "kv_heads": "key/value heads",
    "max_position": "longest context in tokens",
    "skew": "hottest expert over the mean, within a domain",
    "divergence_bits": "Jensen-Shannon divergence between two domains",
}


def _size_options(function: Callable[..., None]) -> Callable[..., None]:
    for name in reversed(_HELP):
        default = getattr(_DEFAULTS, name)
        function = click.option(
            "--" + name.replace("_", "-"),
            type=Whole() if isinstance(default, int) else Real(),
            default=default,
            show_default=True,
            help=_HELP[name],
        )(function)
    return function


@click.group()
def command() -> None:
    """Make and measure the demo model."""


@command.command()
@click.option("--out", type=OutFolder(), required=True, help="folder to write")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@_size_options
def demo(out: Path, as_json: bool, **sizes: Any) -> None:
    """Writes a tiny Qwen3-MoE whose routing depends on the prompt's domain.

    Example: gimbal model demo --out demo-model --experts 32
    """
    from gimbal.demo.model import make_demo_model

    with progress_bar(notes(), "making the layers") as bar:
        made = make_demo_model(out, DemoSizes(**sizes), bar.update)
    size = sum(f.stat().st_size for f in made.iterdir())
    if as_json:
        echo_json({"model": str(made), "bytes": size, **sizes})
        return
    click.echo(f"{made}: {sizes['layers']} layers, {sizes['experts']} experts, {size / 1e6:.0f} MB")


@command.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--seed", type=Whole(), default=0, show_default=True, help="seed of the prompts")
@click.option(
    "--prompts", type=Whole(2, 10_000), default=8, show_default=True, help="per domain (even)"
)
@click.option(
    "--prompt-tokens", type=TOKENS, default=512, show_default=True, help="tokens per prompt"
)
@click.option(
    "--continuation-tokens", type=TOKENS, default=64, show_default=True, help="greedy tokens each"
)
def stats(model: Path, as_json: bool, **options: Any) -> None:
    """Runs the demo model over prompts of each domain and prints how its tokens route.

    Example: gimbal model stats demo-model --prompts 4
    """
    from gimbal.vllm_plugin.cpu_backend.model_stats import measure

    with progress_bar(notes(), "running the model") as bar:
        measured = measure(model, **options, on_done=bar.update)
    if as_json:
        echo_json(measured.as_json())
        return
    _print(measured)


def _print(measured: ModelStats) -> None:
    from rich.console import Console
    from rich.table import Table

    domains = list(measured.skew_median)
    table = Table(title=f"routing of the demo model, seed {measured.seed}")
    table.add_column("layer")
    for domain in domains:
        table.add_column(f"max/mean {domain}", justify="right")
    table.add_column("between domains, bits", justify="right")
    table.add_column("split half, bits", justify="right")
    for layer in measured.layers:
        table.add_row(
            str(layer.layer),
            *(f"{layer.skew[d]:.2f}" for d in domains),
            f"{layer.divergence_bits:.3f}",
            f"{layer.split_half_bits:.4f}",
        )
    table.add_section()
    table.add_row(
        "all",
        *(f"{measured.skew_median[d]:.2f}" for d in domains),
        f"{measured.divergence_bits:.3f}",
        f"{measured.split_half_bits:.4f}",
    )
    console = Console()
    console.print(table)
    console.print("max/mean: median over layers; divergences: mean over layers and pairs")
    routed = ", ".join(f"{d} -> {to}" for d, to in measured.continued_as.items())
    console.print(f"greedy continuations route like: {routed}")
    console.print(f"distinct tokens in a continuation: {measured.continuation_distinct:.0%}")
