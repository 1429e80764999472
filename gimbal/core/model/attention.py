"""Layers with a KV cache: what they cache of a token, and their weights.

- Multi-head attention with any number of KV heads caches K and V of every KV head.
- MLA caches one latent and one rotary key per token, whatever the number of heads (DeepSeek-V2,
  arXiv 2405.04434). vLLM does so for the families of `MLA`; others it serves as multi-head.
- DeepSeek-V3.2's sparse attention caches 8-bit keys of its indexer besides, with one float per 128
  of them (vLLM 0.33, `DeepseekV32IndexerCache`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gimbal.core.errors import InputError
from gimbal.core.model.config import ModelConfig
from gimbal.core.model.layers import FULL, NONE, SLIDING, Layers
from gimbal.core.numbers import shown

MLA_LAYERS = "mla"
MLA = (
    "axk1",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots3_note",
    "glm4_moe_lite",
    "glm5_next",
    "glm5_next_text",
    "glm_moe_dsa",
    "kimi_k2",
    "kimi_linear",
    "longcat_flash",
    "pangu_ultra_moe",
)
"""Model types whose latent vLLM caches (0.33, `ModelArchConfigConvertorBase.is_deepseek_mla`)."""
COMPRESSED = ("compress_ratios", "sparse_attention_config")
"""Caches that no rule here describes: DeepSeek-V4 and MiniMax-M3."""
INDEX_GROUP, SCALE_BYTES = 128, 4
HEADS = ("num_attention_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_attention_groups", "num_kv_heads", "multi_query_group_num")
HEAD_CHANNELS = ("head_dim", "attention_head_dim", "kv_channels")
WINDOW = ("sliding_window", "sliding_window_size", "attention_chunk_size")
Projection = tuple[int, int, bool]
"""Channels in, channels out, and whether tensor parallelism splits it."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Layers of one kind.

    Attributes:
        kind: "full", "sliding" or "mla".
        layers: how many there are.
        heads, kv_heads: query heads, and heads that are cached (1 for MLA).
        prefill_channels, decode_channels: of one query head and one cached token, summed over
            scores and values; MLA decodes on the latent itself.
        cached_values: numbers cached per token in one layer, of all KV heads.
        index_bytes: bytes cached per token for an indexer, on the mean over the layers.
        window_tokens: tokens that a decode reads at most; None for all.
        projections: of one layer.
    """

    kind: str
    layers: int
    heads: int
    kv_heads: int
    prefill_channels: int
    decode_channels: int
    cached_values: int
    index_bytes: float
    window_tokens: int | None
    projections: tuple[Projection, ...]

    @property
    def parameters(self) -> int:
        """Weights of one layer."""
        return sum(inputs * outputs for inputs, outputs, _ in self.projections)

    def rank_values(self, tp: int) -> float:
        """`cached_values` that one of `tp` ranks holds: a KV head is not split."""
        return self.cached_values * max(1, self.kv_heads // tp) / self.kv_heads


def read_attention(config: ModelConfig, layers: Layers) -> tuple[Attention, ...]:
    """The layers that cache, by kind; raises InputError that names the keys looked for."""
    for name in COMPRESSED:
        if config.get(name):
            raise InputError(f"{config.where}: {name}: what its KV cache holds is not known here")
    twice = 2 if config.family.startswith("longcat") else 1  # two attentions in each layer
    kinds = Counter(_own_cache(config, layers.mixers))
    found = []
    for kind in (FULL, SLIDING):
        if kinds[kind]:
            is_mla = kind == FULL and _is_mla(config)
            read = _latent if is_mla else _multi_head
            found.append(read(config, kind, kinds[kind] * twice))
    return tuple(found)


def _own_cache(config: ModelConfig, mixers: tuple[str, ...]) -> tuple[str, ...]:
    """The mixers without the last layers that read the cache of earlier ones (Gemma)."""
    shared = config.count("num_kv_shared_layers", default=0, least=0, most=len(mixers))
    return mixers[: len(mixers) - shared] + (NONE,) * shared


def _is_mla(config: ModelConfig) -> bool:
    """Whether the latent is cached; raises InputError for a family of which that is not known."""
    if not config.get("kv_lora_rank") or config.get("use_mla") is False:
        return False
    if config.family in MLA:
        return True
    raise InputError(
        f"{config.where}: model_type={shown(config.family)} with kv_lora_rank: not known whether "
        "vLLM caches the latent"
    )


def _latent(config: ModelConfig, kind: str, layers: int) -> Attention:
    hidden, heads = config.count("hidden_size"), config.count(*HEADS)
    rank, rope = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    nope, value = config.count("qk_nope_head_dim"), config.count("v_head_dim")
    query = config.count("q_lora_rank", default=0, least=0)
    projections: list[Projection] = [(hidden, query + rank + rope, False)]
    projections.append((query or hidden, heads * (nope + rope), True))
    projections += [(rank, heads * (nope + value), True), (heads * value, hidden, True)]
    return Attention(
        kind=MLA_LAYERS,
        layers=layers,
        heads=heads,
        kv_heads=1,
        prefill_channels=nope + rope + value,
        decode_channels=2 * rank + rope,
        cached_values=rank + rope,
        index_bytes=_index_bytes(config, layers),
        window_tokens=config.count("index_topk", default=0, least=0) or None,
        projections=tuple(projections),
    )


def _index_bytes(config: ModelConfig, layers: int) -> float:
    """Of sparse attention, where some layers may share the choice of another (GLM-5.2)."""
    if not config.get("index_topk"):
        return 0.0
    channels = config.count("index_head_dim")
    own = channels + channels // INDEX_GROUP * SCALE_BYTES
    types = config.entries("indexer_types")
    if types:
        return own * types.count("full") / len(types)
    every = config.count("index_topk_freq", default=1)
    if every == 1:
        return float(own)
    offset = config.count("index_skip_topk_offset", default=2, least=0)
    full = sum(max(layer - offset + 1, 0) % every == 0 for layer in range(layers))
    return own * full / layers


def _multi_head(config: ModelConfig, kind: str, layers: int) -> Attention:
    hidden = config.count("hidden_size")
    own = _other_setting(config, kind)
    heads = own.count(*HEADS)
    kv_heads = own.count(*KV_HEADS, default=heads)
    channels = own.count(*HEAD_CHANNELS, default=max(1, hidden // heads))
    value = own.count("v_head_dim", default=channels)
    query = config.count("share_q_dim", default=0, least=0)  # Step-3 factorizes its queries
    inputs: list[Projection] = [(hidden, (heads + kv_heads) * channels + kv_heads * value, True)]
    if query:
        inputs = [(hidden, query + kv_heads * (channels + value), False)]
        inputs.append((query, heads * channels, True))
    window = config.count(
        "sliding_window", "sliding_window_size", "attention_chunk_size", default=0
    )
    if kind == SLIDING and not window:
        raise config.missing("sliding_window", "sliding_window_size", "attention_chunk_size")
    return Attention(
        kind=kind,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        prefill_channels=channels + value,
        decode_channels=channels + value,
        cached_values=kv_heads * (channels + value),
        index_bytes=0.0,
        window_tokens=config.count(*WINDOW) if kind == SLIDING else None,
        projections=(*inputs, (heads * value, hidden, True)),
    )


def _other_setting(config: ModelConfig, kind: str) -> ModelConfig:
    """`config` with the heads of layers of `kind`, where they differ from the others."""
    setting = config.section("attention_other_setting")  # Step-3.5
    if kind == SLIDING and setting.get("attention_type") == "sliding_attention":
        values = {key: value for key, value in setting.values.items() if value is not None}
        return ModelConfig({**config.values, **values}, config.where)
    if kind == SLIDING:  # MiMo-V2
        prefixed = {
            key.removeprefix("swa_"): value
            for key, value in config.values.items()
            if key.startswith("swa_") and value is not None
        }
        return ModelConfig({**config.values, **prefixed}, config.where)
    names = {  # Gemma-4
        "num_global_key_value_heads": "num_key_value_heads",
        "global_head_dim": "head_dim",
    }
    own = {names[key]: value for key, value in config.values.items() if key in names and value}
    return ModelConfig({**config.values, **own}, config.where)
