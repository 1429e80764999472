"""Makes a trace of a scenario: arrivals, lengths, sessions and prefix blocks, from a seed.

A trace is a stretch cut out of endless traffic, so that it holds sessions that began before it. It
is made on a circle: sessions begin anywhere on it, what runs beyond its end comes back at its
beginning as a session of its own, whose first turns lie before the trace. So the rate is even from
the first request to the last, however long sessions are, and no time is spent on a run-up. The
trace is the stretch of the circle that comes nearest to the wished rate.

Prefix blocks: a session's text is one stream of tokens, each prompt a leading part of it, answers
included. A block's id is its place in its stream, system prompts being streams that all share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gimbal.workloads.scenario import Arrivals, Scenario, Turns, draw, draw_whole
from gimbal.workloads.trace import Trace, TraceRequest

Whole = npt.NDArray[np.int64]
Real = npt.NDArray[np.float64]

SPARE_REQUESTS = 5000
"""Beyond twice the trace's, on the circle: sessions of a thousand turns have their share."""
SESSIONS_AT_ONCE = 256
MOST_STRETCHES = 10**6
STREAM_BITS = 24
"""Blocks of one stream: 2**24 ids."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request before its place in the trace is known.

    Attributes:
        session: number of the session.
        offset_s: from the beginning of its session, for a helper of its parent's.
        rewrites: times that its session's text began anew before it.
        base_tokens: leading tokens that the session's other prompts share, where they do not
            grow; 0 where they do.
    """

    session: int
    offset_s: float
    prompt_tokens: int
    output_tokens: int
    rewrites: int = 0
    base_tokens: int = 0


