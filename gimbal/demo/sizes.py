"""Sizes of the demo model and the checks that keep it loadable by vLLM's CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

from gimbal.core.errors import InputError
from gimbal.core.numbers import MOST_EXPERTS, MOST_LAYERS, MOST_VOCABULARY

BYTE_TOKENS = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FIRST_WORD_ID = BYTE_TOKENS + len(SPECIAL_TOKENS)
HEAD_DIM = 32
"""Width of one attention head; vLLM's CPU attention kernels take multiples of 32."""
MOST_PARAMETERS = 2**33
"""16 GiB of weights: a demo model that large serves nobody."""
DOMAIN_NAMES = ("ember", "harbor", "meadow", "quartz")


@dataclass(frozen=True, slots=True)
class DemoSizes:
    """Sizes of the demo model; the defaults are the product.

    Attributes:
        seed: of every random draw; the same seed gives the same bytes.
        layers: decoder layers, all of them MoE.
        experts: routed experts per layer.
        top_k: experts per token.
        hidden: width of the residual stream.
        moe_intermediate: width of one expert.
        vocab: tokens, of which 256 are bytes, 3 are special and the rest are words.
        domains: groups of prompts that prefer different experts.
        heads: attention heads of `HEAD_DIM`; kv_heads: key/value heads, both divisible by TP.
        max_position: longest context.
        skew: expert max/mean within one domain that calibration aims at.
        divergence_bits: Jensen-Shannon divergence between two domains that it aims at.
    """

    seed: int = 0
    layers: int = 4
    experts: int = 32
    top_k: int = 4
    hidden: int = 256
    moe_intermediate: int = 128
    vocab: int = 2048
    domains: int = 4
    heads: int = 8
    kv_heads: int = 2
    max_position: int = 32768
    skew: float = 4.0
    divergence_bits: float = 0.155

    @property
    def domain_names(self) -> tuple[str, ...]:
        extra = tuple(f"domain{i}" for i in range(len(DOMAIN_NAMES), self.domains))
        return DOMAIN_NAMES[: self.domains] + extra

    def check(self) -> None:
        """Raises InputError naming the first option that vLLM or the construction cannot take."""
        for name in ("layers", "experts", "top_k", "domains", "heads", "kv_heads", "max_position"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name, most in (
            ("layers", MOST_LAYERS), ("experts", MOST_EXPERTS), ("vocab", MOST_VOCABULARY)
        ):  # fmt: skip
            if getattr(self, name) > most:
                raise InputError(f"{name}: must be at most {most}, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed: must not be negative, got {self.seed}")
        for name in ("hidden", "moe_intermediate"):
            value = getattr(self, name)
            if value < 32 or value % 32:
                raise InputError(
                    f"{name}: vLLM's CPU expert kernel needs a multiple of 32, got {value}"
                )
        if self.top_k >= self.experts:
            raise InputError(f"top_k: must be below experts ({self.experts}), got {self.top_k}")
        if self.heads % self.kv_heads:
            raise InputError(f"kv_heads: must divide heads ({self.heads}), got {self.kv_heads}")
        if self.hidden < 128 or self.domains > self.hidden // 16 or self.domains > HEAD_DIM // 2:
            raise InputError(
                f"hidden: {self.hidden} is too narrow for {self.domains} domains; "
                "needs 128 or more, and at most 16 domains"
            )
        words = self.vocab - FIRST_WORD_ID
        if words < 16 * (self.domains + 1):
            raise InputError(
                f"vocab: {self.vocab} leaves {words} words; {self.domains} domains need "
                f"{FIRST_WORD_ID + 16 * (self.domains + 1)} tokens or more"
            )
        width = 3 * self.experts * self.moe_intermediate + 4 * self.heads * HEAD_DIM
        parameters = self.hidden * (self.layers * width + 2 * self.vocab)
        if parameters > MOST_PARAMETERS:
            raise InputError(
                f"layers, experts, hidden, moe_intermediate, heads, vocab: together {parameters} "
                f"parameters, must be at most {MOST_PARAMETERS}"
            )
        ceiling = self.experts / self.top_k
        if not 1.0 < self.skew < ceiling:
            raise InputError(f"skew: must lie between 1 and {ceiling:g}, got {self.skew:g}")
        if not 0.0 < self.divergence_bits < 1.0:
            raise InputError(
                f"divergence_bits: must lie between 0 and 1, got {self.divergence_bits:g}"
            )
