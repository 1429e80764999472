"""``gimbal stats``: who asks for which expert, from a running server or a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from gimbal.commands.options import NameOrFile, OutFile, Real, Whole
from gimbal.commands.output import echo_json, notes, progress_bar
from gimbal.commands.server_routes import ask
from gimbal.core.contracts import Topology
from gimbal.core.errors import InputError
from gimbal.core.numbers import MOST_EXPERTS, MOST_RANKS
from gimbal.workloads.routing import RoutingFile, read_routing

MOST_REPLY_BYTES = 1 << 30


@click.command()
@click.argument("source", nargs=-1, required=True, type=NameOrFile())
@click.option("--out", type=OutFile(), help="write the recording as .npz")
@click.option(
    "--ranks",
    type=Whole(1, MOST_RANKS),
    help="EP ranks, where a recording does not say (balance)",
)
@click.option(
    "--experts",
    type=Whole(1, MOST_EXPERTS),
    help="logical experts, where choices may not show them all",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option(
    "--timeout",
    type=Real(above=0.0, most=1e6),
    default=60.0,
    show_default=True,
    help="seconds to wait for a server",
)
def command(
    source: tuple[str, ...],
    out: Path | None,
    ranks: int | None,
    experts: int | None,
    as_json: bool,
    timeout: float,
) -> None:
    """Show or save routing statistics.

    SOURCE is a server's address (http://localhost:8000, served with the level placement and
    --enable-eplb) or files: .npz of this command, recorded choices (.npz, .npy), SGLang's .pt.
    Several files are several sources.

    Example: gimbal stats http://localhost:8000 --out routing.npz
    """
    with progress_bar(notes(), f"reading {source[0]}"):
        if len(source) == 1 and source[0].startswith(("http://", "https://")):
            recording = fetch(source[0], timeout)
        else:
            recording = read_routing([Path(s) for s in source], experts)
    if out is not None:
        from gimbal.workloads.routing import save_routing

        save_routing(out, recording)
    summary = summarize(recording, ranks)
    if as_json:
        echo_json(summary)
    else:
        _print(summary)


def fetch(url: str, timeout_s: float) -> RoutingFile:
    """The live recording of the server at `url`; raises InputError saying why there is none."""
    import tempfile

    content = ask(url, "/gimbal/routing", timeout_s, MOST_REPLY_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routing.npz"
        path.write_bytes(content)
        return read_routing(path)


def summarize(recording: RoutingFile, ranks: int | None = None) -> dict[str, Any]:
    """Figures of a recording: skew per source, divergence of sources, balance and locality."""
    counts = recording.counts
    totals = counts.sum(axis=2, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    busy = [s for s in range(len(counts)) if counts[s].any()]
    skew = [float(np.median(shares[s].max(axis=1) * counts.shape[2])) for s in busy]
    summary: dict[str, Any] = {
        "sources": len(counts),
        "layers": counts.shape[1],
        "experts": counts.shape[2],
        "steps": recording.steps,
        "pairs": [float(c.sum()) for c in counts],
        "expert_max_over_mean": dict(zip(map(str, busy), skew, strict=True)),
        "divergence_bits": _divergence(shares[busy]),
        "metadata": recording.metadata,
    }
    if recording.decode is not None and counts.sum() > 0:
        summary["decode_share"] = float(recording.decode.sum() / counts.sum())
    placement = recording.physical_to_logical
    ranks = ranks or recording.metadata.get("ranks")
    if placement is not None and ranks:
        summary |= _placed(recording, np.asarray(placement, dtype=np.int32), ranks)
    return summary


def _placed(recording: RoutingFile, placement: np.ndarray, ranks: int) -> dict[str, Any]:
    from gimbal.core.placement import objective
    from gimbal.core.placement.problem import slots_per_rank, validate_placement

    per_source = recording.metadata.get("ranks_per_source") or 1
    if ranks % per_source:
        raise InputError(f"{ranks} ranks are no whole sources of {per_source}")
    slots = slots_per_rank(placement.shape[1], ranks)
    topology = Topology(ranks, slots, per_source, ranks)
    layers, experts = recording.counts.shape[1:]
    validate_placement(placement, topology, layers, experts, "physical_to_logical")
    facts: dict[str, Any] = {
        "ranks": ranks,
        "balance": objective.balance(placement, recording.counts, topology),
    }
    if len(recording.counts) == topology.sources:
        facts["local_share"] = objective.local_share(placement, recording.counts, topology)
    return facts


def _divergence(shares: np.ndarray) -> float | None:
    """Mean Jensen-Shannon divergence in bits over layers and pairs of sources."""
    from gimbal.demo.calibrate import mean_divergence_bits

    if len(shares) < 2:
        return None
    layers = range(shares.shape[1])
    return float(np.mean([mean_divergence_bits([s[layer] for s in shares]) for layer in layers]))


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="routing", show_header=False)
    metadata = summary["metadata"]
    for name, value in summary.items():
        if name == "metadata":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v:.2f}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(f"{v:,.0f}" for v in value)
        elif isinstance(value, float):
            value = f"{value:.4g}"
        table.add_row(name.replace("_", " "), str(value))
    for name in (
        "served_locally",
        "step",
        "proposed",
        "committed",
        "fallbacks",
        "answered",
        "sources",
    ):
        if metadata.get(name):
            shown = {"sources": "rows", "answered": "of ranks"}.get(name, name)
            value = metadata[name]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(shown.replace("_", " "), text)
    Console(markup=False).print(table)
