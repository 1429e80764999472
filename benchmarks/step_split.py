"""Splits what arms did to TPOT into what they scheduled and how fast the machine happened to be.

    python benchmarks/step_split.py RUN STEPS

RUN is a run of `gimbal bench`, STEPS the directory its server wrote step records to (key
`step_records`, see examples/arms-steps.yaml). Two engines in lock step. One cost

    duration = base + a * fullest prefill + b * other prefill + d * most decodes

is fitted to the steps of all turns together. Weighted by its decoding requests, a step's duration
is what a decoding request waits for its next token: measured, it holds the machine's speed in that
turn; computed from the fit, only the composition of the steps, which is what an arm decides. Run
it on the machine that measured, before it restarts: step records carry monotonic times.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

_KEYS = ("time_s", "duration_us", "prefill_tokens", "decode_requests")
_SAME_STEP_S = 0.015  # engines of one lock-step step start within this of each other
_STALL_US = 300e3  # longer ones are a start or a rearrangement, not a step's work


@dataclass(frozen=True, slots=True)
class Steps:
    """Lock-step steps of one turn; arrays are [steps].

    Attributes:
        features: [steps, 4]: 1, fullest and other prefill tokens, most decodes.
        duration_us: of the slower engine.
        decodes: of both engines.
    """

    features: np.ndarray
    duration_us: np.ndarray
    decodes: np.ndarray


def paired(one: np.ndarray, other: np.ndarray) -> Steps:
    """Steps that both engines, each [steps, len(_KEYS)], have a record of."""
    after = np.clip(np.searchsorted(other[:, 0], one[:, 0]), 1, len(other) - 1)
    nearer = np.abs(other[after - 1, 0] - one[:, 0]) < np.abs(other[after, 0] - one[:, 0])
    match = other[after - nearer]
    kept = np.abs(match[:, 0] - one[:, 0]) < _SAME_STEP_S
    kept &= np.maximum(one[:, 1], match[:, 1]) < _STALL_US
    both = np.stack([one[kept], match[kept]])
    prefill, decodes = both[:, :, 2], both[:, :, 3]
    features = [np.ones(kept.sum()), prefill.max(0), prefill.min(0), decodes.max(0)]
    return Steps(np.stack(features, axis=1), both[:, :, 1].max(0), decodes.sum(0))


def read(run: Path, steps: Path) -> dict[str, list[Steps]]:
    """Turns of every arm."""
    boot_unix_s = time.time() - time.monotonic()
    engines = []
    for engine in range(2):
        lines = (steps / f"steps-{engine}.jsonl").read_text(encoding="utf-8").splitlines()
        engines.append(np.array([[json.loads(line)[k] for k in _KEYS] for line in lines], float))
    found: dict[str, list[Steps]] = {}
    for turn in json.loads((run / "run.json").read_text(encoding="utf-8"))["runs"]:
        start = turn["began_unix_s"] - boot_unix_s
        end = start + turn["client"]["wall_s"]
        one, other = (e[(e[:, 0] >= start) & (e[:, 0] < end)] for e in engines)
        if min(len(one), len(other)) < 2:
            raise SystemExit(f"{steps}: no steps of {turn['arm']}, repeat {turn['repeat']}")
        found.setdefault(turn["arm"], []).append(paired(one, other))
    return found


def table(turns: dict[str, list[Steps]]) -> Table:
    """One row per arm."""
    every = [turn for arm in turns.values() for turn in arm]
    cost, *_ = np.linalg.lstsq(
        np.concatenate([t.features for t in every]), np.concatenate([t.duration_us for t in every])
    )
    formula = (
        "us = {:.0f} + {:.1f} x fullest prefill + {:.1f} x other prefill + {:.0f} x most decodes"
    )
    view = Table(
        caption=formula.format(*cost)
        + ". Aligned, balanced: the same tokens in the same steps, equal on both engines."
    )
    for name in ("arm", "measured ms", "from composition ms", "turns' speed", "fullest / mean"):
        view.add_column(name, justify="left" if name == "arm" else "right")
    for name in ("prefill aligned ms", "and decodes balanced ms"):
        view.add_column(name, justify="right")
    for name, arm in turns.items():
        weights = np.concatenate([t.decodes for t in arm])
        features = np.concatenate([t.features for t in arm])
        measured = np.concatenate([t.duration_us for t in arm])
        mean_prefill = features[:, 1:3].mean(axis=1)
        aligned = features.copy()
        aligned[:, 1] = aligned[:, 2] = mean_prefill
        balanced = aligned.copy()
        balanced[:, 3] = weights / 2
        speeds = [t.duration_us.sum() / (t.features @ cost).sum() for t in arm]
        shown = (measured, features @ cost, aligned @ cost, balanced @ cost)
        now, fitted, level, even = (np.average(v, weights=weights) / 1e3 for v in shown)
        view.add_row(
            name,
            f"{now:.1f}",
            f"{fitted:.1f}",
            f"{min(speeds):.2f} to {max(speeds):.2f}",
            f"{features[:, 1].sum() / mean_prefill.sum():.3f}",
            f"{level:.1f}",
            f"{even:.1f}",
        )
    return view


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a `gimbal bench` run")
    parser.add_argument("steps", type=Path, help="directory with steps-0.jsonl and steps-1.jsonl")
    args = parser.parse_args()
    Console(width=130).print(table(read(args.run, args.steps)))


if __name__ == "__main__":
    main()
