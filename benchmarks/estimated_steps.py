"""Estimated decode steps of models that nobody measured here, against published times per token.

    python benchmarks/estimated_steps.py

Every figure is a mean TPOT at a fixed number of concurrent requests of fixed lengths. It stands
beside one decode-only step of that many requests at their mean context, experts chosen evenly; what
prefills of others add (under a tenth where answers are as long as prompts) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.cost.profile import Profile
from gimbal.core.cost.step import BatchShape, expected_active, step_time
from gimbal.core.placement.backends import GATHER_BACKEND, ROUTED_BACKEND
from gimbal.sim.cluster import load_cluster, model_cluster
from gimbal.sim.experts import off_source_us

AIC = "AIConfigurator @095f58a5, silicon_sample"
LMSYS = "lmsys.org/blog/2025-05-05-large-scale-ep"


@dataclass(frozen=True, slots=True)
class Published:
    """One run: `concurrency` requests of `prompt` and `output` tokens on dp * tp GPUs.

    Attributes:
        engine: who served it; where it split experts over tensor-parallel ranks, the estimate
            spreads them over expert-parallel ones.
    """

    model: str
    gpu: str
    dp: int
    tp: int
    concurrency: int
    prompt: int
    output: int
    tpot_ms: float
    engine: str
    source: str = AIC
    backend: str = GATHER_BACKEND


def _runs(
    model: str, gpu: str, tp: int, engine: str, lengths: tuple[int, int], tpots: dict[int, float]
) -> list[Published]:
    return [Published(model, gpu, 1, tp, n, *lengths, ms, engine) for n, ms in tpots.items()]


OSS, QWEN, DEEPSEEK = "gpt-oss-120b", "qwen3-235b-a22b-fp8", "deepseek-v3"
PUBLISHED = (
    *_runs(OSS, "h200", 1, "vLLM 0.18", (1024, 1024), {4: 6.33, 16: 12.65, 64: 24.76}),
    *_runs(OSS, "h200", 2, "vLLM 0.18", (1024, 1024), {4: 4.80, 16: 7.88, 64: 14.42}),
    *_runs(OSS, "h200", 4, "vLLM 0.18", (1024, 1024), {4: 3.93, 16: 5.60, 64: 9.48}),
    *_runs(QWEN, "h100", 4, "TensorRT-LLM 1.0", (512, 512), {4: 13.35, 16: 18.24, 64: 27.41}),
    *_runs(QWEN, "h200", 2, "SGLang 0.5.6", (1000, 1000), {4: 16.33}),
    *_runs(QWEN, "h200", 4, "SGLang 0.5.6", (1000, 1000), {9: 15.90}),
    *_runs(DEEPSEEK, "h200", 8, "SGLang 0.5.9", (1024, 1024), {4: 10.29, 16: 16.63, 64: 32.99}),
    # 22,282 tokens/s a node of 8 at some 100 ms between tokens, two batches overlapped, on 72 GPUs.
    Published(DEEPSEEK, "h100", 64, 1, 64 * 256, 2000, 100, 91.9, "SGLang", LMSYS, ROUTED_BACKEND),
)


def decode_step_ms(profile: Profile, requests: float, context: float, off_source: float) -> float:
    """One step in which every engine decodes `requests` at `context` tokens each.

    Args:
        off_source: microseconds of a pair that leaves its engine (`off_source_us`).
    """
    model, layout = profile.model, profile.layout
    ones, nothing = np.ones(layout.dp), np.zeros(layout.dp)
    batch = BatchShape(
        requests * ones, requests * context * ones, nothing, nothing, requests * ones
    )
    tokens = requests * layout.dp
    hit = expected_active(np.full(model.experts, model.top_k / model.experts), tokens)
    active = np.full((model.layers, layout.ep), hit.sum() / layout.ep)
    pairs = np.full((model.layers, layout.ep), tokens * model.top_k / layout.ep)
    leaving = requests * model.top_k * (layout.dp - 1) / layout.dp * off_source
    return (step_time(profile, batch, active, pairs).total_us + model.layers * leaving) / 1e3


def estimated_ms(run: Published) -> float:
    """What the derived profile says of `run`."""
    cluster, profile = load_cluster(
        model_cluster(run.model, run.gpu, run.dp, tp=run.tp, backend=run.backend)
    )
    context = run.prompt + run.output / 2
    leaving_us = off_source_us(cluster, profile)
    return decode_step_ms(profile, run.concurrency / run.dp, context, leaving_us)


def main() -> None:
    print("| model | GPUs | engine | requests | published | estimate | error |")
    print("|---|---|---|---|---|---|---|")
    for run in PUBLISHED:
        ms = estimated_ms(run)
        print(
            f"| {run.model} | {run.dp * run.tp} {run.gpu} | {run.engine} | {run.concurrency:,} "
            f"| {run.tpot_ms:.1f} ms | {ms:.1f} ms | {ms / run.tpot_ms - 1:+.0%} |"
        )


if __name__ == "__main__":
    main()
