"""The arithmetic of the table, and which faults are chosen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.live.chaos.__main__ import chosen
from tests.live.chaos.faults import faults
from tests.live.chaos.table import EXACT, Row, as_json, render, row_of

HERE = {"a 0": EXACT, "a 1": "HTTP 500: no", "a 2": "7 tokens of 8, stop", "a 3": EXACT}


def test_without_a_second_pass_every_failure_is_gimbals() -> None:
    row = row_of("f", HERE)
    assert (row.sent, row.exact, row.failed_alone, row.failed_by_gimbal) == (4, 2, None, 2)
    assert row.trouble == "7 tokens of 8, stop; HTTP 500: no"
    assert not row.ok


def test_what_vllm_alone_loses_too_is_not_gimbals() -> None:
    alone = {"a 0": "HTTP 500", "a 1": "HTTP 500", "a 2": EXACT, "a 3": EXACT}
    row = row_of("f", HERE, alone)
    assert (row.sent, row.exact, row.failed_alone, row.failed_by_gimbal) == (4, 2, 2, 1)
    assert row.trouble == "7 tokens of 8, stop"
    both = row_of("f", {"a 0": "gone"}, {"a 0": "gone too"})
    assert (both.failed_alone, both.failed_by_gimbal, both.ok) == (1, 0, True)


def test_a_request_that_only_one_pass_sent_is_no_excuse() -> None:
    assert row_of("f", {"a 0": "gone"}, {}).failed_by_gimbal == 1
    assert row_of("f", {}, {"a 0": "gone"}).failed_by_gimbal == 0


def test_trouble_fails_a_row_without_a_failed_request() -> None:
    row = row_of("f", {"a 0": EXACT}, None, "seen", ["accounts not at zero"])
    assert (row.failed_by_gimbal, row.ok) == (0, False)


def test_what_is_shown_and_written() -> None:
    good, bad = Row("g", 3, 3, None, 0, "fine"), Row("b", 3, 1, 1, 1, "", "bad")
    out = io.StringIO()
    Console(file=out, width=120).print(render([good, bad]))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["│", "g", "│", "3", "│", "3", "│", "-", "│", "0", "│", "fine", "│"] in lines
    assert any("FAILED:" in line for line in lines)
    written = as_json([good, bad])
    assert (written["ok"], written["failed_by_gimbal"]) == (False, 1)
    assert [fault["ok"] for fault in written["faults"]] == [True, False]
    assert as_json([good])["ok"]


@pytest.mark.parametrize(
    ("quick", "words", "names"),
    [
        (False, ["killed"], ["engine killed", "worker killed", "API server killed"]),
        (True, ["killed"], []),
        (True, ["board deleted", "flood"], ["control flood", "status flood", "board deleted"]),
    ],
)
def test_faults_are_chosen_by_name(quick: bool, words: list[str], names: list[str]) -> None:
    assert [fault.name for fault in chosen(faults("x"), quick, words)] == names


def test_names_are_unique_and_quick_ones_share_a_server() -> None:
    every = faults("x")
    assert len({fault.name for fault in every}) == len(every)
    assert all(fault.shares_a_server for fault in chosen(every, True, []))
    assert {fault.name for fault in every if fault.ends} == {
        "engine killed",
        "worker killed",
        "API server killed",
    }
