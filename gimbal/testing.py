"""Builders and checks for tests of policies: docs/writing-a-policy.md shows them at work.

`loads`, `request`, `queued`, `queue_state`, `routing`, `topology` and `placement` make what a
policy is shown, with a default for all that a test does not care about. The three ``check_``
functions show a policy the cases that are easily forgotten. To see what a policy does to queues
and latencies, run it in the simulator (`gimbal simulate`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gimbal.core.contracts import (
    DispatchRequest,
    EngineLoads,
    FloatArray,
    IntArray,
    QueuedRequest,
    QueueState,
    RoutingCounts,
    Topology,
    traits_of,
)
from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError, PolicyError, nearest
from gimbal.core.placement import PLACERS, verify
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.heap import WaitingHeap
from gimbal.core.registry import Registry
from gimbal.core.snapshot import ROW_WIDTH, Field

__all__ = [
    "check_dispatch_policy",
    "check_ordering",
    "check_placer",
    "loads",
    "placement",
    "queue_state",
    "queued",
    "request",
    "routing",
    "topology",
]

Column = float | Sequence[float] | FloatArray

_COLUMNS = {field.name.lower(): field for field in Field}
_ACCOUNTS = (
    "unacked_requests",
    "unacked_tokens",
    "inflight_requests",
    "inflight_tokens",
    "cached_tokens",
    "age_us",
    "unacked_cached_tokens",
)
_IDLE = {
    "kv_blocks_total": 1000.0,
    "kv_block_tokens": 16.0,
    "step_base_us": 1000.0,
    "prefill_us_per_token": 10.0,
    "decode_us_per_request": 10.0,
    "step_token_budget": 100.0,
    "max_running_requests": 64.0,
    "prefill_tokens_per_s": 10_000.0,
}


def loads(
    engines: int | None = None,
    *,
    client_count: int = 1,
    rotation: int = 0,
    prefix_reuse: float = 0.0,
    feedback_weight: float = 0.0,
    **columns: Column,
) -> EngineLoads:
    """What a dispatch policy is shown: idle engines, but for `columns`.

    Args:
        engines: how many; by default as many as a column has, or two.
        columns: a snapshot field by its name in lower case, or one of the accounts of
            `EngineLoads`: one value per engine, or one for all.

    Raises InputError for an unknown column or one of another length.
    """
    values = {name: np.asarray(value, dtype=float) for name, value in columns.items()}
    lengths = {len(value) for value in values.values() if value.ndim}
    if engines is not None:
        lengths.add(engines)
    if len(lengths) > 1:
        raise InputError(f"loads: columns of different lengths {sorted(lengths)}")
    count = lengths.pop() if lengths else 2
    board = np.zeros((count, ROW_WIDTH))
    accounts = {name: np.zeros(count) for name in _ACCOUNTS}
    for name, value in (_IDLE | values).items():
        if name in _COLUMNS:
            board[:, _COLUMNS[name]] = value
        elif name in accounts:
            accounts[name][:] = value
        else:
            raise InputError(f"loads: {name}{nearest(name, (*_COLUMNS, *_ACCOUNTS))}")
    return EngineLoads(
        board,
        **accounts,
        client_count=client_count,
        rotation=rotation,
        prefix_reuse=prefix_reuse,
        feedback_weight=feedback_weight,
    )


def request(
    prompt_tokens: int = 100,
    request_id: str = "r",
    arrival_us: float = 0.0,
    session: str | None = None,
    priority: int = 0,
    domain: str | None = None,
    loaded_tokens: int = 0,
) -> DispatchRequest:
    """A request as dispatch sees it."""
    return DispatchRequest(
        request_id, prompt_tokens, arrival_us, session, priority, domain, loaded_tokens
    )


def queued(
    uncached_tokens: int = 100,
    request_id: str = "r",
    arrival_s: float = 0.0,
    priority: int = 0,
    served_before_tokens: float = 0.0,
) -> QueuedRequest:
    """A request as a queue ordering sees it."""
    return QueuedRequest(request_id, arrival_s, uncached_tokens, priority, served_before_tokens)


def queue_state(
    now_s: float = 0.0,
    prefill_tokens_per_s: float = 1000.0,
    waiting_requests: int = 1,
    waiting_tokens: int = 0,
    served_tokens: float = 0.0,
) -> QueueState:
    """An engine's condition as a queue ordering sees it."""
    return QueueState(now_s, prefill_tokens_per_s, waiting_requests, waiting_tokens, served_tokens)


