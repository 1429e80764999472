"""Routing populations turned into per-step pairs and active experts, without sampling tokens.

A token of domain d picks expert x of layer l with probability ``share[d, l, x]`` (they sum to
top_k). For a placement this folds into two tables: S[d, l, r], the pairs one token of d puts on
rank r, and A[n, l, r], the expected distinct experts hit on r by n tokens of the run's average
mix. A step then costs one small matrix product and one interpolation (``docs/simulator.md``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gimbal.core.contracts import FloatArray, IntArray, Topology
from gimbal.core.cost.profile import Profile
from gimbal.core.cost.step import expected_active
from gimbal.core.errors import InputError, nearest

GRID = np.unique(np.round(np.geomspace(1, 65536, 49)))
"""Token counts at which A is tabulated; between them it is interpolated in log n."""
NOISE_POOL = 64


@dataclass(frozen=True, slots=True)
class Population:
    """How tokens route.

    Attributes:
        share: [domains, layers, experts] probability that a token picks the expert.
        names: one per domain.
        burstiness: variance of a rank's pairs in one step over the variance independent tokens
            would have; tokens of one prompt route alike, so it exceeds 1.
    """

    share: FloatArray
    names: tuple[str, ...]
    burstiness: float = 2.0


def make_population(
    profile: Profile, domains: int = 4, spread: float = 0.7, own: float = 0.8, seed: int = 0
) -> Population:
    """A synthetic population in the range measured on real models.

    Popularity is log-normal over experts with standard deviation `spread`; a share `own` of its
    variance is the domain's, the rest all domains have in common. The defaults give per-layer
    expert max/mean of 4.7 per domain and a Jensen-Shannon divergence of 0.13 bits between
    domains; the ESFT recordings (deepseek-ai/ESFT @579a7711, four tasks) have 3.3 to 5.6 and
    0.158 (0.101 to 0.198).
    """
    rng = np.random.default_rng(seed)
    model = profile.model
    shape = (model.layers, model.experts)
    common = np.sqrt(1 - own) * rng.standard_normal(shape)
    score = np.sqrt(own) * rng.standard_normal((domains, *shape)) + common
    share = np.exp(spread * score)
    share *= model.top_k / share.sum(axis=2, keepdims=True)
    names = tuple(f"domain-{d}" for d in range(domains))
    return Population(np.minimum(share, 1.0), names)


ROUTINGS = ("domains", "one-domain", "even")


def named_population(name: str, profile: Profile, seed: int = 0) -> Population:
    """The population called `name`; raises InputError for any other.

    ``domains`` is `make_population`'s default; ``one-domain`` the same with one domain, for a
    workload that is one data set; ``even`` has all experts as popular and no noise, for a profile
    whose constants hold the imbalance of the server they were measured on.
    """
    if name == "domains":
        return make_population(profile, seed=seed)
    if name == "one-domain":
        return make_population(profile, domains=1, seed=seed)
    if name == "even":
        model = profile.model
        share = np.full((1, model.layers, model.experts), model.top_k / model.experts)
        return Population(share, ("all",), burstiness=0.0)
    raise InputError(f"unknown routing {name!r}{nearest(name, ROUTINGS)}")


def linear_placement(layers: int, experts: int, topology: Topology) -> IntArray:
    """vLLM's initial map: slot s holds expert s, redundant slots repeat the first experts."""
    return np.tile(np.arange(topology.slots, dtype=np.int32) % experts, (layers, 1))


class RoutingTables:
    """S and A of one placement; rebuilt when the placement or the mix changes."""

    def __init__(
        self, population: Population, placement: IntArray, topology: Topology, mix: FloatArray
    ) -> None:
        """Args: placement [layers, slots]; mix [domains], weights of the domains' tokens."""
        share = population.share
        domains, layers, experts = share.shape
        ranks, per_rank = topology.ranks, topology.slots_per_rank
        replicas = np.zeros((layers, experts))
        rows = np.arange(layers)[:, None]
        np.add.at(replicas, (rows, placement), 1.0)
        per_slot = share[:, rows, placement] / replicas[rows, placement]
        self.pairs = np.ascontiguousarray(
            per_slot.reshape(domains, layers, ranks, per_rank).sum(axis=3)
        )
        weights = mix / mix.sum() if mix.sum() > 0 else np.full(domains, 1 / domains)
        mixed = np.tensordot(weights, per_slot, axes=1)
        self.active = np.stack(
            [expected_active(mixed, n).reshape(layers, ranks, per_rank).sum(axis=2) for n in GRID]
        )
        self.balance = self._balance(weights)

    def _balance(self, weights: FloatArray) -> float:
        load = np.tensordot(weights, self.pairs, axes=1)
        return float(load.mean(axis=1).sum() / load.max(axis=1).sum())

    def leaving(self, ranks_per_source: int) -> FloatArray:
        """[dp, domains, layers] pairs of one token of the domain that leave the engine's ranks."""
        domains, layers, _ = self.pairs.shape
        own = self.pairs.reshape(domains, layers, -1, ranks_per_source).sum(axis=3)
        return np.ascontiguousarray((own.sum(axis=2, keepdims=True) - own).transpose(2, 0, 1))

    def active_at(self, tokens: float) -> FloatArray:
        """[layers, ranks] expected distinct experts hit by so many tokens of the mix."""
        if tokens <= 0:
            return np.zeros(self.active.shape[1:])
        place = float(np.interp(np.log(max(tokens, 1.0)), np.log(GRID), np.arange(len(GRID))))
        lower = min(int(place), len(GRID) - 2)
        weight = place - lower
        return np.asarray((1 - weight) * self.active[lower] + weight * self.active[lower + 1])

    def local_share(self, tokens: FloatArray, topology: Topology) -> float:
        """Share of pairs that stay on their source's ranks; tokens [dp, domains]."""
        owner = np.arange(topology.ranks) // topology.ranks_per_source
        total = local = 0.0
        for source in range(len(tokens)):
            load = np.tensordot(tokens[source], self.pairs, axes=1).sum(axis=0)
            total += load.sum()
            local += load[owner == source].sum()
        return float(local / total) if total else 0.0


def noise_pool(layers: int, ranks: int, seed: int) -> FloatArray:
    """[NOISE_POOL, layers, ranks] standard normals, used in turn for step-to-step noise."""
    return np.random.default_rng(seed).standard_normal((NOISE_POOL, layers, ranks))
