"""Rows between hosts, over ZeroMQ: sockets, addresses, and the message that carries a row.

Nothing here knows of vLLM, so that a router's process can use it.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import zmq

from gimbal.core.contracts import FloatArray
from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH, row_problem

LARGEST_MESSAGE = 1 << 16
"""Bytes: rows and control are far smaller, also in a version with more; who sends more is cut
off."""
HEAD = struct.Struct("<4sHH")  # magic, engine, row width
MAGIC = b"GBR1"
_IPV4 = re.compile(r"[\d.]+|\*")


def bracketed(address: str) -> str:
    """``tcp://host:port`` with brackets round an IPv6 host that came without."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://[{host}]:{port}" if ":" in host and not host.startswith("[") else address


def made_socket(kind: int, *addresses: str) -> Any:
    """A socket of `kind` that can be bound or connected to `addresses`, and is neither yet."""
    made: Any = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE)
    hosts = [address.partition("://")[2].rpartition(":")[0] for address in addresses]
    # A host name may have either kind of address. With IPv4 addresses nothing needs IPv6, which
    # this machine may not have.
    made.setsockopt(zmq.IPV6, int(not all(map(_IPV4.fullmatch, hosts))))
    return made


def peer(frame: Any) -> str:
    """Address of the host that `frame` came from."""
    try:
        return str(frame.get("Peer-Address"))
    except (zmq.ZMQError, ValueError, LookupError):
        return "unknown address"


class RefusedRow(ValueError):
    """A message that is no row of this version.

    Attributes:
        engine: whose it claims to be; -1 where it does not say, or names none that can be.
        kind: ``message``, ``version``, ``engine``, ``numbers``, ``control`` or ``signature``.
    """

    def __init__(self, engine: int, kind: str, said: str) -> None:
        super().__init__(said)
        self.engine = engine
        self.kind = kind


def row_head(engine: int) -> bytes:
    """What stands before the row of `engine`, a DP rank."""
    return HEAD.pack(MAGIC, engine, ROW_WIDTH)


def parse_row(message: bytes) -> tuple[int, FloatArray]:
    """The engine and its row [ROW_WIDTH]. Raises RefusedRow."""
    if len(message) < HEAD.size or not message.startswith(MAGIC):
        raise RefusedRow(-1, "message", f"{len(message)} bytes that are no row of an engine")
    _, engine, width = HEAD.unpack_from(message)
    if engine >= MAX_ENGINES:
        raise RefusedRow(-1, "engine", f"engine {engine}: a board holds {MAX_ENGINES} engines")
    return engine, row_in(message[HEAD.size :], width, engine, f"engine {engine}")


def row_in(body: bytes, width: int, engine: int, who: str) -> FloatArray:
    """The row [ROW_WIDTH] in `body`, the part of a message behind its head.

    Args:
        width: how many numbers its sender says that a row has.
        engine: DP rank of the sender.
        who: what the sender is called in messages.

    Raises RefusedRow.
    """
    if width != ROW_WIDTH:
        said = f"{who} sends {width} numbers a row, this host reads {ROW_WIDTH}"
        raise RefusedRow(engine, "version", f"{said}: install one version of Gimbal on all hosts")
    if len(body) != 8 * ROW_WIDTH:
        raise RefusedRow(engine, "message", f"{who}: a row of {len(body)} bytes")
    row = np.frombuffer(body, np.float64).copy()
    problem = row_problem(row)
    if problem is not None:
        raise RefusedRow(engine, "numbers", f"{who}: {problem}")
    return row
