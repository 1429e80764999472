"""How tokens reach experts, as far as placement is concerned, and how replicas are chosen."""

from __future__ import annotations

ROUTED_BACKEND = "all2all"
"""Tokens travel only to the ranks that hold their experts (DeepEP, NIXL-EP, pplx)."""
GATHER_BACKEND = "allgather_reducescatter"
"""Every rank receives every token: where experts sit saves no byte, the comm term is zero."""
BACKENDS = (ROUTED_BACKEND, GATHER_BACKEND)

REPLICA_CHOICES = ("near", "even")
"""Nearest replica first within balance, or vLLM's hash."""
