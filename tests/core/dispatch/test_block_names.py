"""An engine's KV blocks as chunks of the prefix index."""

import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from gimbal.core.dispatch.block_names import BlockNames
from gimbal.core.dispatch.prefix_index import PrefixIndex

TOKENS = list(range(400))


def hashes(tokens, size):
    """The engine's own names: any function of the whole prefix."""
    return [hash(tuple(tokens[:end])) for end in range(size, len(tokens) + 1, size)]


def common(a, b):
    """Leading tokens on which two prompts agree."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.mark.parametrize("block_tokens", [1, 4, 10, 16, 128])
def test_blocks_of_any_size_name_the_chunks_of_the_prompt(block_tokens):
    index = PrefixIndex(1, chunk_tokens=10)
    blocks = BlockNames(index)
    held = len(TOKENS) // block_tokens * block_tokens
    names = blocks.stored(None, hashes(TOKENS, block_tokens), TOKENS[:held], block_tokens)
    assert names == index.chunk_names(TOKENS[:held])


def test_blocks_arrive_over_several_steps_and_leave_from_the_end():
    index = PrefixIndex(2, chunk_tokens=8)
    blocks = BlockNames(index)
    names = hashes(TOKENS[:48], 4)
    index.insert_hashes(blocks.stored(None, names[:5], TOKENS[:20], 4), 1)
    assert index.match(TOKENS).cached_tokens.tolist() == [0, 16]
    index.insert_hashes(blocks.stored(names[4], names[5:], TOKENS[20:48], 4), 1)
    assert index.match(TOKENS).cached_tokens.tolist() == [0, 48]
    index.remove_hashes(blocks.removed(names[8:]), 1)
    assert index.match(TOKENS).cached_tokens.tolist() == [0, 32]
    assert len(blocks) == 8


def test_blocks_behind_an_unknown_one_are_left_out():
    blocks = BlockNames(PrefixIndex(1, chunk_tokens=4))
    assert blocks.stored("never seen", ["a"], TOKENS[:4], 4) == []
    assert blocks.removed(["a", "b"]) == []
    assert len(blocks) == 0


def test_a_table_that_outgrows_its_engine_starts_again():
    blocks = BlockNames(PrefixIndex(1, chunk_tokens=4), capacity_bytes=5000)
    for number in range(50):
        blocks.stored(None, [number], [number, 1, 2, 3], 4)
        blocks.stored(None, [number], [number, 1, 2, 3], 4)
        assert 1 <= len(blocks) <= 12
    blocks.removed(range(50))
    assert len(blocks) == blocks._bytes == 0


def test_bytes_held_are_bounded_whatever_the_blocks():
    """Blocks of 16 tokens behind a long prompt: each keeps up to 240 tokens of its chunk."""
    blocks = BlockNames(PrefixIndex(1), capacity_bytes=1 << 20)
    tracemalloc.start()
    for prompt in range(20):
        tokens = [prompt * 1000 + i for i in range(16 * 500)]
        hashes = [prompt.to_bytes(16, "big") + i.to_bytes(16, "big") for i in range(500)]
        blocks.stored(None, hashes, tokens, 16)
        del tokens, hashes
    held_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(blocks) > 500
    assert held_bytes < 1.5 * 2**20


def test_a_chunk_that_two_blocks_complete_is_gone_with_the_last_of_them():
    """As with blocks of 128 tokens, of which one and a half are alike."""
    index = PrefixIndex(1, chunk_tokens=2)
    blocks = BlockNames(index)
    one, other = [0, 0, 0, 0], [0, 0, 0, 1]
    for name, tokens in (("one", one), ("other", other)):
        index.insert_hashes(blocks.stored(None, [name], tokens, 4), 0)
    index.remove_hashes(blocks.removed(["one"]), 0)
    assert index.match([*other, 5]).cached_tokens.tolist() == [4]
    index.remove_hashes(blocks.removed(["other"]), 0)
    assert index.match([*other, 5]).cached_tokens.tolist() == [0]


@example(
    history=[
        (True, [0, 0, 0, 1, 0, 0]),
        (True, [0, 0, 0, 1, 1, 0]),
        (False, [0, 0, 0, 1, 0]),
    ],
    block_tokens=3,
)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=9)), max_size=12),
    st.integers(1, 3),
)
def test_follows_a_cache_that_evicts_ends_first(history, block_tokens):
    """Against an engine that really holds blocks; prompts overlap a lot."""
    index, cache = PrefixIndex(1, chunk_tokens=2), {}
    blocks = BlockNames(index)
    for store, tokens in history:
        if store:
            parent, known = None, hashes(tokens, block_tokens)
            for number, name in enumerate(known):
                if name not in cache:
                    own = tokens[number * block_tokens : (number + 1) * block_tokens]
                    cache[name] = tuple(tokens[: (number + 1) * block_tokens])
                    index.insert_hashes(blocks.stored(parent, [name], own, block_tokens), 0)
                parent = name
        else:
            gone = [n for n, held in cache.items() if held[: len(tokens)] == tuple(tokens)]
            for name in gone:
                del cache[name]
            index.remove_hashes(blocks.removed(gone), 0)
        held = max((common(h, tokens) for h in cache.values()), default=0)
        expected = min(held // 2 * 2, max(0, len(tokens) - 1))
        assert index.match(tokens).cached_tokens.tolist() == [expected]
