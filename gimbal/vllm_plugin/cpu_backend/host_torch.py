"""What EPLB asks of a device, answered by a host that does everything at once.

vLLM's EPLB modules use ``torch.Event``, ``torch.Stream`` and ``torch.accelerator``, none of which
has a CPU backend. On a host every operation is complete when it returns, so an event is a time
stamp and a stream is nothing. Only the EPLB modules are shown this `HostTorch`; torch itself is
left alone.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class HostEvent:
    """A ``torch.Event`` for work that is done when it is called."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._recorded_s: float | None = None

    def record(self, stream: Any = None) -> None:
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Milliseconds from this event to `end_event`; both must have been recorded."""
        if self._recorded_s is None or end_event._recorded_s is None:
            raise RuntimeError("elapsed_time needs two recorded events")
        return (end_event._recorded_s - self._recorded_s) * 1e3


class HostStream:
    """A ``torch.Stream`` on which nothing is ever pending."""

    device = torch.device("cpu")

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def synchronize(self) -> None:
        """Nothing is pending."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing is pending."""

    def wait_event(self, event: Any) -> None:
        """Nothing is pending."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        event = event or HostEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class _HostAccelerator:
    """``torch.accelerator`` with the host as its only device."""

    _stream = HostStream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.accelerator, name)

    def current_stream(self, device: Any = None) -> HostStream:
        return self._stream

    def set_stream(self, stream: Any) -> None:
        """There is only one."""

    def set_device_index(self, device: Any) -> None:
        """There is only one."""

    def current_accelerator(self, check_available: bool = False) -> torch.device:
        return torch.device("cpu")


class HostTorch:
    """The ``torch`` namespace as EPLB should see it on a host without an accelerator."""

    Event = HostEvent
    Stream = HostStream
    accelerator = _HostAccelerator()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
