"""The demo model's tensors.

The residual stream is divided into four parts that only meet where the construction wants it:

=========  =====================  ============================================================
part       written by             read by
=========  =====================  ============================================================
constant   embedding              gates (popularity of each expert), output head (rare tokens)
domain     embedding, attention   gates (affinity of each expert to a domain), output head
token      embedding              gates, queries and keys, experts, output head (next word)
free       attention, experts     values, experts, output head
=========  =====================  ============================================================

- A word's embedding lies in its domain's cluster: the same domain coordinate, its own token part.
- Attention averages the context; its values carry the domain coordinates, so that shared words,
  bytes and generated tokens route like the prompt they stand in.
- Experts read everything and write only the free part: routing stays calibrated through every
  layer (`calibrate`), while a token sent to a wrong expert changes the logits.
- The head maps each word to a successor in its own domain: one cycle through all of a domain's
  words. Greedy decoding therefore walks through the domain instead of repeating one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gimbal.demo.calibrate import strengths
from gimbal.demo.sizes import BYTE_TOKENS, FIRST_WORD_ID, HEAD_DIM, DemoSizes
from gimbal.demo.vocabulary import DemoVocabulary

CONSTANT = 4.0
"""Embedding's constant coordinate."""
DOMAIN = 5.0
"""Embedding's coordinate along its own domain."""
CONTEXT_FIRST, CONTEXT_LATER = 0.8, 0.2
"""Share of the context's mean domain coordinates that attention adds in the first layer, and in
all later layers together."""
FREE_SCALE = 0.35
"""Standard deviation that one layer's experts add to each free coordinate, roughly."""
GATE_SCALE = 0.7
"""Spread of the gate logits: the first of four experts weighs about 0.45, the last 0.15."""
NEXT_WORD_LOGIT, DOMAIN_LOGIT, FREE_LOGIT, RARE_LOGIT = 12.0, 4.0, 0.6, -6.0
"""What the head adds for the successor, the domain, the free part and bytes or specials."""
CALIBRATION_TOKENS = 1500


class ResidualParts:
    """Coordinate ranges of the residual stream's four parts."""

    def __init__(self, sizes: DemoSizes) -> None:
        self.domain = slice(1, 1 + sizes.domains)
        free = (sizes.hidden - 1 - sizes.domains) * 2 // 5
        self.token = slice(1 + sizes.domains, sizes.hidden - free)
        self.free = slice(sizes.hidden - free, sizes.hidden)
        self.token_width = self.token.stop - self.token.start
        self.free_width = free


def embeddings(sizes: DemoSizes, words: DemoVocabulary, rng: np.random.Generator) -> np.ndarray:
    """[vocab, hidden] clusters: mean square 1 per coordinate for a domain word."""
    parts = ResidualParts(sizes)
    table = np.zeros((sizes.vocab, sizes.hidden), dtype=np.float64)
    table[:, 0] = CONSTANT
    ids = np.flatnonzero(words.domain_of >= 0)
    table[ids, parts.domain.start + words.domain_of[ids]] = DOMAIN
    energy = sizes.hidden - CONSTANT**2 - DOMAIN**2
    table[:, parts.token] = rng.standard_normal((sizes.vocab, parts.token_width)) * np.sqrt(
        energy / parts.token_width
    )
    return table


