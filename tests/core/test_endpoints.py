"""Addresses, names and secrets of what engines publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from gimbal.core.config import parse_config
from gimbal.core.endpoints import SECRET, Endpoint, parse_endpoints, read_secret
from gimbal.core.errors import InputError


def test_addresses_are_called_or_listened_on() -> None:
    text = "tcp://router:5570, @tcp://*:5571,@tcp://[::1]:0"
    called, listened, free = parse_endpoints(text, "publish_to")
    assert called == Endpoint(False, "router", 5570)
    assert listened.address == "tcp://*:5571"
    assert free.address == "tcp://[::1]:0"
    assert called.for_rank(3) == called
    assert listened.for_rank(3).port == 5574
    assert free.for_rank(3).port == 0
    assert parse_endpoints("", "publish_to") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router:5570", "publish_to: 'router:5570': expected tcp://HOST:PORT to call, @tcp://"),
        ("ipc:///tmp/x", "expected tcp://HOST:PORT"),
        ("tcp://a:1,tcp://b", "'tcp://b': expected"),
        ("tcp://*:5570", "nobody can be called at *; to listen: '@tcp://*:5570'"),
        ("tcp://a:0", "no port 0"),
        ("@tcp://a:65536", "no port 65536"),
        ("tcp://a:1," * 17, "17 addresses, at most 16"),
        ("tcp://a:1\ntcp://b:2", "expected tcp://"),
    ],
)
def test_what_is_no_address_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({"publish_to": text}, "f")
    assert str(caught.value).startswith("f: publish_to: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_without_a_port_is_refused() -> None:
    (endpoint,) = parse_endpoints("@tcp://*:65530", "publish_to")
    with pytest.raises(InputError, match="no port is left for rank 6"):
        endpoint.for_rank(6)


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "é" * 65])
def test_names_are_short_and_printable(name: str) -> None:
    with pytest.raises(InputError, match=r"publish_name: .* at most 128 bytes"):
        parse_config({"publish_name": name})


def test_the_secret_is_the_files_or_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text("  0123456789abcdef\n")
    assert read_secret(str(file), {SECRET: "f" * 16}) == b"0123456789abcdef"
    assert read_secret("", {SECRET: "f" * 16}) == b"f" * 16
    assert read_secret("", {}) is None
    monkeypatch.delenv(SECRET, raising=False)
    published = {"publish_to": "tcp://a:1", "publish_secret_file": str(file)}
    assert parse_config(published).publish_secret_file == str(file)
    for text in ("short secret", "x" * 1025, "x" * 5000):
        file.write_text(text)
        with pytest.raises(InputError, match=r"publish_secret_file: .*secret") as caught:
            parse_config(published)
        assert text not in str(caught.value)
    monkeypatch.setenv(SECRET, "short")
    with pytest.raises(InputError, match=f"{SECRET}: a secret of 5 bytes, expected 16 to 1024"):
        parse_config({"publish_to": "tcp://a:1"})
    assert parse_config({}).publish_to == ""
    file.unlink()
    with pytest.raises(InputError, match="no such file"):
        parse_config(published)
    assert parse_config({"publish_secret_file": str(file)}), "it is read where it is needed"
