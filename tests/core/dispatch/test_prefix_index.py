import random
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gimbal.core.dispatch.prefix_index import PrefixIndex


def prompt(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(150_000) for _ in range(length)]


def cached(index, tokens):
    return index.match(tokens).cached_tokens.tolist()


def test_whole_chunks_of_the_common_prefix():
    index = PrefixIndex(3, chunk_tokens=64)
    tokens = prompt(200)
    index.insert(tokens, 1)
    assert cached(index, tokens) == [0, 192, 0]
    assert cached(index, tokens[:130] + prompt(100, 1)) == [0, 128, 0]
    assert cached(index, tokens[:63] + prompt(100, 1)) == [0, 0, 0]
    assert cached(index, prompt(200, 2)) == [0, 0, 0]
    assert cached(index, []) == [0, 0, 0]


def test_a_block_is_reused_only_where_the_tokens_behind_it_are_known_too():
    index = PrefixIndex(1, chunk_tokens=64)
    index.block_tokens, index.lookahead_tokens = 16, 1
    tokens = prompt(200)
    index.insert(tokens, 0)
    assert cached(index, tokens) == [176]
    assert cached(index, tokens[:70] + prompt(100, 1)) == [48]


def test_chunks_count_only_behind_the_same_beginning():
    index = PrefixIndex(1, chunk_tokens=4)
    index.insert([1, 2, 3, 4, 5, 6, 7, 8], 0)
    assert cached(index, [9, 2, 3, 4, 5, 6, 7, 8]) == [0]


def test_engines_drop_out_where_their_prefix_ends():
    index = PrefixIndex(3, chunk_tokens=10)
    tokens = prompt(50)
    index.insert(tokens[:20], 0)
    index.insert(tokens, 2)
    match = index.match([*tokens, 1, 2])
    assert match.cached_tokens.tolist() == [20, 0, 50]
    assert match.longest == 50


def test_the_last_token_is_always_computed():
    index = PrefixIndex(1, chunk_tokens=64)
    index.insert(prompt(128), 0)
    assert cached(index, prompt(128)) == [127]


def test_insert_reuses_the_hashes_of_a_match():
    index = PrefixIndex(2, chunk_tokens=8)
    tokens = prompt(100)
    index.insert(tokens[:48], 0)
    match = index.match(tokens)
    assert len(match.names) == 7  # six found and the first miss
    index.insert(match, 1)
    assert cached(index, tokens) == [48, 96]


def test_clear_and_removal_by_name():
    index = PrefixIndex(2, chunk_tokens=10)
    tokens = prompt(30)
    index.insert(tokens, 0)
    index.insert(tokens, 1)
    index.remove_hashes(index.chunk_names(tokens)[1:], 1)
    assert cached(index, tokens) == [29, 10]
    index.clear(0)
    assert cached(index, tokens) == [0, 10]
    index.insert_hashes(index.chunk_names(tokens)[:2], 0)
    assert cached(index, tokens) == [20, 10]


def test_clearing_thousands_of_times_keeps_the_others_right():
    index = PrefixIndex(2, chunk_tokens=10)
    for number in range(5000):
        index.insert(prompt(20, number), 0)
        index.clear(0)
        assert cached(index, prompt(20, number)) == [0, 0]
    index.insert(prompt(20), 1)
    assert cached(index, prompt(20)) == [0, 19]


def test_an_entry_stays_small_however_often_engines_are_cleared():
    index = PrefixIndex(256, chunk_tokens=10)
    for number in range(2000):
        index.clear(number % 256)
        index.insert(prompt(20, number), 7)
    masks = [mask for shard in (*index._young, *index._old) for mask in shard.values()]
    assert masks
    assert max(map(sys.getsizeof, masks)) < 100


def test_resize_forgets_engines_that_left():
    index = PrefixIndex(3, chunk_tokens=10)
    tokens = prompt(30)
    for engine in range(3):
        index.insert(tokens, engine)
    index.resize(1)
    assert cached(index, tokens) == [29]
    index.resize(3)
    assert cached(index, tokens) == [29, 0, 0]


@pytest.mark.parametrize("capacity", [10, 1000, 20_000])
def test_bounded_and_keeps_what_is_used(capacity):
    index = PrefixIndex(1, capacity, chunk_tokens=2)
    kept = prompt(8, 999_999)
    index.insert(kept, 0)
    for number in range(3 * capacity):
        index.insert([number, 1, number, 2], 0)
        if number % max(1, capacity // 8) == 0:
            index.insert(kept, 0)
    assert len(index) <= capacity + 2
    if capacity > 10:
        assert cached(index, kept) == [7]
    assert cached(index, [0, 1, 0, 2]) == [0]


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), max_size=9)), max_size=12))
def test_agrees_with_a_set_of_prefixes(history):
    """Against the obvious implementation, over prompts that overlap a lot."""
    index, held = PrefixIndex(4, chunk_tokens=2), [set() for _ in range(4)]
    for engine, tokens in history:
        expected = [
            min(
                max(n for n in range(0, len(tokens) + 1, 2) if tuple(tokens[:n]) in mine or n == 0),
                max(0, len(tokens) - 1),
            )
            for mine in held
        ]
        assert cached(index, tokens) == expected
        index.insert(tokens, engine)
        held[engine] |= {tuple(tokens[:n]) for n in range(2, len(tokens) + 1, 2)}
