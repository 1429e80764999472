"""docs/configuration.md is what the schema says, and the page's maker reads nested sections."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gimbal.core.config import GimbalConfig
from gimbal.core.config_sources import to_yaml
from scripts import configuration_page


def test_the_page_is_not_stale() -> None:
    page = configuration_page.page(to_yaml(GimbalConfig()))
    assert configuration_page.OUT.read_text() == page, "run make pages"


def test_sections_of_sections_get_tables_of_their_own() -> None:
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
        configuration_page.page(text).removeprefix(configuration_page.HEAD).strip()
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


def test_a_line_that_is_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2"):
        list(configuration_page.entries("levels:\n- dispatch\n"))


def test_check_tells_a_stale_page_by_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(configuration_page, "OUT", tmp_path / "configuration.md")
    monkeypatch.setattr(sys, "argv", ["configuration_page.py", "--check"])
    assert configuration_page.main() == 1
    assert "stale" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["configuration_page.py"])
    assert configuration_page.main() == 0
    monkeypatch.setattr(sys, "argv", ["configuration_page.py", "--check"])
    assert configuration_page.main() == 0
