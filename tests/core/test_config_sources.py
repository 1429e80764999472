from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from gimbal.core.config import LEVELS, GimbalConfig, parse_config
from gimbal.core.config_sources import (
    merge_config,
    parse_levels,
    read_config_file,
    to_mapping,
    to_yaml,
)
from gimbal.core.errors import InputError


def test_what_is_printed_can_be_read_back() -> None:
    config = parse_config({"levels": ["queue"], "board_port": 7, "placement": {"alpha": 2.5}})
    again = parse_config(yaml.safe_load(to_yaml(config)))  # options' defaults are written out
    assert to_yaml(again) == to_yaml(config)
    assert (again.levels, again.board_port) == (config.levels, config.board_port)
    assert parse_config(to_mapping(config)) == config
    assert "(default 0)" in to_yaml(config)


def test_every_option_has_a_description() -> None:
    lines = to_yaml(GimbalConfig()).splitlines()
    for before, line in itertools.pairwise(lines):
        if line.strip() and not line.strip().startswith("#"):
            assert before.strip().startswith("# "), f"no description above {line!r}"
            assert len(before.strip()) > 4, f"an empty description above {line!r}"


@pytest.mark.parametrize(
    ("text", "levels"),
    [("all", list(LEVELS)), ("none", []), ("queue, dispatch", ["queue", "dispatch"])],
)
def test_levels(text: str, levels: list[str]) -> None:
    assert parse_levels(text) == levels


def test_later_sources_win_key_by_key() -> None:
    config = merge_config(
        [("a", {"placement": {"alpha": 2.0, "beta": 2.0}}), ("b", {"placement": {"beta": 4.0}})]
    )
    assert (config.placement.alpha, config.placement.beta) == (2.0, 4.0)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    with pytest.raises(InputError, match=r"g\.yaml: no such file"):
        read_config_file(file)
    file.write_text("admin: true\n  levels: [")
    with pytest.raises(InputError, match=r"g\.yaml:2: not YAML"):
        read_config_file(file)
    file.write_text("- a\n")
    with pytest.raises(InputError, match="expected a mapping of options, got list"):
        read_config_file(file)
    file.write_text("")
    assert read_config_file(file) == {}
    file.write_text("gimbal: {board_port: 3}\n")
    assert read_config_file(file) == {"board_port": 3}
