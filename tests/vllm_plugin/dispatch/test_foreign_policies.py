"""Somebody else's dispatch policy behind the hook: what it answers may be nonsense."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from gimbal.core.compiled import compile_kernels
from tests.vllm_plugin.dispatch.fakes import Server

FOREIGN = """
import numpy as np


class Second:
    def costs(self, request, loads):
        return np.array([1.0, 0.0])


class Counts:
    answer = np.array([[9, 7], [3, 7]])[:, 0]
    answer.flags.writeable = False

    def costs(self, request, loads):
        return self.answer


class Raises:
    def costs(self, request, loads):
        raise RuntimeError("broken on purpose")


class Nan:
    def costs(self, request, loads):
        return np.array([0.0, np.nan])


class Short:
    def costs(self, request, loads):
        return np.zeros(1)


class Nowhere:
    def costs(self, request, loads):
        return np.full(2, np.inf)


class Below:
    def costs(self, request, loads):
        return np.array([-np.inf, 0.0])


class Table:
    def costs(self, request, loads):
        return np.zeros((2, 2))


class Number:
    def costs(self, request, loads):
        return 1


class Complex:
    def costs(self, request, loads):
        return np.array([1.0, 1.0j])
"""


@pytest.fixture
def server_of(tmp_path: Path, monkeypatch: Any) -> Any:
    """Makes a server that dispatches by a policy of `FOREIGN`."""
    (tmp_path / "foreign_dispatch.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(logging.getLogger("vllm.gimbal"), "propagate", True)
    return lambda name: Server(tmp_path, monkeypatch, policy=f"foreign_dispatch:{name}")


@pytest.mark.parametrize("name", ["Second", "Counts"])
def test_a_foreign_policy_decides(server_of: Any, name: str) -> None:
    compile_kernels()  # what is compiled takes no other type of number
    server = server_of(name)
    assert [server.send(f"r{i}") for i in range(5)] == [1] * 5
    assert server.front_end.status()["policy"] == f"foreign_dispatch:{name}"
    assert server.front_end.guard.counts == {}


def test_a_control_message_may_name_one(server_of: Any) -> None:
    server = server_of("Second")
    server.board.write_control({"policy": "llm-d", "policy_options": {"kv": 3.0}})
    server.send("a")
    server.board.write_control({"policy": "foreign_dispatch:Absent"})
    server.send("b"), server.send("c")
    assert server.front_end.guard.counts == {"account": 1}, "vLLM placed one request"
    assert server.front_end.status()["policy"] == "llm-d"
    server.board.write_control({"policy": "foreign_dispatch:Second"})
    assert [server.send(name) for name in "def"] == [1] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raises", "RuntimeError: broken on purpose"),
        ("Nan", "costs [0.0, nan]: no engine can be chosen by them"),
        ("Short", "costs of shape (1,), expected (2,)"),
        ("Nowhere", "costs [inf, inf]: no engine can be chosen by them"),
        ("Below", "costs [-inf, 0.0]: no engine can be chosen by them"),
        ("Table", "costs of shape (2, 2), expected (2,)"),
        ("Number", "AttributeError"),
        ("Complex", "TypeError"),
    ],
)
def test_a_policy_that_answers_nonsense_loses_no_request(
    server_of: Any, caplog: Any, name: str, message: str
) -> None:
    server = server_of(name)
    with caplog.at_level(logging.WARNING, "vllm.gimbal"):
        first = server.send("r0", 500)
        assert server.send("r1", 10) == 1 - first, "the fewest tokens in flight decide"
        for index in range(2, 25):
            server.send(f"r{index}")
    front_end = server.front_end
    assert front_end.guard.counts == {"error": 20}
    assert front_end.guard.disabled
    assert front_end.status()["switched_itself_off"]
    assert front_end.decisions.total() == len(server.client.reqs_in_flight) == 25
    assert sum(n for (_, policy, _), n in front_end.decisions.items() if policy == "vllm") == 5
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 2, "once when it fell back, once when the level went off"
    for line in lines:
        assert f"dispatch policy 'foreign_dispatch:{name}': {message}" in line
        assert "\n" not in line
