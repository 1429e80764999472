"""ZeroMQ between the hosts of one server: sockets, addresses, and what a message may weigh."""

from __future__ import annotations

import re
from typing import Any

import zmq

LARGEST_MESSAGE = 1 << 16
"""Bytes: rows and control are far smaller, also in a version with more; who sends more is cut
off."""
_IPV4 = re.compile(r"[\d.]+|\*")


def bracketed(address: str) -> str:
    """``tcp://host:port`` with brackets round an IPv6 host that came without."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://[{host}]:{port}" if ":" in host and not host.startswith("[") else address


def made_socket(kind: int, address: str) -> Any:
    """A socket of `kind` that can be bound or connected to `address`, and is neither yet."""
    made: Any = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE)
    host = address.partition("://")[2].rpartition(":")[0]
    # A host name may have either kind of address. With an IPv4 address nothing needs IPv6, which
    # this machine may not have.
    made.setsockopt(zmq.IPV6, int(not _IPV4.fullmatch(host)))
    return made


def peer(frame: Any) -> str:
    """Address of the host that `frame` came from."""
    try:
        return str(frame.get("Peer-Address"))
    except (zmq.ZMQError, ValueError, LookupError):
        return "unknown address"
