"""What `import gimbal` promises, and nothing besides."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import gimbal
import gimbal.contracts
import gimbal.testing


def defined_in(module: ModuleType) -> set[str]:
    """Public names whose definition stands in the module itself."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def test_the_package_shows_its_authors_two_modules() -> None:
    code = (
        "import sys, gimbal; before = set(vars(gimbal)); "
        "assert 'numpy' not in sys.modules, 'importing gimbal must stay cheap'; "
        "print([n for n in before if not n.startswith('_')], sorted(gimbal.__all__)); "
        "[getattr(gimbal, name) for name in gimbal.__all__]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['__version__', 'contracts', 'testing']"
    with pytest.raises(AttributeError, match="no attribute 'contract'"):
        _ = gimbal.contract


def test_contracts_holds_what_it_names() -> None:
    public = {name for name in vars(gimbal.contracts) if not name.startswith("_")}
    assert public - {"annotations"} == set(gimbal.contracts.__all__)
    assert len(gimbal.contracts.__all__) == len(set(gimbal.contracts.__all__))


def test_testing_holds_what_it_names() -> None:
    assert defined_in(gimbal.testing) == set(gimbal.testing.__all__)


@pytest.mark.parametrize("module", [gimbal.contracts, gimbal.testing])
def test_every_public_function_says_what_it_is_for(module: ModuleType) -> None:
    undocumented = []
    for name in module.__all__:
        found = getattr(module, name)
        doc = getattr(found, "__doc__", None) or ""
        # A dataclass or NamedTuple without a docstring is given its signature for one.
        if callable(found) and (not doc or doc.startswith(f"{name}(")):
            undocumented.append(name)
    assert undocumented == []
