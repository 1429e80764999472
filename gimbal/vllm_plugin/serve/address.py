"""Where a server of this machine answers, and whether it does."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass

from gimbal.core.web import unchecked_tls
from gimbal.vllm_plugin.serve.flags import VllmFlags

_ANY = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that mean every address of the machine, and the one to ask there."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where clients on this machine reach a server.

    Attributes:
        host: name or address, without brackets.
        uds: path of a Unix socket; host and port mean nothing then.
    """

    host: str
    port: int
    tls: bool = False
    uds: str | None = None

    @property
    def url(self) -> str:
        """Root of the HTTP server."""
        if self.uds is not None:
            return "http://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"

    @property
    def curl(self) -> str:
        """The command that asks it, but for the path."""
        options = f" --unix-socket {self.uds}" if self.uds else " -k" if self.tls else ""
        return f"curl{options} {self.url}"

    def is_healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether ``/health`` answers; never through a proxy, with whatever certificate."""
        connection = self._connection(timeout_s)
        greeted = False
        try:
            if self.uds is not None:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(timeout_s)
                connection.sock.connect(self.uds)
            else:
                connection.connect()
                greeted = self.tls
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except ssl.SSLError as error:
            # It serves, but not us: it wants a certificate of its clients.
            return greeted or "ALERT" in (error.reason or "")
        except ConnectionError:
            # TLS 1.3 ends our handshake before the server has missed the certificate, and its
            # reset may overtake its alert.
            return greeted
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self.tls and self.uds is None:
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=timeout_s, context=unchecked_tls()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)


def address_of(flags: VllmFlags) -> Address | None:
    """Where a server with `flags` answers; None where it does not speak HTTP."""
    if flags.headless or flags.grpc:
        return None
    return Address(_ANY.get(flags.host, flags.host or ""), flags.port, flags.tls, flags.uds)
