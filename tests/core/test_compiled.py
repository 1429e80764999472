"""Compiled kernels: the same results as their plain form, and nobody waits for them."""

import numpy as np
import pytest

from gimbal.core import compiled
from gimbal.core.dispatch import ledger
from gimbal.core.dispatch.policies import gimbal
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field


@pytest.fixture(scope="module", autouse=True)
def kernels():
    compiled.compile_kernels()


def boards(count):
    """Random boards: idle, busy, full, without measured speeds, and with unknown budgets."""
    rng = np.random.default_rng(11)
    for number in range(count):
        engines = int(rng.integers(1, 9))
        board = rng.integers(0, 3000, (engines, ROW_WIDTH)).astype(float)
        board[rng.random(board.shape) < 0.3] = 0.0
        if number % 5 == 0:
            board[:, Field.PREFILL_US_PER_TOKEN] = 0.0
        yield rng, engines, board


def test_prices_are_those_of_the_plain_function():
    assert gimbal.PRICE.compiled
    for rng, engines, board in boards(200):
        accounts = rng.integers(0, 500, (4, engines)).astype(float)
        scalars = (float(rng.integers(1, 5000)), 57.0, rng.random(), 1.0)
        plain, fast = np.empty((2, 8, engines))
        gimbal.PRICE.plain(board, *accounts, *scalars, plain)
        gimbal.PRICE.call(board, *accounts, *scalars, fast)
        np.testing.assert_allclose(fast, plain, rtol=1e-12)
        assert fast[-1].argmin() == plain[-1].argmin()


def test_accounts_are_those_of_the_plain_function():
    assert ledger.OBSERVE.compiled
    assert ledger.ENTER.compiled
    for rng, engines, board in boards(200):
        plain = rng.integers(0, 3, (ledger._ROWS, engines)).astype(float)
        fast = plain.copy()
        board[:, Field.EPOCH] = rng.integers(1, 3, engines)
        board[:, [ACCEPTED_REQUESTS, ACCEPTED_TOKENS]] = rng.integers(0, 3, (engines, 2))
        now_us = float(rng.integers(0, 200_000))
        entry = (int(rng.integers(engines)), 70.0, 64.0, now_us)
        ledger.ENTER.plain(plain, *entry)
        ledger.ENTER.call(fast, *entry)
        silent_us = ledger.OBSERVE.plain(board, plain, 0, now_us)
        np.testing.assert_equal(ledger.OBSERVE.call(board, fast, 0, now_us), silent_us)
        assert (fast == plain).all()


def test_a_call_with_other_types_is_refused_and_never_compiled():
    board = np.zeros((2, ROW_WIDTH), dtype=np.float32)
    with pytest.raises(TypeError):
        ledger.OBSERVE.call(board, np.zeros((ledger._ROWS, 2)), 0, 0.0)


def test_a_kernel_serves_before_and_after_it_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_KERNELS", [])
    kernel = compiled.Kernel(_one_more, "f8(f8)")
    assert not kernel.compiled
    assert kernel.call(1.0) == 2.0
    compiled.compile_kernels()
    assert kernel.compiled
    assert kernel.call(1.0) == 2.0


def test_the_cache_on_disk_knows_the_constants_of_other_modules(monkeypatch):
    before = compiled._named_by_constants(_one_more).__qualname__
    assert compiled._named_by_constants(_one_more).__qualname__ == before
    monkeypatch.setitem(globals(), "_STEP", 2.0)
    assert compiled._named_by_constants(_one_more).__qualname__ != before


_STEP = 1.0


def _one_more(x):
    return x + _STEP
