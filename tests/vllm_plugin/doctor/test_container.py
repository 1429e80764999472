"""A container that can write nothing but temporary files, behind a proxy, with 64 MB of memory to
share: imitated by a mount namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gimbal

PACKAGE = Path(gimbal.__file__).parent
CONTAINER = """
set -e
mount --bind "$PACKAGE" "$PACKAGE"
mount -o remount,ro,bind "$PACKAGE"
mount -t tmpfs -o ro none "$HOME"
mount -t tmpfs -o size=64m none /dev/shm
exec "$@"
"""


def can_mount() -> bool:
    try:
        words = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(words, capture_output=True, timeout=30).returncode == 0
    except OSError:
        return False


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not can_mount(), reason="no mount namespaces"
)


def in_container(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PACKAGE.parent),
        "PACKAGE": str(PACKAGE),
        "HOME": str(home),
        "TMPDIR": str(tmp_path),
        "http_proxy": "http://me:secret@proxy:3128",
    }
    command = ["unshare", "-rm", "bash", "-c", CONTAINER, "sh", sys.executable, *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd="/"
    )


def test_doctor_says_what_will_not_work(tmp_path: Path) -> None:
    done = in_container(tmp_path, "-m", "gimbal.cli", "doctor", "--json")
    found = {check["check"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    expected = {
        "shared memory": ("failed", "--shm-size"),
        "compiled code": ("warning", "NUMBA_CACHE_DIR"),
        "caches of vLLM": ("warning", "VLLM_CACHE_ROOT and HF_HOME"),
        "proxy": ("warning", "no_proxy"),
        "temporary files": ("ok", ""),
    }
    for name, (status, advice) in expected.items():
        assert found[name]["status"] == status, found[name]
        assert advice in found[name]["advice"]
    assert found["compiled code"]["found"].startswith(str(tmp_path))
    assert "secret" not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiles everything once: a minute, and many beside other work
def test_what_is_compiled_is_found_by_the_next_process(tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        done = in_container(tmp_path, "-m", "gimbal.vllm_plugin.placement.compiling")
        assert done.returncode == 0, done.stderr
        files = tmp_path.glob("gimbal-cache-*/*/*.nbi")
        kept.append({path.name: path.stat().st_mtime_ns for path in files})
    assert any("solve" in name for name in kept[0])
    assert kept[1] == kept[0]
