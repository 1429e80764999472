"""The line and function budget, on a small tree and on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import size_budget

ROOT = Path(__file__).resolve().parents[2]


def function(name: str, lines: int, indent: str = "") -> str:
    """Source of a function of that many lines."""
    return f"{indent}def {name}():\n" + f"{indent}    pass\n" * (lines - 1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "gimbal" / "core").mkdir(parents=True)
    (tmp_path / "reproduction").mkdir()
    (tmp_path / "gimbal" / "fits.py").write_text(function("f", 60) + "x = 1\n" * 340)
    (tmp_path / "gimbal" / "core" / "long_file.py").write_text("x = 1\n" * 401)
    (tmp_path / "reproduction" / "long_method.py").write_text(
        "class C:\n" + function("m", 61, "    ") + function("g", 3)
    )
    return tmp_path


def test_only_what_is_over_a_limit_is_found(tree: Path) -> None:
    assert [(o.name, o.lines, o.limit) for o in size_budget.too_long(tree)] == [
        ("gimbal/core/long_file.py", 401, 400),
        ("reproduction/long_method.py:C.m", 61, 60),
    ]


def test_decorators_do_not_count_and_nested_functions_do(tree: Path) -> None:
    source = "@d\n@d\ndef outer():\n" + function("inner", 60, "    ")
    (tree / "reproduction" / "long_method.py").write_text(source)
    names = [o.name for o in size_budget.too_long(tree, ["reproduction"])]
    assert names == ["reproduction/long_method.py:outer"]


def test_what_is_over_fails_unless_it_is_allowed(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert size_budget.main(tree, {}) == 1
    out, err = capsys.readouterr()
    assert "gimbal/: 801 lines of Python in 2 files" in out
    assert "gimbal/core/long_file.py: 401 lines, limit 400" in err
    assert "reproduction/long_method.py:C.m: 61 lines, limit 60" in err

    allowed = {
        "gimbal/core/long_file.py": "a table",
        "reproduction/long_method.py:C.m": "to be split",
    }
    assert size_budget.main(tree, allowed) == 0
    out, err = capsys.readouterr()
    assert "allowed: reproduction/long_method.py:C.m: 61 lines (to be split)" in out
    assert not err


def test_an_entry_that_nothing_needs_fails(tree: Path) -> None:
    found = size_budget.problems([], {"gimbal/fits.py": "no longer"})
    assert found == ["gimbal/fits.py: within its limit; delete it from ALLOWED"]


def test_this_tree_keeps_its_budget() -> None:
    assert size_budget.problems(size_budget.too_long(ROOT), size_budget.ALLOWED) == []
