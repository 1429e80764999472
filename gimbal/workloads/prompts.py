"""Prompts as token ids: shared exactly where the trace says so, unique everywhere else.

A prompt is the content of its leading prefix blocks, a function of (salt, hash id), followed by
tokens that are a function of (salt, request index). A new salt changes every token and no length,
so a second run, or the next arm on the same server, finds nothing in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gimbal.core.errors import InputError
from gimbal.core.json_text import read_object
from gimbal.core.model import language_model, read_config
from gimbal.core.model.config import HUGGING_FACE, MISTRAL
from gimbal.core.numbers import MOST, MOST_VOCABULARY, as_whole
from gimbal.workloads.trace import Trace

TokenArray = npt.NDArray[np.int64]

DEMO_FILE = "gimbal_demo.json"
LEAST_WEIGHT = 1e-200
"""Of all words together; less cannot be divided by."""
SHARED, UNIQUE = 1, 2  # separates the two kinds of content in the seed


@dataclass(frozen=True)
class TokenPool:
    """Token ids with their cumulative probabilities, both [tokens]."""

    ids: TokenArray
    cumulative: npt.NDArray[np.float64]

    def draw(self, count: int, rng: np.random.Generator) -> TokenArray:
        """[count] ids, independent, with the pool's probabilities."""
        positions = np.searchsorted(self.cumulative, rng.random(count), side="right")
        drawn: TokenArray = self.ids[np.minimum(positions, len(self.ids) - 1)]
        return drawn


def token_pool(ids: TokenArray, weights: npt.NDArray[np.float64] | None = None) -> TokenPool:
    """A pool of `ids`, uniform without `weights`."""
    shares = np.ones(len(ids)) if weights is None else weights
    return TokenPool(ids.astype(np.int64), np.cumsum(shares / shares.sum()))


@dataclass(frozen=True)
class Vocabulary:
    """What prompts are made of: a token pool per domain; without known domains one, "any"."""

    domains: Mapping[str, TokenPool]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.domains)

    def pool_of(self, domain: str | None) -> TokenPool:
        """The pool of `domain`; a domain that the model does not know maps to one it does."""
        if domain is not None and domain in self.domains:
            return self.domains[domain]
        return self.domains[self.names[sum((domain or "").encode()) % len(self.names)]]


def uniform_vocabulary(low: int, high: int, excluded: Iterable[int] = ()) -> Vocabulary:
    """Ids of [low, high) without `excluded`; raises InputError when none is left."""
    ids = np.setdiff1d(np.arange(low, high), np.fromiter(excluded, dtype=np.int64))
    if not len(ids):
        raise InputError(f"vocabulary {low}:{high}: no usable token id")
    return Vocabulary({"any": token_pool(ids)})


def read_vocabulary(model: Path) -> Vocabulary:
    """Token ids of a model directory: the demo model's domains, or all non-special tokens.

    Raises InputError when the directory holds neither ``gimbal_demo.json`` nor ``config.json``.
    """
    demo = model / DEMO_FILE
    if demo.is_file():
        domains = read_object(demo).get("domains")
        if isinstance(domains, dict) and domains:
            return Vocabulary({str(k): _demo_pool(demo, k, v) for k, v in domains.items()})
        raise InputError(f"{demo}: 'domains' must map names to token ids and weights")
    if not any((model / name).is_file() for name in (HUGGING_FACE, MISTRAL)):
        raise InputError(f"{model}: no {DEMO_FILE} and no {HUGGING_FACE}: not a model directory")
    size = language_model(read_config(model)).count("vocab_size", most=MOST_VOCABULARY)
    return uniform_vocabulary(0, size, _special_tokens(model))


def _demo_pool(path: Path, domain: object, value: object) -> TokenPool:
    """The pool of one domain: ``{"token_ids": [...], "weights": [...]}``."""
    entry = value if isinstance(value, dict) else {}
    try:
        ids = np.array(entry["token_ids"], dtype=np.int64)
        weights = np.array(entry.get("weights", np.ones(len(ids))), dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: domains.{domain}: malformed ({error!r})") from None
    if ids.ndim != 1 or not ids.size or ids.shape != weights.shape:
        raise InputError(f"{path}: domains.{domain}: token_ids and weights do not fit together")
    if not 0 <= ids.min() <= ids.max() <= MOST_VOCABULARY:
        raise InputError(f"{path}: domains.{domain}: token_ids: expected 0 to {MOST_VOCABULARY}")
    if not ((weights >= 0) & (weights <= MOST)).all() or not weights.sum() >= LEAST_WEIGHT:
        raise InputError(f"{path}: domains.{domain}: weights: expected numbers >= 0, not all 0")
    return token_pool(ids, weights)


def _special_tokens(model: Path) -> set[int]:
    """Ids of tokens that the tokenizer adds to the model's words."""
    tokenizer, decoder = model / "tokenizer.json", model / "tokenizer_config.json"
    added = read_object(tokenizer).get("added_tokens") if tokenizer.is_file() else None
    ids = [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    by_id = read_object(decoder).get("added_tokens_decoder") if decoder.is_file() else None
    ids += list(by_id) if isinstance(by_id, dict) else []
    return {token for token in map(as_whole, ids) if token is not None and 0 <= token < 2**31}


class PromptWriter:
    """Writes the prompts of one run.

    Args:
        trace: the run's requests.
        vocabulary: what tokens may be used.
        salt: differs between any two runs that must not share cached prefixes.
    """

    def __init__(self, trace: Trace, vocabulary: Vocabulary, salt: tuple[int, ...]) -> None:
        self._trace = trace
        self._vocabulary = vocabulary
        self._salt = [int(part) & 0xFFFFFFFF for part in salt]
        # A block is written in the domain of the first request that has it, so that requests of
        # different domains that share it still agree on every token.
        self._block_domain: dict[int, str | None] = {}
        for request in trace.requests:
            for block in request.prefix_blocks:
                self._block_domain.setdefault(block, request.domain)
        self._blocks: dict[int, TokenArray] = {}

    def prompt(self, index: int) -> list[int]:
        """Token ids of request `index`; exactly its `prompt_tokens` of them."""
        request = self._trace.requests[index]
        parts = [self._block(block) for block in request.prefix_blocks]
        shared = np.concatenate(parts)[: request.prompt_tokens] if parts else np.empty(0, np.int64)
        rest = request.prompt_tokens - len(shared)
        pool = self._vocabulary.pool_of(request.domain)
        rng = np.random.default_rng([*self._salt, UNIQUE, index])
        return [*shared.tolist(), *pool.draw(rest, rng).tolist()]

    def _block(self, block: int) -> TokenArray:
        cached = self._blocks.get(block)
        if cached is None:
            pool = self._vocabulary.pool_of(self._block_domain[block])
            rng = np.random.default_rng([*self._salt, SHARED, block & 0xFFFFFFFF, block >> 32])
            cached = pool.draw(self._trace.prefix_block_tokens, rng)
            self._blocks[block] = cached
        return cached
