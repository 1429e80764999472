"""The stretch of a run that is measured: arrivals go on before it, through it and after it.

A run that is measured as a whole is a ramp: the first requests find empty engines, the last ones
engines that drain. Latencies are those of the requests that arrive in the window, followed to their
end; rates are those of what ends in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gimbal.records.schema import RequestRecord

FloatArray = npt.NDArray[np.float64]

BINS = 48
"""Points in time between which a backlog's growth is sought."""
MOST_GROWTH = 0.01
"""Share of what arrives that may pile up before a backlog is called unbounded."""
MOST_OF_MEAN = {"requests": 0.5, "waiting_tokens": 0.25}
"""The same, as a share of the mean backlog: what is in a system follows the rate of arrivals, and a
trace's rate is never even; what waits does so only near capacity."""
ERRORS = 2.0
"""Standard errors that growth must be away from none."""
MOST_CORRELATION = 0.95


@dataclass(frozen=True, slots=True)
class Window:
    """Seconds since the run's start, [begin_s, end_s)."""

    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.begin_s

    def to_json(self) -> dict[str, float]:
        """For reports; `window_of` reads it back."""
        return {"begin_s": self.begin_s, "end_s": self.end_s}

    def holds(self, time_s: float | None) -> bool:
        """Whether `time_s` lies in it."""
        return time_s is not None and self.begin_s <= time_s < self.end_s

    def arrived(self, records: Iterable[RequestRecord]) -> list[RequestRecord]:
        """Those whose time to arrive lies in it."""
        return [r for r in records if self.holds(r.arrival_s)]

    def ended(self, records: Iterable[RequestRecord]) -> list[RequestRecord]:
        """Those that ended well in it."""
        return [r for r in records if r.status == "ok" and self.holds(r.last_token_s)]


@dataclass(frozen=True, slots=True)
class Growth:
    """How a backlog grows over a window.

    Attributes:
        share: of what arrives that piles up.
        error: standard error of `share`.
        mean: backlog, in what arrives in the window.
    """

    share: float
    error: float
    mean: float

    def bounded(self, most_of_mean: float) -> bool:
        """Whether it is little, or no more than noise gives."""
        return self.share <= max(MOST_GROWTH, ERRORS * self.error, most_of_mean * self.mean)


@dataclass(frozen=True, slots=True)
class Backlog:
    """Unfinished work over a window.

    Attributes:
        requests: growth of the requests that have arrived and not ended.
        waiting_tokens: growth of the prompt tokens of those without a first token.
        residence_s: seconds from arrival to the last token, P99 over requests that arrived in the
            window; those that never ended count as longer than all others.
    """

    requests: Growth
    waiting_tokens: Growth
    residence_s: float

    @property
    def bounded(self) -> bool:
        """Whether neither grows."""
        return all(getattr(self, name).bounded(most) for name, most in MOST_OF_MEAN.items())

    @property
    def growth(self) -> float:
        """The larger share of the two."""
        return max(self.requests.share, self.waiting_tokens.share)

    @property
    def falls(self) -> bool:
        """Whether what came before the window is still being worked off in it."""
        own = self.requests
        return not Growth(-own.share, own.error, own.mean).bounded(MOST_OF_MEAN["requests"])

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        stays = self.residence_s
        return {
            "bounded": self.bounded,
            "falls": self.falls,
            "growth": self.requests.share if self.falls else self.growth,
            "residence_p99_s": stays if np.isfinite(stays) else None,
        }


def window_of(result: Mapping[str, Any]) -> Window | None:
    """The measured part of the runs behind a report; None: all of them."""
    found = result.get("window")
    return None if found is None else Window(found["begin_s"], found["end_s"])


def backlog_of(runs: Sequence[Sequence[RequestRecord]], window: Window) -> Backlog:
    """What one arm's runs leave unfinished over `window`; growth is the mean over the runs.

    Records of all that arrived are wanted, of requests too that had not ended when the run did.
    """
    requests, tokens, stays = [], [], []
    for run in runs:
        begin = np.array([r.sent_s for r in run])
        first = _times([r.first_token_s for r in run])
        last = _times([r.last_token_s for r in run])
        sizes = np.array([r.prompt_tokens for r in run], dtype=float)
        requests.append(_growth(begin, last, np.ones(len(run)), window))
        tokens.append(_growth(begin, first, sizes, window))
        measured = (begin >= window.begin_s) & (begin < window.end_s)
        stays.append((last - begin)[measured])
    return Backlog(_mean(requests), _mean(tokens), residence_s(np.concatenate(stays or [[]])))


def residence_s(stays_s: FloatArray) -> float:
    """P99 of times from arrival to end, infinite where more than one in a hundred has no end."""
    return float(np.percentile(stays_s, 99, method="lower")) if len(stays_s) else 0.0


def _times(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.inf if v is None else v for v in values], dtype=float)


def _growth(begin: FloatArray, end: FloatArray, weight: FloatArray, window: Window) -> Growth:
    """Slope of the weight between `begin` and `end`, by the weight that arrives per second.

    Least squares over the means of `BINS` stretches. The error takes account of how much each
    stretch is like the one before it (lag-1 correlation of the residuals, Bartlett's variance
    inflation): a queue that wanders is no queue that grows.
    """
    arriving = float(weight[(begin >= window.begin_s) & (begin < window.end_s)].sum())
    if arriving <= 0 or window.seconds <= 0:
        return Growth(0.0, 0.0, 0.0)
    edges = np.linspace(window.begin_s, window.end_s, BINS + 1)
    area = np.array([weight @ (np.maximum(t - begin, 0) - np.maximum(t - end, 0)) for t in edges])
    held = np.diff(area) / (window.seconds / BINS)
    at = np.arange(BINS) - (BINS - 1) / 2
    slope = float(at @ held / (at @ at))
    rest = held - held.mean() - slope * at
    spread = float(rest @ rest)
    alike = float(rest[1:] @ rest[:-1]) / spread if spread > 0 else 0.0
    alike = min(max(alike, 0.0), MOST_CORRELATION)
    error = np.sqrt(spread / (BINS - 2) / (at @ at) * (1 + alike) / (1 - alike))
    # Per stretch; over the window there are BINS of them.
    return Growth(
        slope * BINS / arriving, float(error) * BINS / arriving, float(held.mean()) / arriving
    )


def _mean(parts: Sequence[Growth]) -> Growth:
    count = max(1, len(parts))
    error = float(np.sqrt(sum(p.error**2 for p in parts)))
    share, mean = (sum(getattr(p, name) for p in parts) / count for name in ("share", "mean"))
    return Growth(share, error / count, mean)
