"""A server that answers is found healthy, whatever stands in the environment."""

from __future__ import annotations

import http.server
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gimbal.vllm_plugin.serve.address import Address, address_of
from gimbal.vllm_plugin.serve.flags import VllmFlags


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "client"


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        pass  # a client without a certificate

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # asks no name server


class Server6(Server):
    address_family = socket.AF_INET6


class ServerUnix(Server):
    address_family = socket.AF_UNIX


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the proxy of the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def test_plain_http() -> None:
    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        port = server.server_address[1]
        assert Address("127.0.0.1", port).is_healthy()
        assert not Address("127.0.0.1", port, tls=True).is_healthy()
    assert not Address("127.0.0.1", port).is_healthy()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6() -> None:
    try:
        server = Server6(("::1", 0), Handler)
    except OSError:
        pytest.skip("no IPv6")
    with serving(server):
        assert Address("::1", server.server_address[1]).is_healthy()


def context_of(folder: Path) -> ssl.SSLContext:
    """A server's side of TLS: its certificate names another host, and nobody vouches for it."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=elsewhere -keyout"
    subprocess.run([*command.split(), key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(certificate)
    return context


@pytest.mark.parametrize("demand", [ssl.CERT_NONE, ssl.CERT_REQUIRED])
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls(tmp_path: Path, demand: ssl.VerifyMode, newest: ssl.TLSVersion) -> None:
    context = context_of(tmp_path)
    context.verify_mode, context.maximum_version = demand, newest
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    with serving(server):
        port = server.server_address[1]
        # It may want a certificate of ours.
        assert Address("127.0.0.1", port, tls=True).is_healthy()
        assert not Address("127.0.0.1", port).is_healthy()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_reset_after_the_handshake_is_an_answer(tmp_path: Path) -> None:
    """A server that misses our certificate resets us, and its alert may be lost with it."""
    context = context_of(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            bare, _ = listener.accept()
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with context.wrap_socket(bare, server_side=True) as greeted:
                greeted.recv(1)

        refusing = threading.Thread(target=refuse)
        refusing.start()
        assert Address("127.0.0.1", listener.getsockname()[1], tls=True).is_healthy()
        refusing.join()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with serving(ServerUnix(path, Handler)):  # type: ignore[arg-type]
        assert Address("", 0, uds=path).is_healthy()
    assert not Address("", 0, uds=path).is_healthy()


@pytest.mark.parametrize(
    ("flags", "url", "curl"),
    [
        ({}, "http://127.0.0.1:8000", "curl http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 81}, "http://127.0.0.1:81", "curl http://127.0.0.1:81"),
        ({"host": "::"}, "http://[::1]:8000", "curl http://[::1]:8000"),
        ({"host": "fd00::2"}, "http://[fd00::2]:8000", "curl http://[fd00::2]:8000"),
        ({"host": "node7", "tls": True}, "https://node7:8000", "curl -k https://node7:8000"),
        ({"uds": "/tmp/s"}, "http://localhost", "curl --unix-socket /tmp/s http://localhost"),
    ],
)
def test_where_clients_find_it(flags: dict, url: str, curl: str) -> None:
    address = address_of(VllmFlags((), frozenset(), **flags))
    assert address is not None
    assert (address.url, address.curl) == (url, curl)


@pytest.mark.parametrize("flag", ["headless", "grpc"])
def test_nobody_can_ask_it(flag: str) -> None:
    assert address_of(VllmFlags((), frozenset(), **{flag: True})) is None  # type: ignore[arg-type]
