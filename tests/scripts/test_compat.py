"""What `make compat` makes of operators, and where its result goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.operators import Argument, Call, calls, compare
from scripts.pages import put

OPERATORS = {
    "_C::mul": [
        [Argument("out", True, False), Argument("x", True, False), Argument("eps", False, True)]
    ]
}


@pytest.mark.parametrize(
    ("source", "differs"),
    [
        ("torch.ops._C.mul(a, b)", False),
        ("torch.ops._C.mul(a, b, eps=1)", False),
        ("torch.ops._C.mul(a, x=b)", False),
        ("torch.ops._C.mul.default(a, b)", False),
        ("torch.ops._C.mul(*both)", False),
        ("run(torch.ops._C.mul)", False),
        ("torch.ops._C.mul(a)", True),
        ("torch.ops._C.mul(a, b, 1)", True),
        ("torch.ops._C.mul(a, b, epsilon=1)", True),
        ("torch.ops._C.mul(*both, epsilon=1)", True),
    ],
)
def test_calls_are_compared_with_what_is_registered(
    tmp_path: Path, source: str, differs: bool
) -> None:
    (tmp_path / "ops.py").write_text(source)
    ours = list(calls(tmp_path))
    found = compare(OPERATORS, ours, [])
    assert found["compared"] == found["registered"] == 1
    assert found["differing"] == (["`_C::mul` (ops.py:1)"] if differs else [])
    assert compare(OPERATORS, ours, ours)["differing"] == [], "the binaries' own Python does so too"


def test_what_is_not_registered_is_named_where_only_this_version_calls_it() -> None:
    new, old, elsewhere = (Call(n, 0, (), "a.py:1") for n in ("_C::new", "_C::old", "aten::mul"))
    assert compare(OPERATORS, [new, old, elsewhere], [old])["missing"] == ["_C::new"]


def test_a_block_is_replaced_and_its_surroundings_stay() -> None:
    first = put("# Page\n\nby hand\n", "a", "one\n")
    assert first == "# Page\n\nby hand\n\n<!-- a -->\none\n<!-- end of a -->\n"
    second = put(put(first, "b", "two"), "a", "three")
    assert "one" not in second
    assert second.index("three") < second.index("two")
    assert second.startswith("# Page\n\nby hand\n")
