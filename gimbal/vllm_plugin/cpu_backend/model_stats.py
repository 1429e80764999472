"""Measures the demo model's routing by running it on CPU with transformers.

The figures are those the real sets were measured with: per layer and domain the hottest expert
over the mean, the Jensen-Shannon divergence between domains in bits, and as its noise floor the
divergence between two halves of one domain's prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gimbal.core.errors import InputError
from gimbal.demo.calibrate import divergence_bits, mean_divergence_bits, skew_of
from gimbal.demo.manifest import DemoManifest, load_manifest


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One layer: `skew` by domain, divergence between domains and between halves of one."""

    layer: int
    skew: dict[str, float]
    divergence_bits: float
    split_half_bits: float


@dataclass(frozen=True, slots=True)
class ModelStats:
    """The model's routing. Skew is the median over layers, divergences are means over layers.

    Attributes:
        continued_as: domain -> the domain whose prompts its greedy continuations route like.
        continuation_distinct: mean share of distinct tokens in a greedy continuation.
    """

    seed: int
    layers: tuple[LayerStats, ...]
    skew_median: dict[str, float]
    divergence_bits: float
    split_half_bits: float
    continued_as: dict[str, str]
    continuation_distinct: float
    tokens_per_domain: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model_dir: Path,
    *,
    seed: int = 0,
    prompts: int = 8,
    prompt_tokens: int = 512,
    continuation_tokens: int = 64,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> ModelStats:
    """Runs the model over prompts of each domain.

    Args:
        model_dir: a folder written by `gimbal.demo.model.make_demo_model`.
        seed: of the prompts.
        prompts: per domain, an even number: halves give the noise floor.
        prompt_tokens: words per prompt.
        continuation_tokens: greedy tokens generated per domain.
        on_done: called with (finished, all) prompts, continuations included.

    Raises:
        InputError: no demo model there, or a missing library.
    """
    if prompts < 2 or prompts % 2:
        raise InputError(f"prompts: must be even and at least 2, got {prompts}")
    manifest = load_manifest(model_dir)
    model = _load(model_dir)
    rng = np.random.default_rng(seed)
    runs: dict[str, np.ndarray] = {}
    continued: dict[str, np.ndarray] = {}
    distinct = []
    total = len(manifest.domains) * (prompts + 1)
    for number, domain in enumerate(manifest.domains):
        batch = [manifest.prompt(domain, prompt_tokens, rng) for _ in range(prompts)]
        measured: list[np.ndarray] = []
        for prompt in batch:
            on_done(number * (prompts + 1) + len(measured), total)
            measured.append(_selections(model, [prompt]))
        runs[domain] = np.stack(measured)
        counts, tokens = _continue(model, batch[0], continuation_tokens)
        continued[domain] = counts
        distinct.append(len(set(tokens)) / len(tokens))
    return _summary(manifest, runs, continued, distinct, prompts * prompt_tokens)


def _summary(
    manifest: DemoManifest,
    runs: dict[str, np.ndarray],
    continued: dict[str, np.ndarray],
    distinct: list[float],
    tokens: int,
) -> ModelStats:
    """`runs`: domain -> [prompts, layers, experts]; `continued`: domain -> [layers, experts]."""
    totals = {d: _shares(r.sum(axis=0)) for d, r in runs.items()}
    halves = {d: [_shares(r[i::2].sum(axis=0)) for i in (0, 1)] for d, r in runs.items()}
    layers = tuple(
        LayerStats(
            layer,
            {d: skew_of(t[layer]) for d, t in totals.items()},
            mean_divergence_bits([t[layer] for t in totals.values()]),
            float(np.mean([divergence_bits(a[layer], b[layer]) for a, b in halves.values()])),
        )
        for layer in range(next(iter(totals.values())).shape[0])
    )
    continued_as = {}
    for domain, counts in continued.items():
        shares = _shares(counts)
        distance = {
            d: np.mean([divergence_bits(a, b) for a, b in zip(shares, t, strict=True)])
            for d, t in totals.items()
        }
        continued_as[domain] = min(distance, key=distance.__getitem__)
    return ModelStats(
        seed=manifest.seed,
        layers=layers,
        skew_median={d: float(np.median([s.skew[d] for s in layers])) for d in totals},
        divergence_bits=float(np.mean([s.divergence_bits for s in layers])),
        split_half_bits=float(np.mean([s.split_half_bits for s in layers])),
        continued_as=continued_as,
        continuation_distinct=float(np.mean(distinct)),
        tokens_per_domain=tokens,
    )


def _shares(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts / counts.sum(axis=-1, keepdims=True))


def _load(model_dir: Path) -> Any:
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise InputError(
            f"measuring the model needs {error.name}: pip install 'gimbal-moe[cpu]'"
        ) from None
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()


def _selections(model: Any, batch: list[list[int]]) -> np.ndarray:
    """[layers, experts] how often each expert is among the top-k for the tokens of `batch`."""
    import torch

    with torch.inference_mode():
        output = model(torch.tensor(batch), output_router_logits=True, use_cache=False)
    return _count(model, output.router_logits)


def _count(model: Any, router_logits: Any) -> np.ndarray:
    config = model.config
    return np.stack(
        [
            np.bincount(
                logits.reshape(-1, config.num_experts)
                .topk(config.num_experts_per_tok, dim=-1)
                .indices.flatten()
                .numpy(),
                minlength=config.num_experts,
            )
            for logits in router_logits
        ]
    )


def _continue(model: Any, prompt: list[int], tokens: int) -> tuple[np.ndarray, list[int]]:
    """Greedy continuation: ([layers, experts] counts of the generated tokens, the tokens)."""
    import torch

    made: list[int] = []
    total: np.ndarray | int = 0
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True)
        for _ in range(tokens):
            made.append(int(output.logits[0, -1].argmax()))
            output = model(
                torch.tensor([made[-1:]]),
                past_key_values=output.past_key_values,
                use_cache=True,
                output_router_logits=True,
            )
            total = total + _count(model, output.router_logits)
    return np.asarray(total), made
