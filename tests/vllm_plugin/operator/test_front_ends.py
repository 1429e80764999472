"""API servers of one server tell each other what they alone know."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from gimbal.board.clock import now_us
from gimbal.board.file import Board, board_path, sweep
from gimbal.vllm_plugin.operator.front_ends import MOST_BYTES, STALE_US, Shared


def test_each_hears_the_others_and_not_itself(tmp_path: Path) -> None:
    board = tmp_path / "gimbal-1-x.board"
    first, second, third = (Shared(board, index) for index in range(3))
    first.publish({"said": 1})
    second.publish({"said": 2})
    second.publish({"said": 3})
    assert [heard["said"] for heard in first.others()] == [3]
    assert sorted(heard["said"] for heard in third.others()) == [1, 3]
    second.close()
    assert first.others() == []
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_what_is_not_from_them_is_passed_over(tmp_path: Path) -> None:
    board = tmp_path / "gimbal-1-x.board"
    mine = Shared(board, 0)

    def other(index: object, text: str) -> Path:
        path = tmp_path / f"{board.name}.front-{index}"
        path.write_text(text)
        return path

    other(1, json.dumps({"time_us": now_us() - 2 * STALE_US}))
    other(2, "{")
    other(3, json.dumps([now_us()]))
    other(4, json.dumps({"time_us": "soon"}))
    other(5, json.dumps({"time_us": now_us(), "x": "y" * MOST_BYTES}))
    good = other(6, json.dumps({"time_us": now_us()}))
    (tmp_path / f"{board.name}.front-7").symlink_to(good)
    os.mkfifo(tmp_path / f"{board.name}.front-8")
    (tmp_path / f"{board.name}.front-9").mkdir()
    other(99, json.dumps({"time_us": now_us()}))
    other("1.draft", json.dumps({"time_us": now_us()}))
    assert len(mine.others()) == 1


def test_a_draft_left_behind_does_not_end_it(tmp_path: Path) -> None:
    mine, other = Shared(tmp_path / "b.board", 0), Shared(tmp_path / "b.board", 1)
    (tmp_path / "b.board.front-0.draft").write_text("half")
    mine.publish({"said": 1})
    assert [heard["said"] for heard in other.others()] == [1]


def test_they_go_with_the_board(tmp_path: Path) -> None:
    board = Board(board_path("x", tmp_path))
    Shared(board.path, 0).publish({})
    board.close()
    assert list(tmp_path.iterdir()) == []

    Shared(board_path("gone", tmp_path), 3).publish({})
    kept = Board(board_path("here", tmp_path))
    Shared(kept.path, 1).publish({})
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        kept.path.name,
        f"{kept.path.name}.front-1",
    }
    kept.close()
