"""Where engines publish their rows to, under which name, and the secret that signs them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gimbal.core.errors import InputError, one_line
from gimbal.core.files import read_text

SECRET = "GIMBAL_PUBLISH_SECRET"
"""Environment variable with the secret, where no file is named."""
LEAST_SECRET_BYTES, MOST_SECRET_BYTES = 16, 1024
MOST_NAME_BYTES = 128
MOST_ENDPOINTS = 16

_ENDPOINT = re.compile(r"(@?)tcp://([^\s/@,]+):(\d{1,5})")
_LARGEST_PORT = 65535


class Endpoint(NamedTuple):
    """One side of a ZeroMQ connection over TCP.

    Attributes:
        bound: whoever names it listens there; else it calls there.
        host: name or address, without brackets.
        port: 0 only where it is bound: any that is free.
    """

    bound: bool
    host: str
    port: int

    @property
    def address(self) -> str:
        """As ZeroMQ takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    def for_rank(self, rank: int) -> Endpoint:
        """That of DP rank `rank`: engines that listen on one host need a port each.

        Raises InputError where there is no such port.
        """
        if not self.bound or self.port == 0:
            return self
        if self.port + rank > _LARGEST_PORT:
            raise InputError(f"@{self.address}: no port is left for rank {rank}")
        return self._replace(port=self.port + rank)


def parse_endpoints(text: str, where: str) -> tuple[Endpoint, ...]:
    """The endpoints in `text`, separated by commas: ``tcp://HOST:PORT`` is called,
    ``@tcp://HOST:PORT`` is listened on, on every interface where HOST is ``*``.

    Raises InputError that begins with `where`.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > MOST_ENDPOINTS:
        raise InputError(f"{where}: {len(parts)} addresses, at most {MOST_ENDPOINTS}")
    return tuple(_parse_endpoint(part, where) for part in parts)


def parse_called(address: str, where: str) -> Endpoint:
    """The one endpoint in `address`, to be called. Raises InputError that begins with `where`."""
    endpoints = parse_endpoints(address, where)
    if len(endpoints) != 1 or endpoints[0].bound:
        raise InputError(f"{where}: {one_line(address)!r}: expected one tcp://HOST:PORT to call")
    return endpoints[0]


def _parse_endpoint(text: str, where: str) -> Endpoint:
    found = _ENDPOINT.fullmatch(text)
    if found is None:
        expected = "tcp://HOST:PORT to call, @tcp://HOST:PORT to listen"
        raise InputError(f"{where}: {one_line(text)!r}: expected {expected}")
    bound, host, port = bool(found[1]), found[2].strip("[]"), int(found[3])
    if host == "*" and not bound:
        raise InputError(f"{where}: {text!r}: nobody can be called at *; to listen: '@{text}'")
    if not (0 if bound else 1) <= port <= _LARGEST_PORT:
        raise InputError(f"{where}: {text!r}: no port {port}")
    return Endpoint(bound, host, port)


def check_name(name: str, where: str) -> str:
    """`name` of a server as its rows carry it; raises InputError that begins with `where`."""
    if not name.isprintable() or len(name.encode("utf-8", "replace")) > MOST_NAME_BYTES:
        limit = f"printable text of at most {MOST_NAME_BYTES} bytes"
        raise InputError(f"{where}: {one_line(name)!r}: expected {limit}")
    return name


def read_secret(file: str, environment: Mapping[str, str] = os.environ) -> bytes | None:
    """The secret in `file`, without white space around it; without a file that of the
    environment (`SECRET`), and None without either.

    Raises InputError, which never shows it.
    """
    name = file or SECRET
    text = read_text(Path(file), most_bytes=4 * MOST_SECRET_BYTES) if file else None
    if text is None:
        text = environment.get(SECRET)
    if text is None:
        return None
    secret = text.strip().encode("utf-8", "surrogateescape")
    if not LEAST_SECRET_BYTES <= len(secret) <= MOST_SECRET_BYTES:
        limits = f"{LEAST_SECRET_BYTES} to {MOST_SECRET_BYTES}"
        raise InputError(f"{name}: a secret of {len(secret)} bytes, expected {limits}")
    return secret
