"""A board file that is cut short, replaced, full or somebody else's ends no process."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gimbal.board import file, storage
from gimbal.board.file import Board, board_path
from gimbal.board.layout import BOARD_BYTES, EMPTY_HEADER, NEWEST_AT
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.core.snapshot import ROW_WIDTH, row_problem


def row(value: float) -> np.ndarray:
    return np.full(ROW_WIDTH, float(value))


ENGINE = """
import sys, time; from pathlib import Path; import numpy as np
from gimbal.board.file import Board; from gimbal.board.slots import SlotWriter, BoardReader
board, number, row = Board(Path(sys.argv[1])), 0, np.empty(int(sys.argv[2]))
writer, reader = SlotWriter(board, int(sys.argv[3])), BoardReader(board, 2)
last = np.zeros(2)
while not Path(sys.argv[4]).exists():
    number += 1
    row[:] = number
    try:
        writer.publish(row)
    except OSError:  # as documented: the next call tries again, and has to get through in time
        pass
    rows = reader.read()
    assert (rows == rows[:, :1]).all(), rows
    assert (rows[:, 0] >= last).all(), (rows[:, 0], last)
    last = rows[:, 0]
    board.control_version(), board.read_control()
    time.sleep(0.0002)
print(board.recoveries)
"""


@pytest.mark.timeout(120)
def test_processes_survive_a_file_that_is_cut_short_under_them(
    path: Path, folder: Path, start: Any
) -> None:
    """A mapping would end both of them with SIGBUS."""
    board, stop = Board(path), folder / "stop"
    board.write_control({"policy": "round-robin"})
    reader = BoardReader(board, 2)
    engines = [start(ENGINE, path, ROW_WIDTH, slot, stop) for slot in range(2)]
    sizes = [0, 8, 1000, 4096, BOARD_BYTES - 8]
    for size in sizes:
        last = reader.read()[:, 0]
        _wait(lambda last=last: (reader.read()[:, 0] > last).all(), engines)
        inode = os.stat(path).st_ino
        os.truncate(path, size)
        for _ in range(20):  # as if somebody went on emptying it
            os.truncate(path, size)
            reader.read()
        _wait(lambda inode=inode: _whole(path, inode), engines)
    assert board.read_control() == {"policy": "round-robin"}
    # Whoever made it anew puts the message back a moment later.
    newcomer = Board(path)
    _wait(lambda: newcomer.read_control() == {"policy": "round-robin"}, engines)
    stop.touch()
    for engine in engines:
        out, err = engine.communicate(timeout=60)
        assert engine.returncode == 0, err
        assert int(out) > 0
    assert board.recoveries > 0


def _whole(path: Path, old_inode: int) -> bool:
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return False
    return info.st_ino != old_inode and info.st_size == BOARD_BYTES


def _wait(reached: Any, processes: list[Any]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, [process.communicate() for process in ended]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("size", [0, 7, 12, 15, 18, 100, 8 * NEWEST_AT, 20_000, BOARD_BYTES - 1])
def test_readers_keep_the_last_good_rows(path: Path, size: int) -> None:
    engine, front = Board(path), Board(path)
    engine.write_control({"levels": []})
    writers, reader = [SlotWriter(engine, slot) for slot in range(2)], BoardReader(front, 2)
    for writer in writers:
        writer.publish(row(1.0), now_s=0.0)
    assert (reader.read(now_s=0.0) == 1.0).all()
    assert front.control_version() == 1
    assert front.read_control() == {"levels": []}
    os.truncate(path, size)
    assert (reader.read(now_s=0.1) == 1.0).all()
    writers[0].publish(row(2.0), now_s=0.1)  # makes the file longer again, with a hole
    assert (reader.read(now_s=0.2)[1] == 1.0).all(), "a hole was taken for a row"
    assert front.read_control() == {"levels": []}
    reader.read(now_s=1.0)  # looks, and makes the file anew
    assert front.recoveries == 1
    assert (reader.read(now_s=1.1)[1] == 1.0).all()
    for writer in writers:
        writer.publish(row(3.0), now_s=2.0)
    assert (reader.read(now_s=2.0) == 3.0).all()
    assert engine.read_control() == front.read_control() == {"levels": []}
    assert os.stat(path).st_size == BOARD_BYTES


def _short_file(path: Path) -> None:
    path.write_text("short")
    path.chmod(0o600)


def _open_file(path: Path) -> None:
    path.write_text("short")
    path.chmod(0o644)


def _fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def _dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def _link_to_a_file(path: Path) -> None:
    path.with_name("target").write_text("precious")
    path.symlink_to(path.with_name("target"))


@pytest.mark.parametrize(
    "replace", [_short_file, _open_file, _fifo, _dangling_link, _link_to_a_file]
)
def test_what_replaces_a_board_in_use_is_replaced(path: Path, replace: Any) -> None:
    board = Board(path)
    writer, reader = SlotWriter(board, 0), BoardReader(board, 1)
    writer.publish(row(1.0), now_s=0.0)
    path.unlink()
    replace(path)
    assert (reader.read(now_s=1.0) == 1.0).all()
    assert board.recoveries == 1
    writer.publish(row(2.0), now_s=1.0)
    assert (BoardReader(Board(path), 1).read() == 2.0).all()
    assert stat.S_ISREG(os.lstat(path).st_mode)
    target = path.with_name("target")
    assert not target.exists() or target.read_text() == "precious"
    assert not path.with_name("nothing").exists()


def test_a_board_that_cannot_be_made_anew_is_said_and_tried_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(path)
    writer, reader = SlotWriter(board, 0), BoardReader(board, 1)
    writer.publish(row(1.0), now_s=0.0)
    path.unlink()
    path.mkdir()
    for number in range(1, 6):
        assert (reader.read(now_s=float(number)) == 1.0).all()
    assert board.failures == 5
    assert board.problem is not None
    assert "directory" in board.problem.lower()
    assert sum("kept as it was" in record.message for record in caplog.records) == 1
    with pytest.raises(OSError, match="directory"):
        writer.publish(row(2.0), now_s=10.0)
    with pytest.raises(OSError, match="directory"):
        board.write_control({"levels": []})
    writer.publish(row(3.0), now_s=10.5)  # to the file that has no name any more
    assert (reader.read(now_s=5.1) == 3.0).all()
    path.rmdir()
    writer.publish(row(4.0), now_s=20.0)
    assert (reader.read(now_s=20.0) == 4.0).all()
    assert board.problem is None


@pytest.mark.parametrize("replace", [_dangling_link, _link_to_a_file])
def test_a_symbolic_link_is_never_followed(path: Path, replace: Any) -> None:
    replace(path)
    with pytest.raises(OSError, match="symbolic link"):
        Board(path)
    assert path.is_symlink()
    assert not path.with_name("nothing").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_board_that_others_may_open_is_refused(path: Path, mode: int) -> None:
    keep = Board(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    path.chmod(mode)
    with pytest.raises(OSError, match=f"open to others .mode {mode:04o}"):
        Board(path)
    keep.close()


def test_another_users_file_is_refused_and_stays(path: Path, monkeypatch: Any) -> None:
    keep = Board(path)
    monkeypatch.setattr(storage.os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match=f"belongs to user {os.getuid()}, not to user 12345"):
        Board(path)
    assert path.exists()
    assert file.sweep(path.parent) == []
    monkeypatch.undo()
    keep.close()


def test_a_fifo_under_the_name_blocks_nobody(path: Path) -> None:
    os.mkfifo(path, 0o600)
    with pytest.raises(OSError, match="not a plain file"):
        Board(path)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("word", [0, 2])
def test_a_board_of_another_version_is_left_alone(path: Path, held: bool, word: int) -> None:
    board = Board(path)
    header = bytearray(EMPTY_HEADER)
    header[8 * word + 7 * (word == 0)] += 1  # the version, or the width of a row
    board.storage.write(0, bytes(header))
    if not held:
        del board
    with pytest.raises(OSError, match="a board of another version"):
        Board(path)
    assert path.exists()
    assert file.sweep(path.parent) == []


# Room.


def _full(monkeypatch: Any, full: Path) -> None:
    reserve = os.posix_fallocate

    def refuse(fd: int, offset: int, length: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).parent == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, length)

    monkeypatch.setattr(storage.os, "posix_fallocate", refuse)


def test_without_room_the_board_is_an_error_that_says_so(path: Path, monkeypatch: Any) -> None:
    _full(monkeypatch, path.parent)
    with pytest.raises(OSError, match=r"no board of .* KiB can be made: No space left") as raised:
        Board(path)
    assert raised.value.errno == errno.ENOSPC
    assert list(path.parent.iterdir()) == []


def test_without_room_the_board_goes_elsewhere_and_all_find_it(
    path: Path, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / path.name
    _full(monkeypatch, path.parent)
    board = Board(path, other)
    assert board.path == other
    assert sum(str(other) in record.message for record in caplog.records) == 1
    monkeypatch.undo()  # there is room again: who comes later still joins the first
    second = Board(path, other)
    assert second.path == other
    SlotWriter(second, 0).publish(row(5.0))
    assert (BoardReader(board, 1).read() == 5.0).all()
    third = Board(path)  # knows of one place only
    assert board.check()
    assert second.check()
    assert board.path == second.path == third.path == path


def test_shared_memory_falls_back_to_the_temporary_folder() -> None:
    shared, other = Path("/dev/shm/gimbal-1-a.board"), Path("/var/x/gimbal-1-a.board")
    found = file.fallback_path(shared)
    assert found is not None
    assert found.name == shared.name
    assert file.fallback_path(other) is None


FULL = """
import sys, tempfile; from pathlib import Path
tempfile.tempdir = sys.argv[2]
from gimbal.board.file import Board
filler = Path(sys.argv[1], "filler")
board = Board(Path(sys.argv[1], "gimbal-0-a.board"))
with filler.open("wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError as error:
        assert error.errno == 28, error
from gimbal.board.slots import SlotWriter, BoardReader
import numpy as np
from gimbal.core.snapshot import ROW_WIDTH
for slot in (0, 100, 255):  # every page is there although nothing is free
    SlotWriter(board, slot).publish(np.full(ROW_WIDTH, 1.0))
    assert BoardReader(board, 1, slot).read().all()
board.write_control({"levels": []})
try:
    Board(Path(sys.argv[1], "gimbal-0-b.board"))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounts a small file system"
)
def test_a_full_file_system_is_an_error_at_creation_only(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts are forbidden here")
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL, str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left" in done.stdout


# Anything at all.


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    writes=st.lists(
        st.tuples(st.integers(0, BOARD_BYTES // 8 - 1), st.binary(min_size=1, max_size=64)),
        max_size=20,
    ),
    size=st.one_of(st.none(), st.integers(0, 2 * BOARD_BYTES)),
)
def test_whatever_a_file_holds_readers_give_whole_rows_and_a_message(
    tmp_path_factory: Any, writes: list[tuple[int, bytes]], size: int | None
) -> None:
    path = board_path("server", tmp_path_factory.mktemp("board"))
    board = Board(path)
    writer, reader = SlotWriter(board, 0), BoardReader(board, 3)
    writer.publish(row(1.0), now_s=0.0)
    board.write_control({"levels": []})
    reader.read(now_s=0.0)
    for first, data in writes:
        os.pwrite(board.storage.fd, data, 8 * first)
    if size is not None:
        os.truncate(path, size)
    for now_s in (0.1, 0.2, 5.0, 5.1):
        rows = reader.read(now_s=now_s)
        assert (rows == rows[:, :1]).all()
        assert all(row_problem(row) is None for row in rows)
        assert board.read_control() in ({}, {"levels": []})
        assert board.control_version() >= 0
    shutil.rmtree(path.parent)
