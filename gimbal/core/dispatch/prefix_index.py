"""Which engine has which prompt prefix in its KV cache: approximate, bounded, fast.

A prompt is cut into chunks; chunk i is named by a hash chained over chunks 0 to i, so one look-up
per chunk answers "who has this whole prefix", and a miss ends the walk: a prompt nobody has seen
costs one chunk. The tail of a prompt shorter than one chunk never counts. Python's own tuple hash
(xxHash64 rounds in C) names a chunk: it is the cheapest way from a list of token ids to 64 bits
that exists without a compiled extension. An accidental collision costs one worse choice of engine,
never a wrong answer.

The first sixteen chunks have `chunk_tokens` (64): coarse enough that the walk costs less than the
hashing, fine enough to see a short shared system prompt. vLLM's own blocks (16 tokens on GPUs)
would quadruple both memory and walk for prefixes that save less than a millisecond. Later chunks
are four times as long: who finds 1,024 tokens cached does not choose by another 64, and a long
conversation is walked in half the look-ups or fewer.

Memory is bounded by generations instead of by a linked list. Names are spread over many small
shards; each holds a young and an old dictionary. A name used again moves to the young one; when
that is full the old one is dropped and the young one takes its place. The largest pause is the
release of one shard's dictionary (a few hundred entries), never of the whole index, and Python's
re-hashing of a growing dictionary is bounded the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray

CHUNK_TOKENS = 64
_FINE_CHUNKS, _COARSER = 16, 4  # later chunks are so many times longer
_NAME_BITS = (1 << 60) - 1  # two 30-bit digits: a Python int of 32 bytes instead of 40
_MAX_SHARDS, _SHARD_CHUNKS = 1024, 64
_MAX_BITS = 512
"""Bit positions used up by clearing engines before the index starts afresh.

An entry's mask takes 92 bytes at most, the entry with its dictionary slot about 250."""


@dataclass(slots=True)
class PrefixMatch:
    """The answer to one look-up, and what an insertion of the same prompt can reuse.

    Attributes:
        cached_tokens: [engines] leading tokens of the prompt the engine is believed to hold.
        longest: the most of them.
        names: chunk names hashed so far.
        tokens: the whole prompt.
    """

    cached_tokens: FloatArray
    longest: int
    names: list[int]
    tokens: Sequence[int]


