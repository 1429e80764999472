"""The installed vLLM has every symbol Gimbal relies on, with the signature it expects."""

from __future__ import annotations

from pathlib import Path

import pytest

from gimbal.vllm_plugin.doctor.seams_report import check_levels
from gimbal.vllm_plugin.doctor.software import vllm_root
from gimbal.vllm_plugin.seams import SEAMS, Seam, check_seams

SOURCE = """
CONSTANT = 1
if CONSTANT:
    def chosen(a, *, b): ...
try:
    from other import imported
except ImportError:
    imported = None
class Engine:
    limit: int = 3
    async def step(self, x, *args, flag=False, **extra): ...
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "engine.py").write_text(SOURCE)
    return tmp_path


def seam(symbol: str, parameters: tuple[str, ...] = (), module: str = "v1.engine") -> Seam:
    return Seam(module, symbol, parameters, "queue", "test")


@pytest.mark.parametrize(
    "expected",
    [
        seam("CONSTANT"),
        seam("chosen", ("a", "*", "b")),
        seam("imported"),
        seam("Engine"),
        seam("Engine.limit"),
        seam("Engine.step", ("self", "x", "*args", "flag", "**extra")),
    ],
    ids=lambda s: s.symbol,
)
def test_symbols_are_found_with_their_parameters(tree: Path, expected: Seam) -> None:
    assert check_seams(tree, (expected,)) == []


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (seam("gone"), "no such symbol"),
        (seam("Engine.gone"), "no such symbol"),
        (seam("x", module="v1.gone"), "no module v1.gone"),
        (seam("chosen", ("a", "b")), "(a, *, b)"),
        (seam("Engine", ("self",)), "(<not a function>)"),
    ],
)
def test_a_difference_says_what_is_there_instead(tree: Path, expected: Seam, found: str) -> None:
    (problem,) = check_seams(tree, (expected,))
    assert problem.seam is expected
    assert problem.found == found


def test_the_installed_vllm_fits() -> None:
    root = vllm_root()
    if root is None:
        pytest.skip("vLLM is not installed")
    assert SEAMS
    assert [finding for finding in check_levels(root) if finding.status != "ok"] == []
