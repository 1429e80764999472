"""Whose account a request is in, among those who count what an engine has taken."""

from __future__ import annotations

from typing import Any

from gimbal.core.snapshot import MAX_FRONT_ENDS, ROUTER


def sender_of(request: Any, by_router: bool) -> int:
    """The API server that sent `request`; with `by_router` the router that it names, if any."""
    sampling = request.sampling_params if by_router else None
    if sampling is not None and sampling.extra_args:
        named = sampling.extra_args.get(ROUTER)
        if type(named) is int and 0 < named < MAX_FRONT_ENDS:
            return named
    return min(int(request.client_index), MAX_FRONT_ENDS - 1)