def generate(scenario: Scenario, count: int, rate_rps: float, seed: int) -> Trace:
    """`count` requests of `scenario` at a mean rate of `rate_rps`; the same seed, the same trace.

    More traffic is more sessions at once: the gaps within a session stay.
    """
    rng = np.random.default_rng([seed, 0x7363656E])
    if scenario.turns is None:
        prompts = draw_whole(scenario.prompt_tokens, count, rng)
        outputs = draw_whole(scenario.output_tokens, count, rng)
        turns = [Turn(i, 0.0, int(prompts[i]), int(outputs[i])) for i in range(count)]
        roots = np.arange(count)
    else:
        turns, roots = _sessions(scenario, scenario.turns, 2 * count + SPARE_REQUESTS, rng)
    span_s = len(turns) / rate_rps
    sessions = int(roots[-1]) + 1
    begins = begin_times_s(scenario.arrivals, sessions, span_s, rng)
    at = np.array([begins[roots[t.session]] + t.offset_s for t in turns])
    laps = (at // span_s).astype(np.int64)
    at -= laps * span_s
    chosen = _stretch(at, span_s, count, rate_rps)
    shares = scenario.shared.shares if scenario.shared is not None else (1.0,)
    prefix_of = rng.choice(len(shares), size=sessions, p=np.array(shares) / sum(shares))
    writer = _Blocks(scenario, len(shares))
    requests = []
    for index, begun_again in chosen:
        turn, lap = turns[index], int(laps[index]) - begun_again
        requests.append(
            TraceRequest(
                float(at[index] + begun_again * span_s - at[chosen[0][0]]),
                turn.prompt_tokens,
                turn.output_tokens,
                None if scenario.turns is None else f"s{turn.session}.{lap + 1}",
                None,
                writer.blocks(turn, lap, int(prefix_of[roots[turn.session]])),
            )
        )
    return Trace(scenario.name, tuple(requests), scenario.block_tokens, scenario=scenario)


def _stretch(at: Real, span_s: float, count: int, rate_rps: float) -> list[tuple[int, int]]:
    """`count` requests in order of time, the stretch of the circle whose rate is nearest.

    Args:
        at: [requests] places on the circle, in [0, span_s).

    Returns the index of each, and 1 for those beyond the circle's end.
    """
    order = np.argsort(at, kind="stable")
    twice = np.concatenate((at[order], at[order] + span_s))
    widths = twice[count - 1 : count - 1 + len(at)] - twice[: len(at)]
    begin = int(np.argmin(np.abs(widths - (count - 1) / rate_rps)))
    places = range(begin, begin + count)
    return [(int(order[place % len(at)]), place // len(at)) for place in places]


def begin_times_s(
    arrivals: Arrivals, sessions: int, span_s: float, rng: np.random.Generator
) -> Real:
    """[sessions] ascending times in [0, span_s) with gamma gaps and a rate that swings."""
    shape = 1.0 / arrivals.cv**2
    gaps = rng.gamma(shape, size=sessions)
    ends = np.cumsum(gaps)
    places = (ends - gaps[0] * rng.random()) / max(ends[-1], 1e-300)
    if arrivals.swing_cv > 0:
        stretches = int(min(np.ceil(span_s / arrivals.swing_s), MOST_STRETCHES))
        rates = rng.gamma(1.0 / arrivals.swing_cv**2, size=stretches)
        reached = np.concatenate(([0.0], np.cumsum(np.maximum(rates, 1e-12))))
        places = np.interp(places * reached[-1], reached, np.linspace(0, 1, stretches + 1))
    times: Real = np.minimum(places, np.nextafter(1.0, 0.0)) * span_s
    return times


def _sessions(
    scenario: Scenario, turns: Turns, least: int, rng: np.random.Generator
) -> tuple[list[Turn], Whole]:
    """Sessions with at least `least` requests in all, and [sessions] the root of each."""
    found: list[Turn] = []
    roots: list[int] = []
    root = 0
    while len(found) < least:
        counts = draw_whole(turns.count, SESSIONS_AT_ONCE, rng)
        pool = _draw_steps(scenario, turns, int(counts.sum()), rng)
        prompts = draw_whole(scenario.prompt_tokens, SESSIONS_AT_ONCE, rng)
        ends = np.cumsum(counts)
        for begin, end, prompt in zip(ends - counts, ends, prompts, strict=True):
            at = slice(begin, end)
            own = _Steps(pool.outputs[at], pool.waits_s[at], pool.new[at])
            number = len(roots)
            helped = _helped(scenario, turns, number + 1, own, rng)
            found += _thread(turns, number, int(prompt), own, 0.0) + helped
            roots += [root] * (1 + len({turn.session for turn in helped}))
            root += 1
            if len(found) >= least:
                break
    return found, np.array(roots)


class _Steps(NamedTuple):
    """[turns] each: answers, seconds to the next prompt, tokens that a prompt adds."""

    outputs: Whole
    waits_s: Real
    new: Whole


def _draw_steps(
    scenario: Scenario, turns: Turns, count: int, rng: np.random.Generator, pauses: bool = True
) -> _Steps:
    outputs = draw_whole(scenario.output_tokens, count, rng)
    gaps = draw(turns.gap_s, count, rng)
    if pauses and turns.pause_s is not None:
        longer = draw(turns.pause_s, count, rng)
        gaps = np.where(rng.random(count) < turns.pauses, longer, gaps)
    return _Steps(
        outputs, outputs * turns.s_per_token + gaps, draw_whole(turns.new_tokens, count, rng)
    )


def _helped(
    scenario: Scenario, turns: Turns, number: int, steps: _Steps, rng: np.random.Generator
) -> list[Turn]:
    """The turns of a session's helpers, numbered from `number` on; `steps` waits for them."""
    found: list[Turn] = []
    helpers = scenario.helpers
    if helpers is None:
        return found
    for at in np.flatnonzero(rng.random(len(steps.outputs)) < helpers.share):
        begin = float(steps.waits_s[:at].sum() + steps.outputs[at] * turns.s_per_token)
        count = int(draw_whole(helpers.count, 1, rng)[0])
        lengths = draw_whole(helpers.turns, count, rng)
        prompts = draw_whole(helpers.prompt_tokens, count, rng)
        end = begin
        for length, prompt in zip(lengths, prompts, strict=True):
            own = _draw_steps(scenario, turns, int(length), rng, pauses=False)
            found += _thread(turns, number, int(prompt), own, begin)
            end = max(end, begin + float(own.waits_s.sum()))
            number += 1
        steps.waits_s[at] += end - begin
    return found


def _thread(
    turns: Turns, number: int, first_tokens: int, steps: _Steps, begin_s: float
) -> list[Turn]:
    """The turns of one session: its prompts grow, or share the first one's text."""
    new, base = steps.new, 0
    rewrites = np.zeros(len(new), dtype=np.int64)
    if turns.history:
        new[0] = min(first_tokens, turns.most_tokens)
        prompts = np.cumsum(new)
        prompts[1:] += np.cumsum(steps.outputs[:-1])
        while (over := np.flatnonzero(prompts > turns.most_tokens)).size:
            at = over[0]
            grown = min(int(new[at]), turns.most_tokens - turns.compacted_tokens)
            prompts[at:] -= prompts[at] - turns.compacted_tokens - grown
            rewrites[at:] += 1
    else:
        base = first_tokens
        prompts = base + new
    offsets = begin_s + np.concatenate(([0.0], np.cumsum(steps.waits_s[:-1])))
    rows = zip(
        offsets.tolist(), prompts.tolist(), steps.outputs.tolist(), rewrites.tolist(), strict=True
    )
    return [Turn(number, *row, base) for row in rows]


class _Blocks:
    """Numbers the prefix blocks of a trace."""

    def __init__(self, scenario: Scenario, prefixes: int) -> None:
        self._size = scenario.block_tokens
        shared = scenario.shared
        length = 0 if shared is None or not self._size else shared.tokens // self._size
        self._prefixes = [list(_ids(prefix, 0, length)) for prefix in range(prefixes)]
        self._streams: dict[tuple[int, int, int], tuple[int, list[int]]] = {}

    def blocks(self, turn: Turn, lap: int, prefix: int) -> tuple[int, ...]:
        """Ids of the prompt's leading blocks, the last one perhaps in part.

        Of prompts that do not grow, whole blocks of the text that they share.
        """
        if not self._size:
            return ()
        if turn.base_tokens:
            count = turn.base_tokens // self._size
        else:
            count = -(-turn.prompt_tokens // self._size)
        key = (turn.session, lap, turn.rewrites)
        if key not in self._streams:
            number = len(self._prefixes) + len(self._streams)
            self._streams[key] = number, list(self._prefixes[prefix])
        number, stream = self._streams[key]
        stream += _ids(number, len(stream), count)
        return tuple(stream[:count])


def _ids(stream: int, begin: int, end: int) -> range:
    return range((stream << STREAM_BITS) + begin, (stream << STREAM_BITS) + end)
