"""Who uses a board: known by locks that the kernel drops, in every PID namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gimbal.board.file import Board, board_path, sweep
from gimbal.board.slots import BoardReader, SlotWriter
from gimbal.core.snapshot import ROW_WIDTH

USE = """
import sys; from pathlib import Path; import numpy as np
from gimbal.board.file import Board; from gimbal.board.slots import SlotWriter
writer = SlotWriter(Board(Path(sys.argv[1])), 0)
writer.publish(np.full(int(sys.argv[2]), 9.0))
print("ready", flush=True); sys.stdin.readline()
"""


def test_a_board_is_kept_until_its_last_user_is_gone(path: Path, start: Any) -> None:
    owner, other = (start(USE, path, ROW_WIDTH) for _ in range(2))
    for process in (owner, other):
        process.stdout.readline()
    owner.kill()
    owner.wait()
    assert sweep(path.parent) == []
    other.kill()
    other.wait()
    assert sweep(path.parent) == [path]
    assert not path.exists()


def test_a_killed_servers_rows_are_not_taken_for_live_ones(path: Path, start: Any) -> None:
    process = start(USE, path, ROW_WIDTH)
    process.stdout.readline()
    process.kill()
    process.wait()
    board = Board(path)
    assert not BoardReader(board, 1).read().any()
    assert not board.written_by_another(0)


def test_a_slot_is_anothers_for_as_long_as_that_lives(path: Path, start: Any) -> None:
    board = Board(path)
    process = start(USE, path, ROW_WIDTH)
    process.stdout.readline()
    assert board.written_by_another(0)
    assert not board.written_by_another(1)
    process.kill()
    process.wait()
    assert not board.written_by_another(0)


def test_a_slot_passes_to_the_next_writer(path: Path, start: Any) -> None:
    """An engine that was replaced may take long to end."""
    board = Board(path)
    process = start(USE, path, ROW_WIDTH)
    process.stdout.readline()
    writer = SlotWriter(board, 0)
    writer.publish(np.full(ROW_WIDTH, 10.0), now_s=0.0)
    assert (BoardReader(board, 1).read() == 10.0).all()
    process.kill()
    process.wait()
    writer.publish(np.full(ROW_WIDTH, 11.0), now_s=2.0)
    assert Board(path).written_by_another(0)


FORK = """
import os, sys, time; from pathlib import Path; import numpy as np
from gimbal.board.file import Board; from gimbal.board.slots import SlotWriter, BoardReader
board = Board(Path(sys.argv[1]))
writer, reader = SlotWriter(board, 0), BoardReader(board, 1)
writer.publish(np.full(int(sys.argv[2]), 9.0))
read, write = os.pipe()
if os.fork() == 0:
    assert (reader.read() == 9.0).all()
    board.close()  # not its own
    assert Path(sys.argv[1]).exists()
    print("child", flush=True)
    os.write(write, b"x")
    sys.stdin.readline()
    assert (reader.read() == 9.0).all(), "the file it has open"
    print("read", flush=True)
    os._exit(0)
os.read(read, 1)
os.kill(os.getpid(), 9)
"""


def test_a_forked_child_keeps_no_lock_of_its_parent(path: Path, start: Any) -> None:
    process = start(FORK, path, ROW_WIDTH)
    assert process.stdout.readline().startswith("child")
    process.wait()
    assert sweep(path.parent) == [path], "the child is alive, the server is not"
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "read\n"


FORKED_WRITER = """
import os, sys, time; from pathlib import Path; import numpy as np
from gimbal.board.file import Board; from gimbal.board.slots import SlotWriter
writer = SlotWriter(Board(Path(sys.argv[1])), 0)
if os.fork():
    os._exit(0)
second = 0
while not Path(sys.argv[3]).exists():
    second += 1
    writer.publish(np.full(int(sys.argv[2]), 9.0), now_s=float(second))
    time.sleep(0.005)
"""


def test_a_forked_child_that_writes_counts(path: Path, start: Any) -> None:
    keep = Board(path)
    stop = path.parent / "stop"
    process = start(FORKED_WRITER, path, ROW_WIDTH, stop)
    process.wait()
    deadline = time.monotonic() + 60
    while not keep.written_by_another(0):  # at its next look, once its parent's lock is gone
        assert time.monotonic() < deadline
        time.sleep(0.01)
    keep.storage.leave()
    assert sweep(path.parent) == []
    stop.touch()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="makes a PID namespace"
)
def test_a_sweep_in_another_pid_namespace_leaves_a_live_board(path: Path) -> None:
    """Two containers with --ipc=host: neither sees the other's processes."""
    prefix = ["unshare", "-p", "-f", "--mount-proc"]
    if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("namespaces are forbidden here")
    code = (
        "import sys; from pathlib import Path; from gimbal.board.file import sweep;"
        "print(len(sweep(Path(sys.argv[1]))))"
    )
    command = [*prefix, sys.executable, "-c", code, str(path.parent)]
    board = Board(path)
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "0\n"
    assert path.exists()
    del board
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "1\n"
    assert not path.exists()


def test_a_sweep_takes_what_is_left_of_a_board_and_nothing_else(folder: Path) -> None:
    mine = f"gimbal-{os.getuid()}-"
    empty, draft = folder / f"{mine}a.board", folder / f".{mine}b.draft"
    foreign, others = folder / f"{mine}c.board", folder / f"gimbal-{os.getuid() + 1}-d.board"
    link = folder / f"{mine}e.board"
    for file in (empty, draft, foreign, others):
        file.touch(0o600)
    foreign.write_text("somebody's notes")
    link.symlink_to(foreign)
    assert sorted(sweep(folder)) == sorted([empty, draft])
    assert sorted(folder.iterdir()) == sorted([foreign, others, link])


def test_two_users_of_a_host_have_two_boards(folder: Path, monkeypatch: Any) -> None:
    own = board_path("server", folder)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert board_path("server", folder) != own
