"""KV caches on their way from prefill engines to decode engines."""

from __future__ import annotations

from gimbal.core.cost.profile import Profile
from gimbal.sim.cluster import Cluster, KvTransfer


class KvLinks:
    """The network between the engines: each sends, and each receives, one prompt after another.

    What transfers share of a network card they share in turns: the last of them ends when it does
    in vLLM, which reads all at once.

    Args:
        cluster: with prefill apart.
        profile: of its decode engines.
        sources, targets: engines of either kind; fewer than there are stand for a pool of all.
    """

    def __init__(self, cluster: Cluster, profile: Profile, sources: int, targets: int) -> None:
        assert cluster.prefill is not None
        transfer = cluster.kv_transfer or KvTransfer()
        card = profile.interconnect.other_node_bytes_per_us
        gb_per_s = transfer.gb_per_s
        rates = [
            (1e3 * gb_per_s or card * group.tp) * group.dp / engines
            for group, engines in ((cluster.prefill, sources), (cluster, targets))
        ]
        self._us_per_token = profile.model.kv_bytes_per_token / min(rates)
        self._latency_us = transfer.latency_us
        self._source_free_us = [0.0] * sources
        self._target_free_us = [0.0] * targets

    def send(self, source: int, target: int, tokens: int, now_us: float) -> float:
        """When the KV of `tokens` that engine `target` asks for at `now_us` has come."""
        begin_us = max(now_us, self._source_free_us[source], self._target_free_us[target])
        sent_us = begin_us + self._us_per_token * tokens
        self._source_free_us[source] = self._target_free_us[target] = sent_us
        return sent_us + self._latency_us
