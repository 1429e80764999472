"""What this engine's requests send to other engines, measured every few steps in its worker.

vLLM's load window holds, per physical slot, the pairs that this rank routed: those in slots of
other engines' ranks have left. One sum on the device per period, read one period later, so that
no step waits for it. vLLM fills the window only in the steps before a rearrangement
(``window_size`` of every ``step_interval``); in between the last value stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gimbal.core.feedback import damping
from gimbal.core.feedback.pressure import PERIOD_STEPS
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.placement.rows import Sources


class SendMeter:
    """Damped microseconds per step that one model's sends take.

    Dispatch compares engines by it. The loop gain is below 1, as a pair on the wire is part of the
    price of a token, which is what dispatch answers it with (docs/feedback-loop.md): the filter is
    derived for 1.

    Args:
        us_per_pair: of one pair over one rank's bandwidth.
        source: this engine; `sources` of them share the slots evenly.
        ranks_per_source: ranks of one engine.
    """

    def __init__(
        self, us_per_pair: float, source: int, sources: int, ranks_per_source: int
    ) -> None:
        self._us_per_pair = us_per_pair
        self._source, self._sources, self._ranks = source, sources, ranks_per_source
        self._slots: list[int] = []
        self._sum: tuple[Any, Any, int] | None = None  # host tensor, its event, steps it covers
        # A decision shows after the step being planned; its sum is read one period later.
        delay = damping.delay_updates(2.0 + PERIOD_STEPS, 1.0, PERIOD_STEPS)
        self._signal = damping.DampedSignal(1, damping.gain(1.0, delay))
        self._steps = 0

    @property
    def value_us(self) -> float:
        """The last pressure, 0 before the first."""
        return float(self._signal.value[0])

    def step(self, window: Any, slot: int | None, sources: Sources | None) -> bool:
        """One engine step; returns whether `value_us` is new.

        Args:
            window: [slots of the window, layers, physical slots] vLLM's load window.
            slot: where the last step was recorded, None if it was not.
            sources: how rows of this group are to be read; None before the first gather.
        """
        self._steps += 1
        if slot is not None:
            self._slots.append(slot)
        if self._steps < PERIOD_STEPS:
            return False
        news = self._read(sources)
        if self._slots:
            self._sum = (*_leaving(window, self._slots, self._own(window)), len(self._slots))
        self._steps, self._slots = 0, []
        return news

    def moved(self) -> None:
        """Experts have moved: what the window holds of earlier steps is no longer by slot."""
        self._slots, self._sum = [], None

    def _own(self, window: Any) -> slice:
        per_source = window.shape[2] // self._sources
        return slice(self._source * per_source, (self._source + 1) * per_source)

    def _read(self, sources: Sources | None) -> bool:
        if self._sum is None or sources is None or sources is Sources.UNKNOWN:
            return False
        pairs, event, steps = self._sum
        if event is not None and not event.query():
            return False
        self._sum = None
        # A rank that counts its engine's tokens carries its share of the bytes; one that counts
        # its own carries them all.
        share = self._ranks if sources is Sources.PER_ENGINE else 1
        measured = self._us_per_pair * float(pairs) / steps / share
        self._signal.update(np.array([measured]))
        return True


def measure(views: Iterable[Any], slot: int | None, guard: LevelGuard) -> float | None:
    """One engine step of all models; their new pressure, microseconds, or None without news.

    A model whose load cannot be measured stops pressing.
    """
    total_us, news = 0.0, False
    for view in views:
        if view.meter is None:
            continue
        try:
            known = None if view.counts is None else view.counts.sources
            news |= view.meter.step(view.state.expert_load_window, slot, known)
            total_us += view.meter.value_us
        except Exception as error:
            view.meter, news = None, True
            guard.fell_back("pressure not measured", error)
    return total_us if news else None


def _leaving(window: Any, slots: list[int], own: slice) -> tuple[Any, Any]:
    """(pairs in slots outside `own`, an event that says when they can be read or None)."""
    import torch

    index = torch.tensor(slots, device=window.device)
    rows = window.index_select(0, index)
    pairs = rows.sum() - rows[..., own].sum()
    if not window.is_cuda:
        return pairs, None
    host = torch.empty((), dtype=pairs.dtype, pin_memory=True)
    host.copy_(pairs, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
