"""An engine's own KV blocks in the prefix index's terms.

An engine that reports what its cache takes in and drops names blocks by its own hashes, and gives
a block's tokens and its predecessor. The index names longer chunks. A chunk is held once the block
that ends it is stored, and gone once that block is removed: engines evict the end of a prefix
before its beginning. Blocks that differ only behind a chunk's end inside them all hold that chunk,
so it is gone with the last of them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from gimbal.core.dispatch.prefix_index import PrefixIndex


class _Block(NamedTuple):
    """Where a prompt's walk stands behind one block."""

    begun_at: int  # position of the first token of the chunk that is not complete
    name: int  # of the last complete chunk
    tail: bytes  # tokens of the incomplete one, four bytes each
    ended: tuple[int, ...]  # names of chunks that this block completed

    @property
    def inside(self) -> tuple[int, ...]:
        """Names of those of them that end before it does: another block may complete them too."""
        return self.ended if self.tail else self.ended[:-1]


_START = _Block(0, 0, b"", ())


def _bytes_of(block: _Block) -> int:
    """About what an entry takes: its hash, its numbers and place in the dictionary; its parts."""
    return 400 + len(block.tail) + 40 * len(block.ended) + 100 * len(block.inside)


class BlockNames:
    """The blocks one engine holds.

    Args:
        index: whose chunks are named.
        capacity_bytes: memory of the blocks at most; a table that outgrows it starts again, since
            then removals were lost.
    """

    def __init__(self, index: PrefixIndex, capacity_bytes: int = 128 << 20) -> None:
        self._index = index
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._blocks: dict[Hashable, _Block] = {}
        self._holders: Counter[int] = Counter()  # blocks per chunk that ends inside them

    def __len__(self) -> int:
        return len(self._blocks)

    def stored(
        self,
        parent: Hashable | None,
        hashes: Sequence[Hashable],
        tokens: Sequence[int],
        block_tokens: int,
    ) -> list[int]:
        """Names of the chunks that consecutive new blocks complete.

        Args:
            parent: the block before the first one; None at the beginning of a prompt. Blocks
                behind an unknown one cannot be named and are left out.
            hashes: the engine's names of the blocks.
            tokens: [len(hashes) * block_tokens] their tokens.

        Raises OverflowError for a token that does not fit into 32 bits.
        """
        before = _START if parent is None else self._blocks.get(parent)
        if before is None:
            return []
        names: list[int] = []
        for number, block in enumerate(hashes):
            own = tokens[number * block_tokens : (number + 1) * block_tokens]
            before = self._advance(before, own)
            self._keep(block, before)
            names += before.ended
        return names

    def removed(self, hashes: Sequence[Hashable]) -> list[int]:
        """Names of the chunks that are incomplete without these blocks."""
        names: list[int] = []
        for block in hashes:
            known = self._blocks.pop(block, None)
            if known is not None:
                self._bytes -= _bytes_of(known)
                names += self._dropped(known)
        return names

    def _dropped(self, known: _Block) -> list[int]:
        """Names of the chunks that nobody holds once `known` is gone."""
        if not (inside := known.inside):
            return list(known.ended)
        self._holders.subtract(inside)
        kept = {name for name in inside if self._holders[name] > 0}
        for name in {*inside} - kept:
            del self._holders[name]
        return [name for name in known.ended if name not in kept]

    def clear(self) -> None:
        """The engine dropped everything."""
        self._blocks.clear()
        self._holders.clear()
        self._bytes = 0

    def _keep(self, block: Hashable, known: _Block) -> None:
        self.removed((block,))
        if self._bytes > self._capacity_bytes:
            self.clear()
        self._blocks[block] = known
        if inside := known.inside:
            self._holders.update(inside)
        self._bytes += _bytes_of(known)

    def _advance(self, before: _Block, tokens: Sequence[int]) -> _Block:
        start, name, tail = before.begun_at, before.name, (*array("I", before.tail), *tokens)
        ended = []
        while len(tail) >= (size := self._index.chunk_size(start)):
            name = self._index.chunk_name(name, tail[:size])
            ended.append(name)
            start, tail = start + size, tail[size:]
        return _Block(start, name, array("I", tail).tobytes(), tuple(ended))
