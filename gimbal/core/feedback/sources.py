"""What dispatch tells placement: who will ask for which experts next, and for how long.

Placement plans on rows [source, layer, expert] of the last window. Dispatch knows better in two
ways: how many tokens each source will get next, and which domains it now prefers to send where
(sessions and cached prefixes stay, the rest follows affinity). And it knows how long its mix has
held, which is over how many steps a migration may be amortized.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gimbal.core.contracts import FloatArray, RoutingCounts


def expected_tokens(recent: FloatArray, preferred: FloatArray, movable: float) -> FloatArray:
    """[sources, domains] tokens of the next window.

    Each domain's tokens are conserved: a share `movable` of them goes where dispatch prefers, the
    rest (sessions and cached prefixes that stay where they are) where it went before.

    Args:
        recent: [sources, domains] tokens of the last window.
        preferred: [sources, domains] shares of new work, every column summing to 1.
        movable: share of tokens dispatch is free to move, 0 to 1.
    """
    total = recent.sum(axis=0, keepdims=True)
    return np.asarray((1.0 - movable) * recent + movable * preferred * total)


def preferred_shares(
    us_per_token: FloatArray, capacity: FloatArray, demand: FloatArray
) -> FloatArray:
    """[sources, domains] where affinity alone would send each domain, as load allows.

    Domains with most to gain choose first; each fills its cheapest source up to an even share of
    all tokens (`capacity` weighs sources), the rest goes to the next.

    Args:
        us_per_token: [domains, sources] affinity cost.
        capacity: [sources] relative speed.
        demand: [domains] tokens of the next window.
    """
    sources = len(capacity)
    room = demand.sum() * capacity / capacity.sum()
    shares = np.zeros((sources, len(demand)))
    spread = (us_per_token.mean(axis=1) - us_per_token.min(axis=1)) * demand
    for domain in np.argsort(-spread, kind="stable"):
        left = demand[domain]
        if left <= 0 or spread[domain] <= 0:
            continue
        for source in np.argsort(us_per_token[domain], kind="stable"):
            taken = min(left, room[source])
            shares[source, domain] += taken / demand[domain]
            room[source] -= taken
            left -= taken
    unchosen = shares.sum(axis=0) < 1e-9
    shares[:, unchosen] = (capacity / capacity.sum())[:, None]
    return np.asarray(shares / shares.sum(axis=0, keepdims=True))


def rescaled(counts: RoutingCounts, recent: FloatArray, expected: FloatArray) -> RoutingCounts:
    """`counts` as they would be if every source got its expected tokens of each domain.

    Rows are known per source, not per domain: a source's row is scaled to its expected tokens,
    and work that moves between sources brings the row of where it came from.

    Args:
        counts: rows [source, layer, expert] of the last window.
        recent, expected: [sources, domains] tokens, each domain with the same sum in both.
    """
    before = recent.sum(axis=1)
    lost = np.maximum(recent - expected, 0.0)
    gained = np.maximum(expected - recent, 0.0)
    flow = np.zeros((len(before), len(before)))  # [from, to] tokens
    for domain in range(recent.shape[1]):
        arrived = gained[:, domain].sum()
        if arrived > 1e-12 * recent[:, domain].sum():  # below that it is rounding
            flow += np.outer(lost[:, domain], gained[:, domain] / arrived)
    np.fill_diagonal(flow, 0.0)
    np.fill_diagonal(flow, before - flow.sum(axis=1))
    rate = flow / np.maximum(before, 1e-300)[:, None]
    mixed = np.tensordot(rate.T, counts.counts, axes=1)
    return RoutingCounts(np.asarray(mixed), None, counts.steps)


def stable_windows(mixes: Sequence[FloatArray], most: int = 8) -> int:
    """For how many windows the last mix has held, and so may be expected to hold, 1 to `most`.

    A window belongs to the stretch while the total variation of its shares from the last window's
    stays below what two samples of the smaller window's size would show by chance (three standard
    deviations of a multinomial cell sum, ``1.5 sqrt(cells / n)``). By symmetry a mix that has
    held for n windows lasts n more in the median (Gott, Nature 363, 1993).

    Args:
        mixes: [sources, domains] requests of each past window, oldest first.
        most: longer stretches are not trusted.
    """
    if not mixes:
        return 1
    last = mixes[-1]
    held = 1
    for earlier in reversed(mixes[:-1]):
        fewest = min(last.sum(), earlier.sum())
        if fewest <= 0 or held >= most:
            break
        apart = 0.5 * np.abs(last / last.sum() - earlier / earlier.sum()).sum()
        if apart > 1.5 * np.sqrt(last.size / fewest):
            break
        held += 1
    return held


def persistence(previous: FloatArray, rows: FloatArray) -> float:
    """How much of what sets a source apart from the others is still there one window later.

    The slope of this window's deviations from the pooled row on the last window's. 0 when dispatch
    sends every domain everywhere, near 1 under affinity.

    Args:
        previous, rows: [sources, layers, experts] counts of two successive windows.
    """
    return slope(_deviations(previous), _deviations(rows))


def slope(before: FloatArray, now: FloatArray) -> float:
    """Regression of `now` on `before` through the origin, clipped to 0..1; 0 where `before` is 0.

    Sampling noise in the earlier window lowers it, as it should: a deviation that is noise will
    not come back.
    """
    squares = float((before * before).sum())
    return float(np.clip((before * now).sum() / squares, 0.0, 1.0)) if squares > 0 else 0.0


def shrunk(counts: RoutingCounts, kept: float) -> RoutingCounts:
    """Rows whose deviations from the pooled row are scaled by `kept`; every expert's total stays.

    What placement may expect of the next window where dispatch does not hold sources apart:
    planned on the rows as they were, it moves experts after differences that have gone.
    """
    rows = counts.counts
    tokens = rows.sum(axis=2, keepdims=True)
    pooled = rows.sum(axis=0) / np.maximum(tokens.sum(axis=0), 1e-300)
    expected = tokens * (pooled + kept * _deviations(rows))
    return RoutingCounts(np.asarray(np.maximum(expected, 0.0)), counts.active, counts.steps)


def _deviations(rows: FloatArray) -> FloatArray:
    """[sources, layers, experts] each source's shares less the pooled shares."""
    tokens = rows.sum(axis=2, keepdims=True)
    pooled = rows.sum(axis=0) / np.maximum(tokens.sum(axis=0), 1e-300)
    return np.asarray(np.where(tokens > 0, rows / np.maximum(tokens, 1e-300) - pooled, 0.0))
