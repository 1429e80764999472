"""Where compiled code goes when neither the package nor a home can be written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gimbal.core import caches


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder, and nothing else that can be written."""
    monkeypatch.delenv(caches.COMPILED, raising=False)
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(caches, "lasting_folders", lambda: iter((Path("/proc/none"),)))
    return tmp_path


def test_a_private_folder_among_the_temporary_ones(bare: Path) -> None:
    folder, lasts = caches.compiled_code()
    assert folder == bare / f"gimbal-cache-{os.getuid()}"
    assert not lasts
    assert folder.stat().st_mode & 0o777 == 0o700
    assert caches.compiled_code() == (folder, False)  # found again


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_folder_that_others_could_write_to_is_left_alone(bare: Path, kind: str) -> None:
    path = bare / f"gimbal-cache-{os.getuid()}"
    if kind == "open to others":
        path.mkdir()
        path.chmod(0o770)
    elif kind == "a link":
        (bare / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(bare / "elsewhere")
    else:
        path.touch()
    assert caches.compiled_code() == (None, False)


def test_what_lasts_goes_first(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "lasting_folders", lambda: iter((bare / "home",)))
    assert caches.compiled_code() == (bare / "home", True)
    monkeypatch.setenv(caches.COMPILED, str(bare / "given"))
    assert caches.compiled_code() == (bare / "given", True)
    monkeypatch.setenv(caches.COMPILED, "/proc/none")
    assert caches.compiled_code() == (bare / "home", True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches.tempfile, "TemporaryFile", lambda **_: io.FileIO("/dev/full", "w"))
    assert not caches.is_writable(tmp_path)


def test_memory_where_no_temporary_folder_is(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(caches.tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(caches, "MEMORY", bare)
    assert caches.temporary_folder() == bare
    monkeypatch.setattr(caches, "MEMORY", Path("/proc/none"))
    assert caches.temporary_folder() is None
    assert caches.compiled_code() == (None, False)
    assert not caches.keep_compiled_code()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert caches.user_cache() is None
    assert len(list(caches.lasting_folders())) == 1


COMPILES = """
import sys
from pathlib import Path
from gimbal.core import caches
caches.lasting_folders = lambda: iter(())
if sys.argv[1] == "nowhere":
    caches.private_folder = lambda: None
import numba  # has read the environment before
from gimbal.core.compiled import Kernel
def twice(x):
    return 2 * x
kernel = Kernel(twice, "int64(int64)")
kernel.compile()
print(kernel.call(21))
"""


@pytest.mark.parametrize("where", ["temporary", "nowhere"])
def test_compiling_without_a_folder_that_lasts(tmp_path: Path, where: str) -> None:
    script = tmp_path / "package" / "script.py"
    script.parent.mkdir()
    script.write_text(COMPILES)
    # numba would write beside the script: a file stands where its folder would.
    (script.parent / "__pycache__").touch()
    environment = os.environ | {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": "/proc/none"}
    environment.pop(caches.COMPILED, None)
    done = subprocess.run(
        [sys.executable, str(script), where],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "42\n", done.stderr
    kept = list(tmp_path.glob("gimbal-cache-*/*/script.twice*.nbi"))
    assert bool(kept) == (where == "temporary")
    assert ("every process compiles for itself" in done.stderr) == (where == "nowhere")
