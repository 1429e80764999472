"""Which engine a conversation was on last, bounded in memory."""

from __future__ import annotations

from collections import OrderedDict

from gimbal.core.dispatch.names import kept


class Sessions:
    """The last engine of each session; the least recently used are forgotten above `capacity`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._engine: OrderedDict[str | bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._engine)

    def engine(self, session: str) -> int | None:
        """Engine of the session's last request, None when it is new or forgotten."""
        return self._engine.get(kept(session))

    def note(self, session: str, engine: int) -> None:
        """The session's next turn finds its context on `engine`."""
        name = kept(session)
        self._engine[name] = engine
        self._engine.move_to_end(name)
        if len(self._engine) > self._capacity:
            self._engine.popitem(last=False)

    def forget(self, engine: int) -> None:
        """Drops the sessions of an engine that lost its cache or is gone."""
        for name in [s for s, e in self._engine.items() if e == engine]:
            del self._engine[name]
