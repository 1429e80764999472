"""The signal board: rows arrive whole, and neither a deleted nor a dead server's file misleads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gimbal.board.file import Board, board_path, sweep
from gimbal.board.layout import RECORD_WORDS, RECORDS, RECORDS_AT
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.core.snapshot import MAX_ENGINES, ROW_WIDTH


def row(value: float) -> np.ndarray:
    return np.full(ROW_WIDTH, float(value))


def flip(board: Board, record: int, word: int) -> None:
    """Changes one word of slot 0's record `record`."""
    place = RECORDS_AT + record * RECORD_WORDS + word
    before = int.from_bytes(board.storage.read(place, 1), "little")
    board.storage.write(place, (before ^ 1).to_bytes(8, "little"))


def test_a_reader_sees_the_newest_row_of_each_engine(folder: Path) -> None:
    board = Board(board_path("server", folder))
    reader = BoardReader(board, 3)
    assert not reader.read().any()
    writers = [SlotWriter(board, slot) for slot in range(3)]
    for number in range(1, 2 * RECORDS + 2):
        for writer in writers:
            writer.publish(row(100 * writer.slot + number))
        assert reader.read()[:, 7].tolist() == [number, 100 + number, 200 + number]
        assert reader.read()[:, 7].tolist() == [number, 100 + number, 200 + number]
    shown = reader.read()
    before = shown.copy()
    assert reader.read() is shown  # no news
    writers[0].publish(row(before[0, 7] + 1))
    assert np.array_equal(shown, before)  # whoever holds it keeps one moment
    shown[:] = -1  # nobody may, and it lasts until the next news at most
    assert reader.read()[:, 7].tolist() == [before[0, 7] + 1, *before[1:, 7]]
    assert reader.torn == 0


def test_two_servers_have_two_boards(folder: Path) -> None:
    assert board_path("1-1", folder) != board_path("1-2", folder)
    assert board_path("1-1", folder) == board_path("1-1", folder)


@pytest.mark.parametrize("word", [0, 1, 5, ROW_WIDTH, ROW_WIDTH + 1])
def test_a_changed_word_is_noticed_and_the_last_good_row_stays(folder: Path, word: int) -> None:
    board = Board(board_path("server", folder))
    writer, reader = SlotWriter(board, 0), BoardReader(board, 1)
    writer.publish(row(1.0))
    assert (reader.read() == 1.0).all()
    writer.publish(row(2.0))
    flip(board, writer.number % RECORDS, word)
    assert (reader.read() == 1.0).all()
    assert reader.torn > 0
    flip(board, writer.number % RECORDS, word)
    assert (reader.read() == 2.0).all()


def test_a_torn_record_costs_no_row_but_its_own(folder: Path) -> None:
    board = Board(board_path("server", folder))
    writers, reader = [SlotWriter(board, slot) for slot in (0, 1, 3)], BoardReader(board, 4)
    for value in (1.0, 2.0):
        for writer in writers:
            writer.publish(row(value))
        if value == 1.0:
            assert reader.read()[:, 0].tolist() == [1.0, 1.0, 0.0, 1.0]
    record = RECORDS + writers[1].number % RECORDS
    flip(board, record, 5)
    assert reader.read()[:, 0].tolist() == [2.0, 1.0, 0.0, 2.0]
    torn = reader.torn
    writers[0].publish(row(3.0))
    assert reader.read()[:, 0].tolist() == [3.0, 1.0, 0.0, 2.0]
    assert reader.torn > torn > 0
    flip(board, record, 5)
    assert reader.read()[:, 0].tolist() == [3.0, 2.0, 0.0, 2.0]


def test_words_that_change_alike_do_not_cancel(folder: Path) -> None:
    """Two counters that both went from 3 to 4: an exclusive or would miss the torn copy."""
    board = Board(board_path("server", folder))
    writer, reader = SlotWriter(board, 0), BoardReader(board, 1)
    old, new = row(0.0), row(0.0)
    old[[3, 5]], new[[3, 5]] = 3.0, 4.0
    writer.publish(old)
    reader.read()
    writer.publish(new)
    for column in (3, 5):
        place = RECORDS_AT + writer.number % RECORDS * RECORD_WORDS + 1 + column
        board.storage.write(place, old[column].tobytes())
    assert reader.read()[0, 3] == 3.0
    assert reader.torn > 0


WRITER = """
import sys; from pathlib import Path; import numpy as np
from gimbal.board.file import Board; from gimbal.board.slots import SlotWriter
writer, values, number = SlotWriter(Board(Path(sys.argv[1])), 0), np.empty(int(sys.argv[2])), 0
while True:
    number += 1
    values[:] = number
    values[1] = 2 * number
    writer.publish(values)
"""