def routing(
    counts: npt.ArrayLike | None = None,
    *,
    active: npt.ArrayLike | None = None,
    steps: int = 1,
    sources: int = 1,
    layers: int = 1,
    experts: int = 8,
    seed: int = 0,
) -> RoutingCounts:
    """A window of routed tokens: `counts` [sources, layers, experts], or skewed random ones."""
    if counts is None:
        rng = np.random.default_rng(seed)
        counts = np.floor(rng.pareto(1.2, (sources, layers, experts)) * 50)
    known = None if active is None else np.asarray(active, dtype=float)
    return RoutingCounts(np.asarray(counts, dtype=float), known, steps)


def topology(
    ranks: int = 2, slots_per_rank: int = 4, ranks_per_source: int = 1, ranks_per_node: int = 8
) -> Topology:
    """Where expert slots live."""
    return Topology(ranks, slots_per_rank, ranks_per_source, ranks_per_node)


def placement(layers: int = 1, slots: int = 8, experts: int = 8) -> IntArray:
    """[layers, slots] vLLM's first placement: slot s holds expert s modulo `experts`."""
    return np.tile(np.arange(slots, dtype=np.int32) % experts, (layers, 1))


def check_dispatch_policy(policy: str | object, options: Mapping[str, Any] | None = None) -> None:
    """Asks a dispatch policy about one to eight engines that are idle, busy, full or unknown.

    Args:
        policy: a name, as in the configuration, or the policy itself.
        options: of a policy that is named.

    Raises AssertionError naming the case in which the answer is not one finite number or more
    and no NaN, one per engine, or what it was shown has been changed.
    """
    asked: Any = _fresh(POLICIES, policy, options)
    for case, state in _load_cases():
        before = copy.deepcopy(state)
        for tokens in (1, 100, 100_000):
            shown = request(tokens, session="s")
            where = f"{_said('dispatch policy', policy)}, {case}, prompt of {tokens} tokens"
            costs = asked.costs(shown, state)
            _check_costs(costs, len(state.board), where)
            if getattr(asked, "term_names", ()):
                _check_terms(asked, shown, state, costs, where)
            for name in EngineLoads._fields:
                same = np.array_equal(getattr(before, name), getattr(state, name))
                assert same, f"{where}: it changed {name}"


def _load_cases() -> Iterator[tuple[str, EngineLoads]]:
    unknown: dict[str, Any] = dict.fromkeys(_COLUMNS, 0.0)
    full: dict[str, Any] = {
        "kv_blocks_used": 1000.0,
        "running_requests": 64.0,
        "decoding_requests": 64.0,
        "running_tokens": 16_000.0,
        "waiting_requests": 500.0,
        "waiting_prefill_tokens": 500_000.0,
    }
    for engines in (1, 2, 8):
        number = f"{engines} engine{'s' * (engines > 1)}"
        rng = np.random.default_rng(engines)
        busy: dict[str, Any] = {name: rng.integers(0, 60, engines) for name in (*full, *_ACCOUNTS)}
        yield f"{number} that have said nothing yet", loads(engines, **unknown)
        yield f"{number}, idle", loads(engines)
        yield f"{number}, busy", loads(engines, **busy, prefix_reuse=0.5, feedback_weight=1.0)
        yield f"{number}, full", loads(engines, **full, unacked_requests=3, unacked_tokens=900)


def _check_costs(costs: Any, engines: int, where: str) -> None:
    assert isinstance(costs, np.ndarray), f"{where}: costs are no array but {costs!r}"
    shape = costs.shape
    assert shape == (engines,), f"{where}: costs of shape {shape}, expected ({engines},)"
    assert costs.dtype.kind in "fiu", f"{where}: costs are no numbers but {costs.dtype}"
    assert not np.isnan(costs).any(), f"{where}: costs are NaN: {costs.tolist()}"
    least = float(costs.min())
    assert math.isfinite(least), f"{where}: no engine can be chosen by {costs.tolist()}"


def _check_terms(
    policy: Any, shown: DispatchRequest, state: EngineLoads, costs: FloatArray, where: str
) -> None:
    priced, names = policy.priced(shown, state), policy.term_names
    expected = (len(names) + 1, len(costs))
    assert priced.shape == expected, f"{where}: priced of shape {priced.shape}, not {expected}"
    for said, total in (("the last row", priced[-1]), ("the terms' sum", priced[:-1].sum(axis=0))):
        assert np.allclose(total, costs), f"{where}: {said} {total} is not the costs {costs}"
    for engine in range(len(costs)):
        bound = policy.session_bound_us(shown, state, engine)
        assert bound <= math.inf, f"{where}: session_bound_us of engine {engine} is {bound}"


