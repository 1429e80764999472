"""The demo model's routing against the ranges measured on real models."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_demo_model_routes_like_real_models(tmp_path):
    """Targets: DeepSeek-V2-Lite on ESFT's four tasks (max/mean 3.3 to 5.6, 0.10 to 0.20 bits)."""
    from gimbal.commands.model import command

    folder = str(tmp_path / "demo")
    made = CliRunner().invoke(command, ["demo", "--out", folder])
    assert made.exit_code == 0, made.output
    shown = CliRunner().invoke(command, ["stats", folder, "--json"])
    assert shown.exit_code == 0, shown.output
    stats = json.loads(shown.stdout)
    assert stats["seed"] == 0
    assert len(stats["layers"]) == 4
    for domain, skew in stats["skew_median"].items():
        assert 3.0 <= skew <= 5.0, domain
    assert 0.10 <= stats["divergence_bits"] <= 0.20
    assert stats["split_half_bits"] < 0.01
    assert stats["continued_as"] == {d: d for d in stats["skew_median"]}
    assert stats["continuation_distinct"] > 0.5
