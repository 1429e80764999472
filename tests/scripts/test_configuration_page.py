"""docs/configuration.md is what the schema says, and the page's maker reads nested sections."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gimbal.core.config import GimbalConfig
from gimbal.core.config_sources import to_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    path = ROOT / "scripts" / "configuration_page.py"
    spec = importlib.util.spec_from_file_location("configuration_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["configuration_page"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_the_page_is_not_stale(maker: ModuleType) -> None:
    page = maker.page(to_yaml(GimbalConfig()))
    assert maker.OUT.read_text() == page, "run scripts/configuration_page.py"


def test_sections_of_sections_get_tables_of_their_own(maker: ModuleType) -> None:
    text = """\
# false leaves vLLM as it is
enabled: true

# Level `dispatch`: where requests go.
dispatch:
  # policy by name: a|b
  policy: gimbal

  # Options of the policy
  options:
    # output length
    # assumed
    expected_output_tokens: 57.0
  # older snapshots are not trusted
  max_signal_age_ms: 2000.0
"""
    assert (
        maker.page(text).removeprefix(maker.HEAD).strip()
        == """\
## Top level

| key | default | meaning |
|---|---|---|
| `enabled` | `true` | false leaves vLLM as it is |

## `dispatch`

Level `dispatch`: where requests go.

| key | default | meaning |
|---|---|---|
| `dispatch.policy` | `gimbal` | policy by name: a\\|b |
| `dispatch.max_signal_age_ms` | `2000.0` | older snapshots are not trusted |

### `dispatch.options`

Options of the policy.

| key | default | meaning |
|---|---|---|
| `dispatch.options.expected_output_tokens` | `57.0` | output length assumed |"""
    )


def test_a_line_that_is_no_key_is_refused(maker: ModuleType) -> None:
    with pytest.raises(ValueError, match="line 2"):
        list(maker.entries("levels:\n- dispatch\n"))


def test_check_tells_a_stale_page_by_its_exit_code(
    maker: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(maker, "OUT", tmp_path / "configuration.md")
    monkeypatch.setattr(sys, "argv", ["configuration_page.py", "--check"])
    assert maker.main() == 1
    assert "stale" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["configuration_page.py"])
    assert maker.main() == 0
    monkeypatch.setattr(sys, "argv", ["configuration_page.py", "--check"])
    assert maker.main() == 0
