"""What a digest of a body sees, and what `gimbal doctor` makes of a changed one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gimbal.vllm_plugin.doctor import seams_report
from gimbal.vllm_plugin.seams import SEAMS, Seam, bodies

BODY = '''
class Engine:
    @staticmethod
    def step(a: int, *, b=1):
        """Does it."""
        # why
        return {"x": a + b,
                "y": f"{a}"}
'''
SEAM = Seam("v1.engine", "Engine.step", ("a", "*", "b"), "queue", "called")


def digest(source: str, name: str = "step") -> str:
    nodes = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == name]
    assert isinstance(nodes[0], ast.FunctionDef | ast.ClassDef)
    return bodies.digest(source, nodes[0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Does it.", "Does it well."),
        ("        # why\n", "\n"),
        ('a + b,\n                "y"', 'a + b, "y"'),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(old: str, new: str) -> None:
    assert old in BODY
    for name in ("step", "Engine"):
        assert digest(BODY.replace(old, new), name) == digest(BODY, name)


@pytest.mark.parametrize(
    ("old", "new"), [("a + b", "a - b"), ("@staticmethod", "@classmethod"), ("b=1", "b=2")]
)
def test_everything_else_does(old: str, new: str) -> None:
    for name in ("step", "Engine"):
        assert digest(BODY.replace(old, new), name) != digest(BODY, name)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "engine.py").write_text(BODY)
    (tmp_path / "_version.py").write_text("__version__ = '0.40.1'\n")
    known = {
        "0.32.0": {"v1.engine.Engine.step": "other"},
        "0.40.0": bodies.bodies(tmp_path, [SEAM]),
    }
    monkeypatch.setattr(bodies, "known", lambda: known)
    monkeypatch.setattr(seams_report, "SEAMS", (SEAM,))
    return tmp_path


def test_a_changed_body_is_a_warning_that_names_it(tree: Path) -> None:
    assert seams_report.check_bodies(tree).status == "ok"
    (tree / "v1" / "engine.py").write_text(BODY.replace("a + b", "a - b"))
    finding = seams_report.check_bodies(tree)
    assert finding.status == "warning"
    assert finding.found == "1 of 1 are not those of 0.40.0: v1.engine.Engine.step"


@pytest.mark.parametrize(
    ("version", "compared"),
    [
        ("0.32.5", "0.32.0"),
        ("0.34.0", "0.32.0"),
        ("0.39", "0.40.0"),
        ("1.0", "0.40.0"),
        (None, "0.40.0"),
    ],
)
def test_the_nearest_version_is_compared_with(
    tree: Path, version: str | None, compared: str
) -> None:
    assert bodies.compared_with(version) == compared


def test_every_replaced_function_has_a_known_body() -> None:
    newest = list(bodies.known().values())[-1]
    without = [
        f"{seam.module}.{seam.symbol}"
        for seam in SEAMS
        if seam.patched and seam.parameters and f"{seam.module}.{seam.symbol}" not in newest
    ]
    assert not without, "scripts/compatibility.py writes them"
