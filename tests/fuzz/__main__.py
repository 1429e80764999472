"""``python -m tests.fuzz``: see the package. Exits with 1 when an input failed."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.run import Outcome, Target, input_of, run, shares_of
from tests.fuzz.targets import TARGETS


def table(outcomes: Sequence[Outcome], seed: int) -> Table:
    """One row per target and their sum."""
    total = Outcome("all")
    for outcome in outcomes:
        for name in ("taken", "refused", "failed", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
    shown = Table(title=f"seed {seed}")
    for name in ("target", "inputs", "taken", "refused", "failed", "seconds"):
        shown.add_column(name, justify="left" if name == "target" else "right")
    for outcome in (*outcomes, total):
        counts = (outcome.inputs, outcome.taken, outcome.refused, outcome.failed)
        shown.add_row(outcome.name, *(f"{n:,}" for n in counts), f"{outcome.seconds:.1f}")
    return shown


def again(target: Target, seed: int, index: int) -> int:
    """Runs one input, with whatever it raises."""
    target.case(input_of(seed, target.name, index))
    print(f"{target.name} {index}: taken")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=1_000_000, help="inputs, all targets")
    parser.add_argument("--seed", type=int, help="default: of the clock, and printed")
    names = [target.name for target in TARGETS]
    parser.add_argument("--target", action="append", choices=names, help="default: every one")
    parser.add_argument("--only", type=int, metavar="INDEX", help="this input of --target again")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    seed = time.time_ns() % 10**9 if options.seed is None else options.seed
    chosen = [t for t in TARGETS if options.target is None or t.name in options.target]
    if options.only is not None:
        if len(chosen) != 1:
            parser.error("--only needs one --target")
        return again(chosen[0], seed, options.only)
    print(f"{options.examples:,} inputs, --seed {seed}", flush=True)
    counts = shares_of(chosen, options.examples)
    outcomes = []
    for target in chosen:
        outcome = run(target, counts[target.name], seed)
        outcomes.append(outcome)
        for index, message in outcome.failures:
            print(f"{target.name} --only {index}: {message}", flush=True)
    Console(width=100).print(table(outcomes, seed))
    if options.json:
        options.json.write_text(
            json.dumps({"seed": seed, "targets": [asdict(o) for o in outcomes]})
        )
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
