"""Do expert-parallel servers give the answers of one engine without expert parallelism?

``python -m tests.live.check.correctness`` prints one row per layout, before and after live
expert migrations, and exits with 1 when a row is outside the tolerance.

What is compared: the log-probability of every token of a fixed set of sequences (prompts and the
reference's greedy continuations, forced), so that one near-tie cannot derail the comparison; and
greedy decoding itself, where a token may differ from the reference's only at a near-tie.

Tolerance. bf16 keeps 8 significant bits, and ranks add their partial sums in another order than
one engine does; a pair of experts near the top-k edge may then swap, which moves single tokens
much further than rounding. The yardstick for this is measured in the same run: how far the bf16
reference is from float32. A bf16 layout must not be further from the reference than that, in the
mean and in the 99th percentile. In float32 the same layouts have no such noise, and the bounds are
absolute and far tighter. A wrong map of two experts in one layer (``--break-map``) is outside.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tests.live.check.agreement import (
    FLOAT32,
    HEADER,
    NEAR_TIE,
    AgreementRow,
    Reference,
    Tolerance,
    compare,
    render,
)
from tests.live.check.completions import greedy, score, together
from tests.live.check.server import CheckedServer, ServerLayout

CONTINUATION_TOKENS = 24
MIGRATIONS = 3
STEP_INTERVAL = 640
PROMPT_TOKENS = (3, 5, 9, 14, 22, 35, 64, 130, 260, 420, 900, 1600)
BREAKER = "tests.live.check.break_map.BreakExpertMap"


def fixed_prompts(vocabulary: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Prompts of `PROMPT_TOKENS` lengths. Ids from 259 on are words in the demo vocabulary."""
    rng = random.Random(seed)
    low = 259 if vocabulary > 600 else 0
    return tuple(tuple(rng.randrange(low, vocabulary) for _ in range(n)) for n in PROMPT_TOKENS)


def rank_splits(dp: int) -> list[list[int]]:
    """Ranks of the prompts, one list per pass: uneven one way, the other way, and one rank idle."""
    n = len(PROMPT_TOKENS)
    if dp == 1:
        return [[0] * n]
    uneven = [0 if i % 4 else 1 for i in range(n)]
    return [uneven, [1 - rank for rank in uneven], [0] * n]


def take_reference(server: CheckedServer, base: Reference | None, vocabulary: int) -> Reference:
    """The answers of `server`; it scores the sequences of `base`, or its own when that is None."""
    url = server.url
    prompts = fixed_prompts(vocabulary) if base is None else base.prompts
    answers = together(prompts, lambda s, p: greedy(s, url, p, CONTINUATION_TOKENS, 0))
    own = tuple(p + a.tokens for p, a in zip(prompts, answers, strict=True))
    sequences = own if base is None else base.sequences
    scores = together(sequences, lambda s, t: score(s, url, t, 0))
    return Reference(prompts, tuple(answers), sequences, tuple(scores))


def measure(
    server: CheckedServer, reference: Reference, when: str, tolerance: Tolerance
) -> AgreementRow:
    """Scores the reference's sequences and decodes its prompts, batched unevenly over ranks."""
    url = server.url
    passes = []
    splits = rank_splits(server.layout.dp)
    for ranks in splits:
        work = list(zip(reference.sequences, ranks, strict=True))
        passes.append(together(work, lambda s, item: score(s, url, item[0], item[1])))
    pairs = list(zip(reference.prompts, splits[0], strict=True))
    decoded = together(pairs, lambda s, item: greedy(s, url, item[0], CONTINUATION_TOKENS, item[1]))
    name, moved = server.layout.name, server.migrations()
    return compare(reference, passes, decoded, name, when, moved, tolerance)


def measure_alone(server: CheckedServer, reference: Reference) -> AgreementRow:
    """The reference engine against itself, one request at a time."""
    url = server.url
    scores = [together([t], lambda s, t: score(s, url, t, 0))[0] for t in reference.sequences]
    decoded = [
        together([p], lambda s, p: greedy(s, url, p, CONTINUATION_TOKENS, 0))[0]
        for p in reference.prompts
    ]
    name = server.layout.name
    return compare(reference, [scores], decoded, name, "one request at a time", {}, Tolerance())


