"""What the control side of a server under test makes of its answers."""

from __future__ import annotations

from typing import Any

import pytest

from gimbal.bench.endpoint import Endpoint
from gimbal.core.errors import InputError


@pytest.mark.parametrize("answer", [b'{"levels": []}', b'{"not_followed": []}', b"[]", b"[" * 9000])
def test_a_server_that_all_engines_follow_is_switched(monkeypatch: Any, answer: bytes) -> None:
    monkeypatch.setattr(Endpoint, "_call", lambda *_: answer)
    Endpoint("http://server").switch({"levels": []})


def test_an_engine_of_another_host_that_did_not_follow_ends_the_run(monkeypatch: Any) -> None:
    """Its queue would go on as the arm before had it."""
    answer = b'{"levels": [], "followed": [0], "not_followed": [1, "2\\n"]}'
    monkeypatch.setattr(Endpoint, "_call", lambda *_: answer)
    with pytest.raises(InputError, match="engines that did not follow: 1, 2") as error:
        Endpoint("http://server").switch({"levels": []})
    assert "\n" not in str(error.value)
