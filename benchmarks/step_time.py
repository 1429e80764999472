"""What a step costs by its prefill, as a profile predicts it: the staircase that the queue climbs.

    python benchmarks/step_time.py [--cluster h100x4-paper] [--decodes 100] [--plot FILE.svg]

Every engine decodes `--decodes` requests of `--context` tokens. The prefill is that of the fullest
engine, either on all engines or on one; prompts are of 500 tokens and experts are chosen evenly.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.core.cost.profile import Profile
from gimbal.core.cost.step import BatchShape, expected_active, step_time
from gimbal.sim.cluster import Cluster, load_cluster

PREFILLS = (0, 128, 256, 384, 412, 448, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)
PROMPT = 500.0


def step_ms(
    cluster: Cluster, profile: Profile, prefill: FloatArray, decodes: int, context: int
) -> float:
    """Milliseconds of a step; `prefill` is [dp] tokens."""
    model, ranks = profile.model, cluster.dp * cluster.tp
    chunks = np.ceil(prefill / PROMPT)
    tokens = prefill + decodes
    batch = BatchShape(
        np.maximum(tokens, 1.0),
        np.full(cluster.dp, float(decodes * context)),
        prefill * prefill / np.maximum(chunks, 1.0) / 2,
        np.zeros(cluster.dp),
        decodes + chunks,
    )
    share = np.full(model.experts, model.top_k / model.experts)
    active = expected_active(share, float(tokens.sum())).sum() / ranks
    pairs = tokens.sum() * model.top_k / ranks
    every = np.ones((model.layers, ranks))
    return step_time(profile, batch, active * every, pairs * every).total_us / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", default="h100x4-paper")
    parser.add_argument("--decodes", type=int, default=100)
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--launch-ms", type=float, nargs="*", default=[0.35, 0.5, 0.8])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cluster, profile = load_cluster(options.cluster)

    def row(launch_ms: float, tokens: float, everywhere: bool) -> float:
        changed = dataclasses.replace(profile, launch_layer_us=1e3 * launch_ms)
        prefill = np.full(cluster.dp, tokens * everywhere)
        prefill[0] = tokens
        return step_ms(cluster, changed, prefill, options.decodes, options.context)

    print(f"ms per step beside {options.decodes} decodes an engine; prefill of the fullest engine")
    print(f"{'launches, prefill on':24}" + "".join(f"{tokens:7}" for tokens in PREFILLS))
    kinds = [(ms, everywhere) for ms in options.launch_ms for everywhere in (True, False)]
    for launch_ms, everywhere in kinds:
        name = f"{launch_ms:g} ms, {'all engines' if everywhere else 'one engine'}"
        times = [row(launch_ms, tokens, everywhere) for tokens in PREFILLS]
        print(f"{name:24}" + "".join(f"{time:7.1f}" for time in times))
    if options.plot is not None:
        from gimbal.report.plots import pyplot

        plt = pyplot()
        figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
        fine = np.arange(0, 3001, 4)
        for number, launch_ms in enumerate(options.launch_ms):
            times = [row(launch_ms, float(tokens), True) for tokens in fine]
            axes.plot(fine, times, color=f"C{number}", label=f"{launch_ms:g} ms a layer")
        room = profile.graph_tokens - options.decodes
        axes.axvline(room, color="0.5", linewidth=0.8)
        axes.text(room, 0.5, " no CUDA graph beyond", color="0.4", fontsize=9)
        axes.set(
            xlabel="prefill tokens of every engine",
            ylabel="step (ms)",
            xlim=(0, 3000),
            ylim=(0, None),
            title=f"{cluster.name}, {options.decodes} decodes an engine (simulated)",
        )
        axes.legend(title="launches without a graph", frameon=False)
        figure.savefig(options.plot)


if __name__ == "__main__":
    main()
