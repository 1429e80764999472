"""Lengths of texts in tokens, for traces that hold prompts and answers instead of lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.files import require_file
from gimbal.workloads.arrays import guarded

BYTES_PER_TOKEN = 4
"""Of English text in UTF-8 under the vocabularies of today, roughly (OpenAI's rule of thumb)."""


class TokenCounter:
    """Counts the tokens of texts, by a model's tokenizer or by their size.

    Args:
        tokenizer: folder or file of ``tokenizer.json``; None estimates `BYTES_PER_TOKEN`.

    Attributes:
        used: whether any text was counted.
    """

    def __init__(self, tokenizer: Path | None = None) -> None:
        self.used = False
        self._tokenizer = None if tokenizer is None else _load(tokenizer)

    def __call__(self, text: str) -> int:
        """Tokens of `text`, special ones left out; at least one of any text."""
        self.used = True
        if self._tokenizer is not None:
            return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)


def _load(path: Path) -> Any:
    path = path / "tokenizer.json" if path.is_dir() else path
    require_file(path, f"--trace-tokenizer {path}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            "--trace-tokenizer: needs the package tokenizers, which vLLM has"
        ) from None
    return guarded(path, lambda: Tokenizer.from_file(str(path)))