@pytest.mark.timeout(120)
def test_rows_are_never_torn_between_two_processes(folder: Path) -> None:
    path = board_path("server", folder)
    board = Board(path)
    reader = BoardReader(board, 1)
    command = [sys.executable, "-c", WRITER, str(path), str(ROW_WIDTH)]
    process = subprocess.Popen(command)
    changes, last = 0, 0.0
    try:
        while changes < 1000:
            assert process.poll() is None
            values = reader.read()[0]
            number = values[0]
            assert number >= last, "a reader went back in time"
            assert values[1] == 2 * number
            assert (values[2:] == number).all()
            changes, last = changes + (number != last), number
    finally:
        process.kill()
        process.wait()


def test_many_processes_make_one_board(folder: Path) -> None:
    path = board_path("server", folder)
    code = (
        "import sys; from pathlib import Path; from gimbal.board.file import Board;"
        "b = Board(Path(sys.argv[1])); print(b.storage.inode[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    inodes = {process.stdout.readline().strip() for process in started}
    for process in started:
        process.communicate("")
    assert len(inodes) == 1


def test_the_creator_removes_the_file_and_others_do_not(folder: Path) -> None:
    path = board_path("server", folder)
    board, other = Board(path), Board(path)
    code = "import sys; from pathlib import Path; from gimbal.board.file import Board;"
    subprocess.run([sys.executable, "-c", f"{code} Board(Path({str(path)!r})).close()"], check=True)
    assert path.exists()
    board.close()
    assert not path.exists()
    other.close()


def test_a_common_board_is_removed_by_whoever_leaves_last(folder: Path) -> None:
    path = board_path("group", folder)
    maker, other = Board(path, common=True), Board(path, common=True)
    maker.close()
    assert path.exists()
    path.unlink()
    assert other.check(), "made anew"
    third = Board(path, common=True)
    other.close()
    assert path.exists()
    third.close()
    assert not path.exists()


def test_a_dead_servers_board_is_replaced_and_swept(folder: Path) -> None:
    code = (
        "import os, sys, numpy; from pathlib import Path;"
        "from gimbal.board.file import Board;"
        "from gimbal.board.slots import SlotWriter;"
        "SlotWriter(Board(Path(sys.argv[1])), 0).publish(numpy.full(%d, 9.0)); os._exit(0)"
    )
    paths = [board_path(name, folder) for name in ("again", "never")]
    for path in paths:
        subprocess.run([sys.executable, "-c", code % ROW_WIDTH, str(path)], check=True)
        assert path.exists()
    board = Board(paths[0])
    assert not BoardReader(board, 1).read().any(), "a dead engine's row was taken for a live one"
    assert sweep(folder) == [paths[1]]
    assert paths[0].exists()


def test_a_deleted_file_costs_no_row(folder: Path) -> None:
    path = board_path("server", folder)
    engine, front = Board(path), Board(path)
    engine.write_control({"policy": "round-robin"})
    writer, reader = SlotWriter(engine, 0), BoardReader(front, 1)
    writer.publish(row(1.0), now_s=0.0)
    path.unlink()
    writer.publish(row(2.0), now_s=0.5)  # between two looks at the file
    assert (reader.read(now_s=0.1) == 2.0).all()
    assert front.recoveries == 1
    writer.publish(row(3.0), now_s=0.9)  # still the old file
    assert (reader.read(now_s=0.2) == 3.0).all()
    path.unlink()
    assert (reader.read(now_s=10.0) == 3.0).all(), "the new file is empty, the old row still holds"
    writer.publish(row(4.0), now_s=20.0)  # noticed
    assert (reader.read(now_s=10.1) == 4.0).all()
    assert front.previous is None
    assert front.read_control() == engine.read_control() == {"policy": "round-robin"}


def test_slots_are_bounded(folder: Path) -> None:
    board = Board(board_path("server", folder))
    with pytest.raises(ValueError, match="holds 256"):
        SlotWriter(board, MAX_ENGINES)
    with pytest.raises(ValueError, match="holds 256"):
        BoardReader(board, 2, first=MAX_ENGINES - 1)
    reader = BoardReader(board, 2)
    SlotWriter(board, 3).publish(row(5.0))
    reader.resize(4)
    assert reader.read()[3, 0] == 5.0


def test_a_foreign_file_is_refused(folder: Path) -> None:
    path = board_path("server", folder)
    path.write_bytes(b"not a board")
    path.chmod(0o600)
    with pytest.raises(OSError, match="11 bytes"):
        Board(path)
    assert os.path.exists(path)
