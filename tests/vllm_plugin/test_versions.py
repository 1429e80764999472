"""What Gimbal does in a vLLM of another version."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from gimbal.core.errors import InputError
from gimbal.vllm_plugin import install, versions


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu"])
def test_supported_versions(version: str) -> None:
    versions.check_version(version)


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=rf"vLLM {version} is not supported.*0\.32 and 0\.33"):
        versions.check_version(version)
    monkeypatch.setenv(versions.ANY_VERSION, "1")
    versions.check_version(version)


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_patched_in_a_version_that_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    patched: list[str] = []
    hook = SimpleNamespace(install=lambda: patched.append("hook"))
    monkeypatch.setattr(versions, "_running", lambda: "0.99.0")
    monkeypatch.setattr(install, "_installed", set())
    monkeypatch.setattr(install, "import_module", lambda _: hook)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    if asked:
        monkeypatch.setenv(versions.ANY_VERSION, "1")
    install.install_all()
    assert len(patched) == (len(install.HOOKS) if asked else 0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if asked else 1)
    assert asked or "vLLM 0.99.0 is not supported, 0.32 and 0.33 are" in said[0]


def test_only_the_first_process_of_a_server_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    versions.say_unsupported()
    assert not caplog.records


def config(drops_a_block: bool | None, **more: Any) -> Any:
    speculative = SimpleNamespace(use_eagle_block_drop=lambda: drops_a_block)
    return SimpleNamespace(
        speculative_config=None if drops_a_block is None else speculative, **more
    )


@pytest.mark.parametrize(
    ("vllm_config", "tokens"),
    [
        (config(None), 0),
        (config(False), 0),
        (config(True), 1),  # 0.32
        (config(True, num_hash_lookahead_tokens=3), 3),
        (config(True, num_hash_lookahead_tokens=0), 1),  # 0.33 with a KV connector
    ],
)
def test_tokens_behind_a_block_that_a_drafter_needs(vllm_config: Any, tokens: int) -> None:
    assert versions.reuse_lookahead_tokens(vllm_config) == tokens
