"""Names of somebody else's policies, and what may be wrong with them."""

import pytest

from gimbal.core.config import parse_config
from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError
from gimbal.core.queue import ORDERINGS

FOREIGN = """
from __future__ import annotations

from dataclasses import dataclass

from gimbal.core.contracts import OrderingTraits
from gimbal.core.options import Positive, option


class Plain:
    def costs(self, request, loads):
        return loads.inflight_tokens


class Timed(Plain):
    term_names = ("queue",)


class Dynamic:
    traits = OrderingTraits(dynamic=True)

    def key(self, request, state):
        return 0.0


@dataclass(frozen=True)
class Options:
    weight: Positive = option(1.0, "a weight")


class Weighted(Plain):
    Options = Options

    def __init__(self, options=Options()):
        self.weight = options.weight


class Raises(Plain):
    def __init__(self):
        raise RuntimeError("no\\nlicence")


class Exits(Plain):
    def __init__(self):
        raise SystemExit(3)


class OddOptions(Plain):
    Options = {"weight": 1.0}


@dataclass(frozen=True)
class Unreadable:
    weight: Nowhere = 1.0


class UnreadableOptions(Plain):
    Options = Unreadable

instance = Plain()
"""


@pytest.fixture(autouse=True)
def foreign(tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    (tmp_path / "foreign_exit.py").write_text("import sys\nsys.exit(7)\n")
    (tmp_path / "foreign_syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_foreign_policy_with_options():
    assert POLICIES.build("foreign:Weighted").weight == 1.0
    assert POLICIES.build("foreign:Weighted", {"weight": 2}).weight == 2.0
    section = {"policy": "foreign:Weighted", "options": {"weight": 3}}
    assert parse_config({"dispatch": section}).dispatch.policy == "foreign:Weighted"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("foreign_absent:X", {}, "cannot be imported: ModuleNotFoundError: No module named"),
        ("foreign_syntax:X", {}, "cannot be imported: SyntaxError"),
        ("foreign_exit:X", {}, "cannot be imported: SystemExit: 7"),
        ("foreign:Absent", {}, "cannot be imported: AttributeError"),
        (":", {}, "cannot be imported: ValueError"),
        ("foreign:Dynamic", {}, "has no method costs"),
        ("foreign:Timed", {}, "has no method priced"),
        ("foreign:Raises", {}, "cannot be made: RuntimeError: no licence"),
        ("foreign:Exits", {}, "cannot be made: SystemExit: 3"),
        ("foreign:instance", {}, "cannot be made: TypeError"),
        ("foreign:Plain", {"weight": 1}, "unknown option 'weight' ('foreign:Plain' has no opt"),
        ("foreign:Weighted", {"wait": 1}, "f: dispatch.options: unknown option 'wait' (did you"),
        ("foreign:Weighted", {"weight": 0}, "f: dispatch.options.weight: input should be greater"),
        ("foreign:OddOptions", {}, "Options is no dataclass: {'weight': 1.0}"),
        ("foreign:UnreadableOptions", {}, "Options cannot be read: "),
    ],
)
def test_what_is_wrong_with_a_policy_is_said_on_one_line(name, options, message):
    with pytest.raises(InputError) as error:
        parse_config({"dispatch": {"policy": name, "options": options}}, "f")
    assert str(error.value).startswith("f: dispatch.")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dynamic_ordering_needs_its_keys():
    with pytest.raises(InputError, match="has no method keys"):
        ORDERINGS.load("foreign:Dynamic")
    assert ORDERINGS.load("hrrn").traits.dynamic