class PrefixIndex:
    """Prefix chunks by engine, at most about `capacity` chunks in all.

    Args:
        engines: engines in rank order.
        capacity: chunks held at most; the older half is what gets dropped.
        chunk_tokens: tokens of each of the first sixteen chunks.

    Attributes:
        block_tokens: the engines' KV blocks; they reuse whole ones only.
        lookahead_tokens: tokens behind a block that must be known as well for it to be reused.
    """

    def __init__(
        self, engines: int, capacity: int = 1_000_000, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self.block_tokens, self.lookahead_tokens = 1, 0
        self._fine_tokens = _FINE_CHUNKS * chunk_tokens
        self._shard_mask = 0
        self._young: list[dict[int, int]] = [{}]
        self._old: list[dict[int, int]] = [{}]
        self._bits: list[int] = []  # engine -> its mask; cleared engines get a new one
        self._next_bit = 0
        self._valid = 0
        self.set_capacity(capacity)
        self.resize(engines)

    @property
    def engines(self) -> int:
        """Engines the answers have a row for."""
        return len(self._bits)

    def __len__(self) -> int:
        """Chunks held now; a chunk in both generations of its shard counts twice."""
        return sum(map(len, self._young)) + sum(map(len, self._old))

    def set_capacity(self, capacity: int) -> None:
        """Bounds the chunks held from now on, for example by the engines' whole KV memory."""
        mask = min(_MAX_SHARDS, _power_of_two_at_most(max(1, capacity // _SHARD_CHUNKS))) - 1
        self._half_shard = max(1, capacity // (2 * (mask + 1)))
        if mask == self._shard_mask:
            return
        self._shard_mask = mask
        for shards in (self._old, self._young):
            chunks: dict[int, int] = {}
            for shard in shards:
                chunks.update(shard)
            shards[:] = [{} for _ in range(mask + 1)]
            for name, holders in chunks.items():
                shards[name & mask][name] = holders

    def match(self, tokens: Sequence[int]) -> PrefixMatch:
        """Leading tokens of the prompt `tokens` that each engine is believed to hold."""
        young, old, shard_mask = self._young, self._old, self._shard_mask
        names: list[int] = []
        candidates, name, start = self._valid, 0, 0
        depths: list[tuple[int, int]] = []  # (tokens, engines whose match ends there)
        size, coarse_from, length = self.chunk_tokens, self._fine_tokens, len(tokens)
        end = size
        while end <= length:
            name = hash((name, tuple(tokens[start:end]))) & _NAME_BITS
            names.append(name)
            shard = name & shard_mask
            holders = young[shard].get(name)
            if holders is None:
                holders = old[shard].get(name, 0)
            holders &= candidates
            if holders != candidates:
                if start:
                    depths.append((start, candidates & ~holders))
                if not holders:
                    break
                candidates = holders
            start = end
            if end == coarse_from:
                size *= _COARSER
            end += size
        else:
            if start:
                depths.append((start, candidates))
        return PrefixMatch(self._cached(depths, length), start, names, tokens)

    def insert(self, tokens: Sequence[int] | PrefixMatch, engine: int) -> None:
        """Notes that `engine` (will) hold the prompt; a `PrefixMatch` saves hashing it twice."""
        if isinstance(tokens, PrefixMatch):
            names = self.chunk_names(tokens.tokens, tokens.names)
        else:
            names = self.chunk_names(tokens)
        self.insert_hashes(names, engine)

    def insert_hashes(self, names: Iterable[int], engine: int) -> None:
        """Notes chunks by name, for whoever hashes by the same rule (`chunk_names`)."""
        young, old, shard_mask, half = self._young, self._old, self._shard_mask, self._half_shard
        bit = self._bits[engine]
        for name in names:
            shard = name & shard_mask
            chunks = young[shard]
            holders = chunks.get(name)
            if holders is not None:
                if not holders & bit:
                    chunks[name] = holders | bit
                continue
            if len(chunks) >= half:
                old[shard] = chunks
                chunks = young[shard] = {}
            before = old[shard].get(name)
            chunks[name] = bit if before is None else (before | bit)

    def remove_hashes(self, names: Iterable[int], engine: int) -> None:
        """Forgets chunks that `engine` evicted."""
        keep = ~self._bits[engine]
        for name in names:
            shard = name & self._shard_mask
            for chunks in (self._young[shard], self._old[shard]):
                holders = chunks.get(name)
                if holders is not None:
                    chunks[name] = holders & keep

    def clear(self, engine: int) -> None:
        """Forgets everything `engine` held. O(1): its old bit is retired, not erased."""
        self._bits[engine] = self._new_bit()
        self._valid = 0
        for bit in self._bits:
            self._valid |= bit

    def resize(self, engines: int) -> None:
        """Adds engines with nothing cached, or drops the last ones."""
        if engines < len(self._bits):
            del self._bits[engines:]
        while len(self._bits) < engines:
            self._bits.append(self._new_bit())
        self._valid = sum(self._bits)

    def chunk_names(self, tokens: Sequence[int], known: Sequence[int] = ()) -> list[int]:
        """Names of all whole chunks of the prompt `tokens`, the first of which may be `known`."""
        names = list(known)
        fine = min(len(names), _FINE_CHUNKS)
        start = self.chunk_tokens * (fine + _COARSER * (len(names) - fine))
        name = names[-1] if names else 0
        while (end := start + self.chunk_size(start)) <= len(tokens):
            name = self.chunk_name(name, tuple(tokens[start:end]))
            names.append(name)
            start = end
        return names

    def chunk_size(self, start: int) -> int:
        """Tokens of the chunk that begins at token `start`."""
        return self.chunk_tokens * (1 if start < self._fine_tokens else _COARSER)

    @staticmethod
    def chunk_name(before: int, tokens: tuple[int, ...]) -> int:
        """Name of the chunk `tokens` behind the chunk `before` (0: the first)."""
        return hash((before, tokens)) & _NAME_BITS

    def _new_bit(self) -> int:
        if self._next_bit >= _MAX_BITS:
            for chunks in (*self._young, *self._old):
                chunks.clear()
            self._bits = [1 << position for position in range(len(self._bits))]
            self._next_bit = len(self._bits)
        self._next_bit += 1
        return 1 << (self._next_bit - 1)

    def _cached(self, depths: list[tuple[int, int]], prompt_tokens: int) -> FloatArray:
        cached = np.zeros(len(self._bits))
        for tokens, holders in depths:
            # The engine always computes the last token itself: it needs its logits.
            known = tokens - self.lookahead_tokens
            if known >= prompt_tokens:
                known = prompt_tokens - 1
            if known <= 0:
                continue
            value = known // self.block_tokens * self.block_tokens
            for engine, bit in enumerate(self._bits):
                if holders & bit:
                    cached[engine] = value
        return cached


def _power_of_two_at_most(value: int) -> int:
    return 1 << (value.bit_length() - 1)
