"""What `make peers` concludes from two runs; the runs themselves need vLLM's sources."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "scripts" / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module


def test_outcomes_are_read_from_a_report(peers: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "plain.xml"
    report.write_text(
        "<testsuites><testsuite>"
        "<testcase classname='tests.v1.core.test_a' name='test_x[1]'/>"
        "<testcase classname='tests.v1.core.test_a' name='test_y'><failure/></testcase>"
        "<testcase classname='tests.v1.core.test_a.TestB' name='test_z'><error/></testcase>"
        "<testcase classname='tests.v1.core.test_b' name='test_x'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert peers.outcomes(report) == {
        "test_a::test_x[1]": "passed",
        "test_a::test_y": "failed",
        "TestB::test_z": "failed",
        "test_b::test_x": "skipped",
    }


def test_a_difference_needs_a_reason_and_a_reason_a_difference(peers: ModuleType) -> None:
    plain = {"a::x[1]": "passed", "a::x[2]": "passed", "a::y": "failed", "a::z": "passed"}
    ours = {"a::x[1]": "failed", "a::x[2]": "failed", "a::y": "failed"}
    found = peers.differences(plain, ours)
    assert found == {
        "a::x[1]": ("passed", "failed"),
        "a::x[2]": ("passed", "failed"),
        "a::z": ("passed", "absent"),
    }
    assert peers.complaints(found, {"a::x": "meant", "a::z": "meant"}) == []
    assert [text.partition(":")[2][:3] for text in peers.complaints(found, {"a::x": "m"})] == [
        ":z:"
    ]
    (stale,) = peers.complaints(found, {"a::x": "", "a::z": "", "a::y": ""})
    assert stale.startswith("a::y: is listed as meant")
    assert peers.complaints({}, {"a::y": ""}, whole=False) == []


def test_only_tests_are_unpacked(peers: ModuleType, tmp_path: Path) -> None:
    sdist = tmp_path / "vllm-9.9.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("tests/a.py", "pyproject.toml", "vllm/b.py", "setup.py"):
            archive.addfile(tarfile.TarInfo(f"vllm-9.9/{name}"), io.BytesIO())
    folder = peers.unpacked(sdist, "9.9")
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["pyproject.toml", "tests/a.py"]


def test_the_page_holds_every_reason(peers: ModuleType) -> None:
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    for arm, meant in peers.MEANT.items():
        section = page.partition(f"## {arm}\n")[2].partition("## ")[0]
        for name, why in meant.items():
            assert f"| `{name}` | {why} |" in section
        assert section.count("| `") == len(meant)
    runs = {
        peers.PLAIN: {"a": "passed", "b": "failed", "slow": "failed"},
        peers.DEFAULT: {"a": "passed", "b": "failed", "slow": "passed"},
        peers.FCFS: {"a": "passed", "b": "failed", "slow": "passed"},
    }
    assert peers.by_chance(runs) == ["slow"]
    made = peers.page("9.9", runs)
    assert "| with Gimbal | 2 | 1 | 0 |" in made
    assert "| `slow` |" in made
    assert "| `b` |" not in made
