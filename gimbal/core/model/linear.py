"""Weights of layers that mix tokens without a KV cache: Mamba, linear attention, convolution.

Projections only; convolutions, norms and biases are under a percent of a layer. What such a layer
keeps is a state per request, which does not grow with its tokens.
"""

from __future__ import annotations

from gimbal.core.model.attention import HEAD_CHANNELS, HEADS
from gimbal.core.model.config import ModelConfig


def linear_parameters(config: ModelConfig) -> int:
    """Weights of one layer; raises InputError where no rule here describes it."""
    hidden = config.count("hidden_size")
    if config.get("linear_num_value_heads"):
        return _gated_delta_net(config, hidden)
    delta = config.section("linear_attn_config")
    if delta.values:
        return _kimi_delta(delta, hidden)
    if config.get("conv_L_cache", "conv_dim") is not None:  # LFM2: a short convolution
        return 4 * hidden * hidden
    if config.get("attn_type_list", "layer_group_size") is not None or config.family == "minimax":
        heads = config.count(*HEADS)  # lightning attention: q, k, v, gate, out
        return 5 * hidden * heads * config.count(*HEAD_CHANNELS, default=hidden // heads)
    if config.get("mamba_n_heads", "mamba_num_heads"):
        return _mamba2(config, hidden)
    if config.get("mamba_d_state"):
        return _mamba1(config, hidden)
    raise config.missing(
        "linear_num_value_heads", "linear_attn_config", "mamba_n_heads", "mamba_d_state"
    )


def _gated_delta_net(config: ModelConfig, hidden: int) -> int:
    keys = config.count("linear_num_key_heads") * config.count("linear_key_head_dim")
    heads = config.count("linear_num_value_heads")
    values = heads * config.count("linear_value_head_dim")
    return hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden


def _kimi_delta(config: ModelConfig, hidden: int) -> int:
    channels, heads = config.count("head_dim"), config.count("num_heads")
    inner = heads * channels
    gates = 2 * (hidden * channels + channels * inner)  # of low rank: decay and output
    return 4 * hidden * inner + gates + hidden * heads


def _mamba2(config: ModelConfig, hidden: int) -> int:
    heads = config.count("mamba_n_heads", "mamba_num_heads")
    expand = config.count("mamba_expand", "expand", default=2)
    channels = config.get("mamba_d_head", "mamba_head_dim")
    inner = heads * channels if isinstance(channels, int) else expand * hidden
    groups = config.count("mamba_n_groups", "n_groups", default=1)
    state = config.count("mamba_d_state", "ssm_state_size")
    return hidden * (2 * inner + 2 * groups * state + heads) + inner * hidden


def _mamba1(config: ModelConfig, hidden: int) -> int:
    inner = config.count("mamba_expand", default=2) * hidden
    rank = config.get("mamba_dt_rank")
    rank = rank if isinstance(rank, int) else -(-hidden // 16)  # "auto"
    state = config.count("mamba_d_state")
    return 3 * hidden * inner + inner * (rank + 2 * state) + rank * inner
