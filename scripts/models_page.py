"""Writes docs/models.md: published models and what Gimbal reads from their configurations.

    .venv/bin/python -m scripts.models_page [--check]

The page is made from the table that tests/core/model/test_published.py checks. With --check
nothing is written, and the exit code is 1 when the page is stale.
"""

from __future__ import annotations

import ast
import math
import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gimbal.core.model import Architecture, ModelConfig, read_architecture
from scripts.pages import keep

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "models.md"
TABLE = ROOT / "tests" / "core" / "model" / "published.yaml"

HEAD = """# Models

`gimbal serve`, `gimbal calibrate`, `gimbal bench` and `gimbal place` read a model's shape from its
`config.json` (Mistral: `params.json`) with one reader, `gimbal/core/model`. It needs no weights,
no network and no GPU. Models that also see or hear are read below `text_config`, `llm_config`,
`language_config` or `thinker_config`; ModelOpt's `hf_quant_config.json` is read beside it.

A profile that `gimbal calibrate` writes carries these figures, and `gimbal simulate` takes them
from there, unless `--model` names a model: a folder, a configuration file, or one of
`gimbal/core/model/configs`. `gimbal place` does too, unless `--model-dir` names a model.

- **Layers** by kind: full attention, sliding (or chunked) attention, MLA, and layers without a KV
  cache (Mamba, linear attention, convolution). Speculative layers (MTP) are left out, as vLLM
  leaves them out without speculation.
- **Experts**: routed ones per MoE layer, and how many a token goes to.
- **Bytes of an expert**: weights of one expert of one layer with their block or group scales.
- **KV bytes per token**: all layers together, on one rank that holds all KV heads; at the
  checkpoint's own KV cache dtype where it names one (`--kv-cache-dtype auto`), else 16 bits.
  Layers that look back over a window count as if they kept all tokens.
- **Weights**: billions as computed, and as the model card says; norms, biases and what sees or
  hears are left out.

Every row is checked by a test against figures written out by hand. Its keys are those of the
configuration published in the Hugging Face repository that it names; "see" tells what else was
looked up. That the weights computed from them are those of the model card checks layers, experts
and widths together. Another test compares experts, top-k, layers and heads with what vLLM and
Transformers read.

"""
COLUMNS = (
    "model",
    "layers",
    "experts, top-k",
    "format",
    "bytes of an expert",
    "KV bytes per token",
    "weights, 1e9",
    "see",
)

REFUSED = """
## Refused

What a configuration does not say, or says in a way that is not known here, ends in one line that
names the keys; nothing is guessed. `gimbal serve` counts experts only: where it cannot, vLLM
decides. Besides unknown kinds of layers and quantization methods these are refused:

| model | what it says |
|---|---|
"""

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One row of the table.

    Attributes:
        values: the row as the file has it, formulas worked out.
        config: what the reader gets.
    """

    values: dict[str, Any]
    config: ModelConfig

    @property
    def name(self) -> str:
        return str(self.values["name"])

    @property
    def kv_bytes_per_token(self) -> float:
        return sum(math.prod(term) for term in self.values["kv"])

    @property
    def expert_bytes(self) -> float:
        return math.prod(self.values["expert"]) / 8


def read_table(path: Path = TABLE) -> tuple[list[PublishedModel], list[PublishedModel]]:
    """The models that are read, and those that are refused."""
    with path.open(encoding="utf-8") as file:
        documents = list(yaml.safe_load_all(file))
    read, refused = ([_row(values) for values in rows] for rows in documents)
    return read, refused


def _row(values: dict[str, Any]) -> PublishedModel:
    config = _lists(values["config"])
    if "hf_quant_config" in values:
        config = {**config, "quantization_config": values["hf_quant_config"]}
    for key in ("kv", "expert"):
        if key in values:
            values = {**values, key: _worked_out(values[key])}
    return PublishedModel(values, ModelConfig(config, values["name"]))


def _lists(value: Any) -> Any:
    """`value` with every ``{repeat: [...], times: n}`` as the list it stands for."""
    if isinstance(value, dict):
        if set(value) == {"repeat", "times"}:
            return value["repeat"] * value["times"]
        return {key: _lists(below) for key, below in value.items()}
    return value


def _worked_out(value: Any) -> Any:
    """`value` with every formula, of numbers and + - * /, as the number it comes to."""
    if isinstance(value, list):
        return [_worked_out(item) for item in value]
    return _result(ast.parse(value, mode="eval").body) if isinstance(value, str) else value


def _result(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_result(node.left), _result(node.right))
    assert isinstance(node, ast.Constant)
    return node.value


def page() -> str:
    """The page for the table."""
    read, refused = read_table()
    rows = [_cells(model, read_architecture(model.config)) for model in read]
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    complaints = [f"| {model.name} | `{model.values['message']}` |" for model in refused]
    return HEAD + "\n".join(lines) + "\n" + REFUSED + "\n".join(complaints) + "\n"


def _cells(model: PublishedModel, found: Architecture) -> list[str]:
    kinds = [f"{group.layers} {group.kind}" for group in found.attention]
    kinds += [f"{found.linear_layers} linear"] if found.linear_layers else []
    return [
        model.name,
        f"{', '.join(kinds)}; {found.experts.layers} MoE",
        f"{found.experts.experts}, {found.experts.top_k}",
        found.quantization.parts["experts"].name,
        f"{round(found.expert_bytes):,}",
        f"{round(found.kv_bytes_per_token()):,}",
        f"{found.parameters / 1e9:.1f} ({model.values['total_b']})",
        str(model.values.get("see", "")),
    ]


if __name__ == "__main__":
    sys.exit(keep(OUT, page(), __doc__))
