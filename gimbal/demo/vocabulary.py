"""The demo model's words: pronounceable, one token each, a set per domain and a shared one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.demo.sizes import FIRST_WORD_ID, DemoSizes

_ONSETS = (*"bdfghklmnprstvz", "br", "dr", "gl", "kr", "pl", "st", "tr", "sh", "th")
_VOWELS = (*"aeiou", "ai", "ea", "io", "ou")
_CODAS = ("", "", "", "n", "r", "s", "l", "m", "th", "nd")

DOMAIN_SHARE = 0.7
"""Share of a prompt's words that belong to its domain; the rest are shared by all domains."""
ZIPF_EXPONENT = 0.9
"""Word frequency falls as rank**-0.9 within a set, close to natural text (Zipf's law)."""


@dataclass(frozen=True, slots=True)
class DemoVocabulary:
    """Word tokens and who uses them.

    Attributes:
        words: text of token FIRST_WORD_ID + i, each with a leading space.
        domain_of: [vocab] domain index of every token, -1 for bytes, specials and shared words.
        shared: ids of shared words.
        by_domain: ids of each domain's words, most frequent first.
    """

    words: tuple[str, ...]
    domain_of: np.ndarray
    shared: np.ndarray
    by_domain: tuple[np.ndarray, ...]

    def weights(self, domain: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, probabilities) of a word in a prompt of `domain`."""
        own, shared = self.by_domain[domain], self.shared
        ids = np.concatenate([own, shared])
        probabilities = np.concatenate(
            [DOMAIN_SHARE * _zipf(len(own)), (1 - DOMAIN_SHARE) * _zipf(len(shared))]
        )
        return ids, probabilities


def _zipf(n: int) -> np.ndarray:
    weights: np.ndarray = np.arange(1, n + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    weights /= weights.sum()
    return weights


def build_vocabulary(sizes: DemoSizes, rng: np.random.Generator) -> DemoVocabulary:
    """Draws the words and deals them to the domains and the shared set in equal parts."""
    count = sizes.vocab - FIRST_WORD_ID
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = int(rng.integers(1, 4))
        word = " " + "".join(
            _ONSETS[rng.integers(len(_ONSETS))]
            + _VOWELS[rng.integers(len(_VOWELS))]
            + _CODAS[rng.integers(len(_CODAS))]
            for _ in range(syllables)
        )
        words[word] = None
    ids = FIRST_WORD_ID + rng.permutation(count)
    parts = np.array_split(ids, sizes.domains + 1)
    domain_of = np.full(sizes.vocab, -1, dtype=np.int64)
    for domain, part in enumerate(parts[1:]):
        domain_of[part] = domain
    return DemoVocabulary(tuple(words), domain_of, parts[0], tuple(parts[1:]))