def check_ordering(ordering: str | object, options: Mapping[str, Any] | None = None) -> None:
    """Queues requests of all sizes under an ordering, on an engine that is idle, busy or new.

    Args as `check_dispatch_policy`. Raises AssertionError when a key is no number, a dynamic
    ordering gives another number of keys than there are requests, a bound is none, or what it
    declares cannot be.
    """
    said, asked = _said("queue ordering", ordering), _fresh(ORDERINGS, ordering, options)
    traits = traits_of(asked)
    static = "a running prefill competes by a key that does not change"
    assert not (traits.dynamic and traits.shares_steps), f"{said}: dynamic, shares_steps: {static}"
    for rate in (0.0, 10_000.0):
        for waiting in (0, 1, 200):
            heap: WaitingHeap[None] = WaitingHeap(_fresh(ORDERINGS, ordering, options))
            try:
                _serve(heap, rate, waiting)
            except PolicyError as error:
                raise AssertionError(
                    f"{said}, {waiting} waiting, {rate:g} tokens/s: {error}"
                ) from error
    for rate in (0.0, 10_000.0) if hasattr(asked, "bound_s") else ():
        bound = asked.bound_s(5000.0, 100, rate)
        assert bound >= 0.0, f"{said}: bound_s at {rate:g} tokens/s is {bound}"


def _serve(heap: WaitingHeap[None], rate: float, waiting: int) -> None:
    """Keeps `waiting` requests in the queue while it serves twenty."""
    served = 0.0
    for number in range(waiting + 20):
        now_s = 0.1 * number
        state = queue_state(now_s, rate, len(heap), heap.waiting_tokens, served)
        tokens = (0, 1, 70, 3000, 100_000)[number % 5]
        heap.add(queued(tokens, f"r{number}", now_s, number % 3, served), None, state)
        heap.refresh(state)
        if number >= waiting:
            served += heap.pop(now_s).request.uncached_tokens


def check_placer(placer: str | object, options: Mapping[str, Any] | None = None) -> None:
    """Shows a placer windows that are skewed or empty, with and without spare slots.

    Args as `check_dispatch_policy`. Raises AssertionError when it answers no placement, another
    one the second time, or changes the placement that it was shown.
    """
    said = _said("placer", placer)
    for case, slots, sources in (
        ("one rank", topology(1, 8), 1),
        ("two ranks", topology(2, 4), 2),
        ("two ranks with spare slots", topology(2, 5), 2),
        ("four ranks on two nodes", topology(4, 3, 2, 2), 2),
        ("four ranks, sources unknown", topology(4, 2), 1),
    ):
        first, second = (_fresh(PLACERS, placer, options) for _ in range(2))
        current = placement(2, slots.slots)
        empty = routing(np.zeros((sources, 2, 8)))
        windows = [routing(sources=sources, layers=2, seed=seed, steps=10) for seed in range(2)]
        for name, window in (("an empty window", empty), *(("a window", w) for w in windows)):
            where = f"{said}, {case}, {name}"
            placed = _placed(first, window, slots, current, where)
            again = _placed(second, window, slots, current, where)
            same = "two of it that saw the same windows answered differently"
            assert np.array_equal(placed, again), f"{where}: {same}"
            current = placed


def _placed(
    placer: Any, window: RoutingCounts, slots: Topology, current: IntArray, where: str
) -> IntArray:
    shown = current.copy()
    try:
        placed = verify.answer(type(placer).__name__, placer, window, slots, shown)
    except PolicyError as error:
        raise AssertionError(f"{where}: {error}") from error
    assert np.array_equal(shown, current), f"{where}: it changed the placement in force"
    problem = verify.problems(placed, slots, len(current), 8)
    assert problem is None, f"{where}: {problem}"
    return placed


def _fresh(registry: Registry[Any], policy: object, options: Mapping[str, Any] | None) -> Any:
    """A policy that has seen nothing yet."""
    return registry.build(policy, options) if isinstance(policy, str) else copy.deepcopy(policy)


def _said(kind: str, policy: object) -> str:
    return f"{kind} {policy if isinstance(policy, str) else type(policy).__name__}"
