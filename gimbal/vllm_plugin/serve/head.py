"""Whether a headless node still has its head, told by its TCP connections there.

An engine without work asks its head nothing: vLLM's then waits for ever for one that was killed.
The kernel closes the connections of a process that ends, whatever ended it. Where a link is down or
a host has lost its power they stay, and so does the node.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import time
from collections.abc import Callable, Sequence

from gimbal.vllm_plugin.serve.processes import tcp_connections

LOOK_S = 2.0
GONE_S = 10.0
"""Without a connection for so long, after there was one: a start makes and ends some."""


class Head:
    """The head at `address`, a name or an IP address.

    Args:
        clock: seconds.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self._clock = clock
        self._next_s = 0.0
        self._last_s = math.inf
        self._known: set[str] = set()

    def is_gone(self, pids: Sequence[int]) -> bool:
        """True once `pids`, which were connected to it, have been without for `GONE_S`.

        Looks every `LOOK_S`; False where connections cannot be seen.
        """
        now_s = self._clock()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + LOOK_S
        if not self._known:
            self._known = _addresses(self.address)
        peers = _peers(pids)
        if peers is None or self._known & peers:
            self._last_s = now_s
        return now_s - self._last_s > GONE_S


def _addresses(name: str) -> set[str]:
    with contextlib.suppress(OSError):
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    return set()


def _peers(pids: Sequence[int]) -> set[str] | None:
    """IP addresses that `pids` have TCP connections with; None where that cannot be seen."""
    import psutil

    found = tcp_connections(pids)
    if found is None:
        return None
    return {_plain(c.raddr.ip) for c in found if c.status == psutil.CONN_ESTABLISHED and c.raddr}


def _plain(address: str) -> str:
    """IPv4 where it comes as IPv6 (``::ffff:10.0.0.7``)."""
    with contextlib.suppress(ValueError):
        mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
        return str(mapped or address)
    return address