def migrate(server: CheckedServer, reference: Reference, wanted: int, limit_s: float = 240) -> None:
    """Traffic on both ranks until `wanted` more rearrangements have really moved experts."""
    began = time.monotonic()
    url, dp = server.url, server.layout.dp
    target = server.migrations()["rearrangements"] + wanted
    while server.migrations()["rearrangements"] < target:
        if time.monotonic() - began > limit_s:
            raise RuntimeError(
                f"{server.layout.name}: only {server.migrations()} after {limit_s:g} s of traffic"
            )
        work = [(p, i % dp) for i, p in enumerate(reference.prompts[:8])]
        together(work, lambda s, item: greedy(s, url, item[0], 64, item[1]))


def default_layouts() -> list[ServerLayout]:
    """DP=2 EP=2 and DP=2 TP=2 EP=4, with and without redundancy, sync and async, and float32."""
    two = ServerLayout(2, 1, True, 0, False, STEP_INTERVAL)
    four = replace(two, tp=2)
    return [
        two,
        replace(two, redundant=4, asynchronous=True),
        replace(four, redundant=4),
        replace(four, asynchronous=True),
        replace(two, redundant=4, asynchronous=True, dtype="float32"),
        replace(four, redundant=4, asynchronous=True, dtype="float32"),
    ]


@dataclass
class Check:
    """One run of the check: servers one after another, rows printed as they are known."""

    model: Path
    logs: Path
    plain_vllm: bool = False
    rows: list[AgreementRow] = field(default_factory=list)
    references: dict[str, Reference] = field(default_factory=dict)
    tolerances: dict[str, Tolerance] = field(default_factory=dict)

    def serve(self, layout: ServerLayout, *extra: str) -> CheckedServer:
        name = layout.name.replace(" ", "_").replace("=", "")
        return CheckedServer(self.model, layout, self.logs / f"{name}.log", extra, self.plain_vllm)

    def add(self, row: AgreementRow) -> None:
        self.rows.append(row)
        print(render(row), flush=True)

    def take_references(self) -> None:
        """One engine without expert parallelism, in bf16 and in float32."""
        vocabulary = int(json.loads((self.model / "config.json").read_text())["vocab_size"])
        with self.serve(ServerLayout()) as server:
            base = take_reference(server, None, vocabulary)
            self.add(measure_alone(server, base))
        with self.serve(ServerLayout(dtype="float32")) as server:
            yardstick = measure(server, base, "against bf16: yardstick", Tolerance())
            self.references["float32"] = take_reference(server, base, vocabulary)
        self.references["bfloat16"] = base
        self.tolerances = {
            "bfloat16": Tolerance(yardstick.mean, yardstick.p99),
            "float32": FLOAT32,
        }
        self.add(yardstick)

    def check(self, layout: ServerLayout, break_map: bool = False) -> None:
        """Rows of one layout; `break_map` adds the one that must be outside."""
        reference, tolerance = self.references[layout.dtype], self.tolerances[layout.dtype]
        extra = ("--worker-extension-cls", BREAKER) if break_map else ()
        with self.serve(layout, *extra) as server:
            self.add(measure(server, reference, "before migrations", tolerance))
            migrate(server, reference, MIGRATIONS)
            self.add(measure(server, reference, "after live migrations", tolerance))
            if break_map:
                server.call_workers("gimbal_break_expert_map")
                self.add(measure(server, reference, "2 experts' map broken", tolerance))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="expert-parallel answers against one engine's")
    parser.add_argument("--model", type=Path, help="model folder (default: a fresh demo model)")
    parser.add_argument("--quick", action="store_true", help="DP=2 EP=2 only, with redundancy")
    parser.add_argument("--break-map", action="store_true", help="break the map: must end with 1")
    parser.add_argument("--plain-vllm", action="store_true", help="start vLLM itself")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    layouts = default_layouts()
    if options.quick or options.break_map:
        layouts = [layouts[1], layouts[4]]
    logs = Path(tempfile.mkdtemp(prefix="gimbal-correctness-"))
    check = Check(options.model or make_demo_model(logs), logs, options.plain_vllm)
    print(HEADER, flush=True)
    check.take_references()
    for layout in layouts:
        check.check(layout, options.break_map)
    for dtype, bound in check.tolerances.items():
        print(f"{dtype}: mean at most {bound.mean:.2e}, 99th percentile at most {bound.p99:.2e}")
    print(f"greedy may differ where the two best are within {NEAR_TIE}; logs in {logs}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in check.rows], indent=1))
    return 0 if all(row.ok for row in check.rows) else 1


def make_demo_model(folder: Path) -> Path:
    """The demo model, made in a process of its own."""
    path = folder / "model"
    command = [sys.executable, "-m", "gimbal.cli", "model", "demo", "--out", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


if __name__ == "__main__":
    sys.exit(main())
