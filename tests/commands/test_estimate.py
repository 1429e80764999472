"""`gimbal calibrate --estimate`: models of several kinds, read from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gimbal.commands.calibrate import command
from gimbal.core.cost.profile import load_profile
from gimbal.core.errors import InputError
from tests.small_models import MLA

MISTRAL = {
    "dim": 1024,
    "n_layers": 5,
    "n_heads": 16,
    "n_kv_heads": 4,
    "head_dim": 64,
    "hidden_dim": 2048,
    "vocab_size": 1000,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}


def estimate(
    folder: Path, values: dict[str, Any], *words: str, file: str = "config.json"
) -> Result:
    (folder / file).write_text(json.dumps(values))
    fixed = ["--estimate", "h200", "--model-dir", str(folder), "--out", str(folder / "p.yaml")]
    return CliRunner().invoke(command, [*fixed, *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("values", "file", "layers", "kv_bytes"),
    [
        (MLA, "config.json", 4, 5 * (256 + 32) * 2),
        ({"model_type": "seer", "text_config": MLA}, "config.json", 4, 5 * (256 + 32) * 2),
        (MISTRAL, "params.json", 5, 5 * 2 * 4 * 64 * 2),
    ],
)
def test_any_folder_vllm_takes(
    values: dict, file: str, layers: int, kv_bytes: int, tmp_path: Path
) -> None:
    result = estimate(tmp_path, values, "--dp", "8", file=file)
    assert result.exit_code == 0, result.output
    profile = load_profile(tmp_path / "p.yaml")
    assert (profile.model.layers, profile.model.kv_bytes_per_token) == (layers, kv_bytes)
    assert profile.kv_tokens > 0


def test_the_kv_cache_dtype_is_an_option(tmp_path: Path) -> None:
    estimate(tmp_path, MLA, "--kv-cache-dtype", "fp8")
    assert load_profile(tmp_path / "p.yaml").model.kv_bytes_per_token == 5 * (256 + 32)
    assert estimate(tmp_path, MLA, "--kv-cache-dtype", "fp7").exit_code == 2


def test_what_a_profile_cannot_hold_is_noted(tmp_path: Path) -> None:
    result = estimate(tmp_path, {**MLA, "n_routed_experts": 4096, "moe_intermediate_size": 65536})
    assert result.exit_code == 0
    assert "note: does not fit: " in result.stderr
    profile = load_profile(tmp_path / "p.yaml")
    assert profile.kv_tokens == 0
    assert any(note.startswith("does not fit: ") for note in profile.notes)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: model_type='seer' with kv_lora_rank: not"):
        estimate(tmp_path, {**MLA, "model_type": "seer"})
    assert not (tmp_path / "p.yaml").exists()
