"""How many bytes a weight takes, part by part, from ``quantization_config``.

Block and group scales are counted: FP8 in blocks of 128 x 128 has one float each, MXFP4 one byte
per 32 weights (OCP Microscaling Formats 1.0), NVFP4 one per 16, AWQ and GPTQ a half and a zero
point per group. A part that the configuration excludes from quantization keeps 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate

from gimbal.core.errors import InputError
from gimbal.core.model.config import QUANTIZATION, ModelConfig
from gimbal.core.model.experts import BESIDE
from gimbal.core.model.layers import DENSE, FULL, LINEAR, MOE, SLIDING, Layers
from gimbal.core.numbers import as_whole, shown

EXCLUDED = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "exclude")
PREFIXES = (
    "model.layers.{}",
    "language_model.model.layers.{}",
    "model.language_model.layers.{}",
    "backbone.layers.{}",
    "layers.{}",
)
MLPS = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "ffn", "moe")
BESIDE_MLP = ("experts.0.up_proj", "moe.experts.0.up_proj")
"""Experts of a family whose layers have a dense MLP besides."""
PARTS = {
    "experts": tuple(f"{mlp}.experts.0.up_proj" for mlp in MLPS),
    "shared": tuple(
        f"{mlp}.{name}.up_proj"
        for mlp in MLPS
        for name in ("shared_experts", "shared_expert", "share_expert")
    ),
    "dense": tuple(f"{mlp}.up_proj" for mlp in MLPS),
    "attention": tuple(
        f"{mixer}.{name}"
        for mixer in ("self_attn", "attn", "attention", "mixer")
        for name in ("q_proj", "q_a_proj", "qkv_proj", "o_proj")
    ),
    "linear": tuple(
        f"{mixer}.{name}"
        for mixer in ("linear_attn", "mixer", "mamba", "self_attn", "attention")
        for name in ("in_proj", "in_proj_qkv", "in_proj_qkvz", "out_proj")
    ),
}
"""Modules that stand for a part, as checkpoints name them within a layer."""
UNKNOWN = "how many bytes a weight takes is not known here"
MOST_EXCLUDED, MOST_WILDCARDS = 100_000, 6


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight is stored and multiplied.

    Attributes:
        bytes_per_weight: scales included.
        activation_bits: of what it is multiplied with: 16 for weight-only formats.
    """

    name: str
    bytes_per_weight: float
    activation_bits: int = 16


