"""HTTP as every client of ours speaks it: proxies and certificates by one rule.

An address of this machine is asked directly and its certificate is not checked: nothing leaves
the machine, and a certificate rarely names it. Anything else goes through the environment's
proxies (``http_proxy``, ``https_proxy``, but for ``no_proxy``), and its certificate must hold
(``SSL_CERT_FILE`` names further authorities).
"""

from __future__ import annotations

import ipaddress
import ssl
import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse
from types import MappingProxyType
from typing import cast
from urllib.parse import urlsplit


def is_local(host: str) -> bool:
    """Whether `host` is this machine by its very name: localhost, 127.0.0.0/8, ::1, 0.0.0.0."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxy_for(url: str) -> str | None:
    """The proxy that a request to `url` goes through, None for a direct one."""
    parts = urlsplit(url)
    if is_local(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def tls_for(url: str) -> ssl.SSLContext | None:
    """How a server at `url` proves who it is; None for plain HTTP."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        return None
    return unchecked_tls() if is_local(parts.hostname or "") else ssl.create_default_context()


def unchecked_tls() -> ssl.SSLContext:
    """TLS with whoever answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def open_url(
    url: str,
    timeout_s: float,
    data: bytes | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> HTTPResponse:
    """Asks `url`, with POST where there is `data`.

    Raises what `urllib.request.urlopen` raises.
    """
    request = urllib.request.Request(url, data, dict(headers))
    proxy = proxy_for(url)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {}),
        urllib.request.HTTPSHandler(context=tls_for(url)),
    )
    return cast(HTTPResponse, opener.open(request, timeout=timeout_s))
