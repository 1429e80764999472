"""Control messages: changed in one step over all processes, and never a reason to hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.board import file
from gimbal.board.control import decoded_control, encoded_control, write_control
from gimbal.board.file import Board
from gimbal.board.layout import CONTROL_AT, CONTROL_BYTES


def test_control_messages_replace_each_other(path: Path) -> None:
    board, other = Board(path), Board(path)
    assert other.control_version() == 0
    assert other.read_control() == {}
    for number in range(1, 6):
        version = board.write_control({"policy": "x" * number})
        assert other.control_version() == version == number
        assert other.read_control() == {"policy": "x" * number}
    with pytest.raises(ValueError, match="at most 4096"):
        board.write_control({"policy": "x" * 5000})
    assert other.read_control() == {"policy": "xxxxx"}


COUNT = """
import sys; from pathlib import Path; from gimbal.board.file import Board
board, name = Board(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True); sys.stdin.readline()
for _ in range(50):
    while True:
        try:
            board.update_control(lambda before: {**before, name: before.get(name, 0) + 1})
            break
        except TimeoutError:  # a loaded machine: the caller may try again
            pass
"""


def test_changes_of_several_processes_lose_none(path: Path, start: Any) -> None:
    board = Board(path)
    processes = [start(COUNT, path, name) for name in ("a", "b", "a")]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert board.read_control() == {"a": 100, "b": 50}
    assert board.control_version() == 150


def test_a_change_returns_what_is_in_force(path: Path) -> None:
    board, other = Board(path), Board(path)
    assert board.update_control(lambda before: {**before, "levels": []}) == (1, {"levels": []})
    changed = other.update_control(lambda before: {**before, "policy": "dynamo"})
    assert changed == (2, {"levels": [], "policy": "dynamo"})
    assert board.read_control() == changed[1]


def test_a_change_that_fails_changes_nothing(path: Path) -> None:
    board = Board(path)
    board.write_control({"levels": []})

    def refuse(before: dict[str, Any]) -> dict[str, Any]:
        before["levels"] = ["queue"]
        raise KeyError("policy")

    with pytest.raises(KeyError):
        board.update_control(refuse)
    with pytest.raises(ValueError, match="JSON compliant"):
        board.update_control(lambda before: {"weight": float("inf")})
    assert (board.control_version(), board.read_control()) == (1, {"levels": []})
    assert board.write_control({}) == 2, "the lock was not given back"


FREEZE = """
import sys; from pathlib import Path; from gimbal.board.file import Board
with Board(Path(sys.argv[1])).storage.changing():
    print("locked", flush=True); sys.stdin.readline()
"""


def test_a_frozen_change_holds_nobody_for_long(path: Path, start: Any) -> None:
    board = Board(path)
    board.write_control({"levels": []})
    process = start(FREEZE, path)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="keeps the board locked"):
        board.write_control({"levels": ["queue"]})
    assert time.monotonic() - started < 30, "it waits without end"
    assert board.read_control() == {"levels": []}
    process.kill()
    process.wait()
    assert board.write_control({"levels": ["queue"]}) == 2


def test_a_change_of_a_replaced_board_reaches_the_new_one(path: Path) -> None:
    board, other = Board(path), Board(path)
    board.write_control({"levels": []})
    path.unlink()
    assert other.check()
    other.update_control(lambda before: {**before, "policy": "dynamo"})
    board.update_control(lambda before: {**before, "queue": {}})
    message = {"policy": "dynamo", "queue": {}}
    assert Board(path).read_control() == other.read_control() == board.read_control() == message


def test_the_last_message_goes_with_a_board_that_is_made_anew(path: Path) -> None:
    """Also when another one made it, who had never read the message."""
    front = Board(path)
    front.write_control({"levels": []})
    path.unlink()
    other = Board(path)
    assert other.read_control() == {}
    assert front.check()
    assert other.read_control() == front.read_control() == {"levels": []}


def test_a_message_that_could_not_be_put_back_is_kept_and_put_back_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may hold the board locked just then, or there may be no room."""
    front = Board(path)
    front.write_control({"levels": []})
    path.unlink()

    def refused(*_: object) -> None:
        raise TimeoutError("another process keeps the board locked")

    with monkeypatch.context() as patch:
        patch.setattr(file, "write_control", refused)
        front.look()
        assert front.problem is not None
        assert front.read_control() == {"levels": []}
    front.look()
    assert Board(path).read_control() == front.read_control() == {"levels": []}


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[1]",
        b'"levels"',
        b"NaN",
        b'{"weight": Infinity}',
        b"[" * CONTROL_BYTES,
        b'{"a":' * 800,
        b"\xff\xfe",
        b"null",
    ],
)
def test_a_text_that_is_no_message_is_empty(path: Path, text: bytes) -> None:
    board = Board(path)
    write_control(board.storage, 1, text)
    assert board.control_version() == 1
    assert board.read_control() == {}
    assert board.update_control(lambda before: {**before, "levels": []}) == (2, {"levels": []})


def test_a_damaged_text_is_empty(path: Path) -> None:
    writer, board = Board(path), Board(path)
    for number in range(2):
        writer.write_control({"policy": f"policy-{number}"})
    os.pwrite(writer.storage.fd, b"\0" * 200, 8 * CONTROL_AT)
    assert board.read_control() == {}
    os.pwrite(writer.storage.fd, b"\xff" * 8, 8 * CONTROL_AT)  # an absurd length
    assert Board(path).read_control() == {}


@given(st.binary(max_size=200))
def test_any_text_decodes_to_a_message(text: bytes) -> None:
    assert isinstance(decoded_control(text), dict)


def test_what_is_encoded_decodes() -> None:
    values = {"levels": ["queue"], "policy_options": {"weight": 1e300}, "half": "\ud83d"}
    assert decoded_control(encoded_control(values)) == values