BF16 = Format("bf16", 2.0)
FP8 = Format("fp8", 1.0, 8)
MXFP8 = Format("mxfp8", 1 + 1 / 32, 8)
MXFP4 = Format("mxfp4", 0.5 + 1 / 32)
NVFP4 = Format("nvfp4", 0.5 + 1 / 16, 4)
MODELOPT = {
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8,
    "FP8_PB_WO": Format("fp8", 1 + 4 / 128**2),
    "MXFP8": MXFP8,
    "NVFP4": NVFP4,
    "W4A16_NVFP4": Format("nvfp4", 0.5 + 1 / 16),
    "MXFP4": MXFP4,
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """The format of every part, and of the KV cache.

    Attributes:
        parts: "experts", "shared", "dense", "attention" and "linear".
        kv_bytes: of one cached number where the checkpoint says so; None: as wide as activations.
    """

    parts: Mapping[str, Format]
    kv_bytes: float | None


def read_quantization(config: ModelConfig, layers: Layers) -> Quantization:
    """The formats of a language model's weights; raises InputError for a method not known here."""
    values = config.get(*QUANTIZATION)
    if values is None:
        return Quantization(dict.fromkeys(PARTS, BF16), None)
    if not isinstance(values, Mapping):
        raise InputError(f"{config.where}: quantization_config: expected an object")
    inner = values.get("quantization")  # hf_quant_config.json
    if isinstance(inner, Mapping):
        values = {"quant_method": "modelopt", **inner}
    found = ModelConfig(values, f"{config.where}: quantization_config")
    looked_at = _parts(found.where, layers, config.family in BESIDE)
    parts = {part.name: _format(found, part) for part in looked_at}
    if config.get("expert_dtype") == "fp4" and parts["experts"].name == "fp8":  # DeepSeek-V4
        parts["experts"] = MXFP4
    return Quantization(parts, _kv_bytes(found))


@dataclass(frozen=True, slots=True)
class _Part:
    """Names that modules of a part have in a layer that has them; `where` is for complaints."""

    where: str
    name: str
    layer: int
    modules: tuple[str, ...]


def _parts(where: str, layers: Layers, beside: bool) -> list[_Part]:
    """Every part, in a layer amid those that have it: some checkpoints spare the first and last."""
    kinds = {
        "experts": (layers.mlps, (MOE,)),
        "shared": (layers.mlps, (MOE,)),
        "dense": (layers.mlps, (DENSE,)),
        "attention": (layers.mixers, (FULL, SLIDING)),
        "linear": (layers.mixers, (LINEAR,)),
    }
    found = []
    for part, (of_layer, wanted) in kinds.items():
        having = [layer for layer, kind in enumerate(of_layer) if kind in wanted]
        layer = having[len(having) // 2] if having else 0
        names = BESIDE_MLP if beside and part == "experts" else PARTS[part]
        modules = [f"{prefix.format(layer)}.{name}" for prefix in PREFIXES for name in names]
        found.append(_Part(where, part, layer, tuple(modules)))
    return found


def _format(found: ModelConfig, part: _Part) -> Format:
    method = str(found.get("quant_method", "qformat_weight", "quant_algo")).lower()
    method = method.replace("_", "-")
    if _names(_excluded(found), part):
        return BF16
    if method in ("mxfp4", "gpt-oss-mxfp4", "experts-int8"):  # of experts alone
        quantized = MXFP4 if "mxfp4" in method else Format("int8", 1.0)
        return quantized if part.name == "experts" else BF16
    if method.startswith("modelopt") or found.get("quant_algo"):
        return _modelopt(found, part)
    if method in ("fp8", "fbgemm-fp8", "fp8-e4m3"):
        return _fp8(found)
    if method == "mxfp8":
        return MXFP8
    if method in ("awq", "gptq", "auto-round", "awq-marlin", "gptq-marlin", "moe-wna16", "inc"):
        return _grouped(found.count("bits"), _group(found))
    if method == "compressed-tensors":
        return _compressed(found, part)
    if method == "quark":
        return _quark(found)
    raise InputError(f"{found.where}: quant_method={shown(method)}: {UNKNOWN}")


def _fp8(found: ModelConfig) -> Format:
    block = found.get("weight_block_size")
    if block is None:
        return FP8
    sizes = [as_whole(side) for side in block] if isinstance(block, list) else [None]
    if len(sizes) != 2 or not all(sizes):
        raise InputError(f"{found.where}: weight_block_size={shown(block)}: expected two sizes")
    return Format("fp8", 1 + 4 / (sizes[0] * sizes[1]), 8)  # type: ignore[operator]


def _group(found: ModelConfig) -> int:
    """Weights that share a scale; 0 for a whole channel."""
    size = found.get("group_size", "q_group_size")
    return 0 if size in (None, -1) else found.count("group_size", "q_group_size")


def _grouped(bits: int, group: int) -> Format:
    scales = (16 + bits) / group if group else 0.0
    return Format(f"int{bits}", (bits + scales) / 8)


def _modelopt(found: ModelConfig, part: _Part) -> Format:
    own = ("moe_quant_algo",) if part.name == "experts" else ()
    algorithm = str(found.get(*own, "quant_algo")).upper()
    if algorithm == "MIXED_PRECISION":
        layers = found.section("quantized_layers")
        named = [name for name in layers.values if _names([name], part)]
        if not named:
            return BF16
        algorithm = str(layers.section(named[0]).get("quant_algo")).upper()
    if algorithm not in MODELOPT:
        raise InputError(
            f"{found.where}: quant_algo={shown(algorithm)}: bytes per weight not known"
        )
    return MODELOPT[algorithm]


def _compressed(found: ModelConfig, part: _Part) -> Format:
    """Of compressed-tensors: the first group whose targets name the part, or all linear layers."""
    groups = found.section("config_groups")
    general = None
    for name in groups.values:
        group = groups.section(name)
        listed = group.get("targets")
        targets = [str(target) for target in listed] if isinstance(listed, list) else ["Linear"]
        if _names([t for t in targets if "." in t or t.startswith("re:")], part):
            return _weights(group)
        if general is None and any("." not in target for target in targets):
            general = group
    return BF16 if general is None else _weights(general)


def _weights(group: ModelConfig) -> Format:
    weights = group.section("weights")
    bits, kind = weights.count("num_bits", most=16), str(weights.get("type"))
    activations = group.section("input_activations")
    narrow = activations.count("num_bits", default=16, most=16)
    if kind == "float" and bits == 4:
        by_scale = MXFP4 if _group(weights) == 32 else NVFP4
        return Format(by_scale.name, by_scale.bytes_per_weight, narrow)
    if weights.get("block_structure"):
        scales = 32 / 128**2
    else:
        scales = 16 / _group(weights) if _group(weights) else 0.0
        scales += bits / _group(weights) if _group(weights) and not weights.get("symmetric") else 0
    return Format(f"{'fp' if kind == 'float' else 'int'}{bits}", (bits + scales) / 8, narrow)


def _quark(found: ModelConfig) -> Format:
    overall = found.section("global_quant_config")
    weight, inputs = overall.section("weight"), overall.section("input_tensors")
    formats = {"fp4": MXFP4, "fp8_e4m3": FP8, "int4": _grouped(4, _group(weight))}
    kind = str(weight.get("dtype"))
    if kind not in formats:
        raise InputError(f"{found.where}: weight.dtype={shown(kind)}: {UNKNOWN}")
    narrow = {"fp4": 4, "fp8_e4m3": 8}.get(str(inputs.get("dtype")), 16)
    return Format(formats[kind].name, formats[kind].bytes_per_weight, narrow)


def _kv_bytes(found: ModelConfig) -> float | None:
    """Of one cached number, as vLLM resolves ``--kv-cache-dtype auto`` by the checkpoint."""
    scheme = found.get("kv_cache_scheme", "kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        bits = as_whole(scheme.get("num_bits"))
        return None if bits is None else {8: 1.0, 4: NVFP4.bytes_per_weight}.get(bits)
    return {"fp8": 1.0, "nvfp4": NVFP4.bytes_per_weight}.get(str(scheme).lower())


def _excluded(found: ModelConfig) -> list[str]:
    listed = found.get(*EXCLUDED)
    entries = listed if isinstance(listed, list) else []
    if len(entries) > MOST_EXCLUDED:
        raise InputError(f"{found.where}: {len(entries)} modules left out: too many to read")
    negative = [key for key in found.section("dynamic").values if key.startswith("-:")]  # GPTQModel
    return [str(entry) for entry in entries] + [f"re:{key[2:]}" for key in negative]


def _names(entries: Iterable[str], part: _Part) -> bool:
    """Whether one of `entries`, names, wildcards or regular expressions, names the part."""
    patterns = [_pattern(e, part.where) for e in set(entries) if _may_be_of(e, part.layer)]
    return any(pattern.match(module) for pattern in patterns for module in part.modules)


def _may_be_of(entry: str, layer: int) -> bool:
    """Whether `entry` speaks of no other layer: most lists name every layer by itself."""
    found = re.search(r"layers\.(\d+)", entry)
    return found is None or found[1] == str(layer)


def _pattern(entry: str, where: str) -> re.Pattern[str]:
    """What `entry` stands for: whole components of a module's name, with all below them."""
    if not entry.startswith("re:"):
        middle = translate(entry.strip(".")).removeprefix("(?s:").removesuffix(r")\Z")
        return re.compile(rf"(?s:(.*\.)?(?:{middle})(\..*)?)\Z")
    if len(re.findall(r"[*+{]", entry)) > MOST_WILDCARDS:
        raise InputError(f"{where}: {shown(entry)}: too many wildcards to match")
    try:
        return re.compile(entry[3:])
    except re.error as error:
        raise InputError(f"{where}: {shown(entry)}: {error}") from None