def successors(words: DemoVocabulary, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(token, next token) pairs: a cycle in each domain, and one way into each from elsewhere."""
    pairs = []
    for own in words.by_domain:
        cycle = rng.permutation(own)
        pairs += list(zip(cycle.tolist(), np.roll(cycle, -1).tolist(), strict=True))
        outside = np.concatenate([np.arange(BYTE_TOKENS), words.shared])
        entries = rng.choice(own, size=len(outside))
        pairs += list(zip(outside.tolist(), entries.tolist(), strict=True))
    return pairs


def output_head(
    sizes: DemoSizes, words: DemoVocabulary, table: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """[vocab, hidden] rows of the output head."""
    parts = ResidualParts(sizes)
    head = np.zeros((sizes.vocab, sizes.hidden), dtype=np.float64)
    token = table[:, parts.token]
    unit = token / (token**2).sum(axis=1, keepdims=True)
    for before, after in successors(words, rng):
        head[after, parts.token] += NEXT_WORD_LOGIT * unit[before]
    ids = np.flatnonzero(words.domain_of >= 0)
    head[ids, parts.domain.start + words.domain_of[ids]] = DOMAIN_LOGIT / DOMAIN
    head[:, parts.free] = rng.standard_normal((sizes.vocab, parts.free_width)) * (
        FREE_LOGIT / np.sqrt(parts.free_width) / FREE_SCALE
    )
    head[:FIRST_WORD_ID, 0] = RARE_LOGIT / CONSTANT
    head[words.shared, 0] = RARE_LOGIT / CONSTANT / 4
    return head


def gates(
    sizes: DemoSizes, words: DemoVocabulary, table: np.ndarray, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yields each layer's calibrated gate [experts, hidden]."""
    parts = ResidualParts(sizes)
    samples = []
    for domain in range(sizes.domains):
        ids, probabilities = words.weights(domain)
        samples.append(table[rng.choice(ids, size=CALIBRATION_TOKENS, p=probabilities)])
    context = np.zeros((sizes.domains, sizes.domains))
    for layer in range(sizes.layers):
        gain = context_gain(sizes, layer)
        own = np.stack([s[:, parts.domain].mean(axis=0) for s in samples])
        context = context + gain * (own + context)
        gate = np.zeros((sizes.experts, sizes.hidden))
        popularity = rng.standard_normal(sizes.experts)
        popularity = (popularity - popularity.mean()) / popularity.std()
        affinity = rng.standard_normal((sizes.experts, sizes.domains))
        gate[:, parts.token] = rng.standard_normal((sizes.experts, parts.token_width))
        gate[:, parts.token] /= np.sqrt((table[:, parts.token] ** 2).sum(axis=1).mean())
        popular, domainwise = strengths(
            popularity,
            [
                (s[:, parts.domain] + context[d]) @ affinity.T / DOMAIN
                for d, s in enumerate(samples)
            ],
            [s[:, parts.token] @ gate[:, parts.token].T for s in samples],
            sizes.top_k,
            sizes.skew,
            sizes.divergence_bits,
        )
        gate[:, 0] = popular * popularity / CONSTANT
        gate[:, parts.domain] = domainwise * affinity / DOMAIN
        yield gate * GATE_SCALE


def context_gain(sizes: DemoSizes, layer: int) -> float:
    """Share of the mean context that attention of `layer` adds to the domain coordinates."""
    return CONTEXT_FIRST if layer == 0 else CONTEXT_LATER / max(1, sizes.layers - 1)


def attention(
    sizes: DemoSizes, layer: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the layer's attention tensors; value channels 0 to domains-1 of each KV head carry
    the domain coordinates, the others a random mix of the token and free parts."""
    parts = ResidualParts(sizes)
    hidden, width = sizes.hidden, sizes.heads * HEAD_DIM
    values = np.zeros((sizes.kv_heads, HEAD_DIM, hidden))
    mixed = slice(parts.token.start, hidden)
    rest = HEAD_DIM - sizes.domains
    values[:, sizes.domains :, mixed] = rng.standard_normal(
        (sizes.kv_heads, rest, hidden - parts.token.start)
    ) / np.sqrt(hidden)
    values[:, np.arange(sizes.domains), parts.domain.start + np.arange(sizes.domains)] = 1.0
    out = np.zeros((hidden, sizes.heads, HEAD_DIM))
    for domain in range(sizes.domains):
        out[parts.domain.start + domain, :, domain] = context_gain(sizes, layer) / sizes.heads
    out[parts.free, :, sizes.domains :] = rng.standard_normal(
        (parts.free_width, sizes.heads, rest)
    ) / np.sqrt(sizes.heads * rest)
    for name, rows in (("q", width), ("k", sizes.kv_heads * HEAD_DIM)):
        yield f"{name}_proj.weight", rng.standard_normal((rows, hidden)) / np.sqrt(hidden)
        yield f"{name}_norm.weight", np.full(HEAD_DIM, 0.7)
    yield "v_proj.weight", values.reshape(-1, hidden)
    yield "o_proj.weight", out.reshape(hidden, width)


def experts(sizes: DemoSizes, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Yields one layer's expert tensors; only the free coordinates are written."""
    parts = ResidualParts(sizes)
    width = sizes.moe_intermediate
    for expert in range(sizes.experts):
        for name in ("gate_proj", "up_proj"):
            yield (
                f"{expert}.{name}.weight",
                rng.standard_normal((width, sizes.hidden)) / np.sqrt(sizes.hidden),
            )
        down = np.zeros((sizes.hidden, width))
        # silu(a)*b of two unit normals has a standard deviation of about 0.6; the weighted mean
        # of top-k experts keeps about half of it.
        down[parts.free] = rng.standard_normal((parts.free_width, width)) * (
            FREE_SCALE / 0.3 / np.sqrt(width)
        )
        yield f"{expert}.down_proj.weight", down


def tensors(
    sizes: DemoSizes,
    words: DemoVocabulary,
    rng: np.random.Generator,
    on_layer: Callable[[int, int], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every (name, float64 array) of the checkpoint in Qwen3-MoE's published naming.

    `on_layer` is called with (finished, all) layers.
    """
    table = embeddings(sizes, words, rng)
    ones = np.ones(sizes.hidden)
    yield "model.embed_tokens.weight", table
    yield "lm_head.weight", output_head(sizes, words, table, rng)
    yield "model.norm.weight", ones
    on_layer(0, sizes.layers)
    for layer, gate in enumerate(gates(sizes, words, table, rng)):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ones
        yield f"{prefix}.post_attention_layernorm.weight", ones
        yield f"{prefix}.mlp.gate.weight", gate
        for name, tensor in attention(sizes, layer, rng):
            yield f"{prefix}.self_attn.{name}", tensor
        for name, tensor in experts(sizes, rng):
            yield f"{prefix}.mlp.experts.{name}", tensor
        on_layer(layer + 1, sizes.layers)
