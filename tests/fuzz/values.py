"""Random numbers, texts and JSON values: mostly plausible, some at the edges, some absurd."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

EDGES: tuple[Any, ...] = (
    0, -0.0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63), 10**25, 10**54, 1e-300, 5e-324,
    1e300, -1e300, math.inf, -math.inf, math.nan, True, False,
)  # fmt: skip
WORDS = (
    "", " ", "gimbal", "vllm", "queue", "dispatch", "all", "none", "fcfs", "sjf", "auto", "0", "-1",
    "NaN", "inf", "1e400", "0x10", "1_000", "\x00", "\n", "\ud800", "é", "𝔽", "x" * 200, "../..",
    "/dev/null", "nowhere.x:Y", "json:JSONDecoder", "null", "[]", "{}", "'\"", "%s", "1.5", "true",
)  # fmt: skip


def count(rng: random.Random, most: int = 4096) -> int:
    """A whole number from 0 to `most`, small ones as likely as large ones."""
    return int(2 ** rng.uniform(0.0, math.log2(most + 1))) - 1


def absurd(rng: random.Random) -> Any:
    """A number at the edge of something."""
    return rng.choice(EDGES)


def number(rng: random.Random, absurd_share: float = 0.3) -> Any:
    """A whole number or a float, `absurd_share` of them from `EDGES`."""
    roll = rng.random()
    if roll < absurd_share:
        return absurd(rng)
    return count(rng) if roll < 0.7 else rng.uniform(-1.0, 100.0)


def text(rng: random.Random) -> str:
    """A word of `WORDS`, or one of them with a letter lost, doubled or changed."""
    word = rng.choice(WORDS)
    if ":" in word or rng.random() < 0.5:  # names of modules stay as they are: they are imported
        return word
    return misspelt(rng, word)


def misspelt(rng: random.Random, word: str) -> str:
    """`word` with one letter lost, doubled or changed."""
    if not word:
        return "x"
    at = rng.randrange(len(word))
    middle = rng.choice(("", word[at] * 2, "_", "Z"))
    return word[:at] + middle + word[at + 1 :]


def json_value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, and the numbers that Python's parser takes beyond JSON."""
    roll = rng.random()
    if depth == 0 or roll < 0.35:
        return number(rng)
    if roll < 0.55:
        return text(rng)
    if roll < 0.65:
        return None
    if roll < 0.82:
        return [json_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng): json_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated(
    rng: random.Random, keys: Mapping[str, Sequence[Any] | Mapping[str, Any]], share: float = 0.2
) -> dict[str, Any]:
    """Some of `keys` with plausible values; about `share` of keys and of values are wrong.

    Args:
        keys: key -> plausible values, or the keys of a section.
    """
    found: dict[str, Any] = {}
    for key in rng.sample(list(keys), rng.randrange(min(5, len(keys)) + 1)):
        plausible = keys[key]
        name = misspelt(rng, key) if rng.random() < share / 4 else key
        if rng.random() < share:
            found[name] = json_value(rng)
        elif isinstance(plausible, Mapping):
            found[name] = mutated(rng, plausible, share)
        else:
            found[name] = rng.choice(plausible)
    return found


@lru_cache(maxsize=1)
def folder() -> tempfile.TemporaryDirectory[str]:
    """Of the files that inputs are written to; gone with the process."""
    return tempfile.TemporaryDirectory(prefix="gimbal-fuzz-")


def finite(value: Any) -> bool:
    """Whether every number in a value made of mappings and sequences is finite."""
    if isinstance(value, Mapping):
        return all(finite(k) and finite(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def check(holds: Any, *said: Any) -> None:
    """An invariant: unlike ``assert`` it also holds under ``python -O``."""
    if not holds:
        raise AssertionError(" ".join(str(part) for part in said))
