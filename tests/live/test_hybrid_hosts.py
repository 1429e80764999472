"""Hybrid balancing over two hosts: an API server and two engines on each, that step together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gimbal.commands.stats import fetch
from gimbal.demo.manifest import load_manifest
from tests.live.client import burst, call
from tests.live.test_hosts import MOVE_TIMEOUT_S, Hosts, said, two_hosts
from tests.live.test_placement import load

pytestmark = [pytest.mark.live, pytest.mark.hosts, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hybrid(server_pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    server_pool.stop()
    with two_hosts(tmp_path_factory.mktemp("hybrid"), hybrid=True) as running:
        yield running


def test_each_host_of_hybrid_balancing_dispatches_between_its_own_engines(hybrid: Hosts) -> None:
    for host, ranks in ((hybrid.head, [0, 1]), (hybrid.node, [2, 3])):
        burst(host, 8)  # the first rows come
        burst(host, 24)
        status = call(f"{host.root}/gimbal/status")
        assert [engine["engine"] for engine in status["engines"]] == ranks
        chosen = {d["engine"]: d["count"] for d in status["dispatch"]["decisions"]}
        assert sorted(chosen) == ranks, chosen
        reasons = {d["reason"] for d in status["dispatch"]["decisions"]}
        assert reasons == {"policy"}, reasons
        routing = fetch(host.root, timeout_s=60.0)
        assert routing.metadata["answered"] == ranks
        assert len(routing.counts) == 2


def test_control_of_hybrid_balancing_is_each_hosts_own(hybrid: Hosts) -> None:
    call(f"{hybrid.head.root}/gimbal/control", {"queue_ordering": "sjf"})
    for host in (hybrid.head, hybrid.node):
        burst(host, 8)
    said(hybrid, hybrid.head, "Gimbal: queue ordering sjf", work=True)
    assert "Gimbal: queue ordering sjf" not in hybrid.node.log.read_text(errors="replace")
    call(f"{hybrid.node.root}/gimbal/control", {"queue_ordering": "hrrn"})
    burst(hybrid.node, 8)
    said(hybrid, hybrid.node, "Gimbal: queue ordering hrrn", work=True)


def test_experts_move_between_the_hosts_of_hybrid_balancing(hybrid: Hosts) -> None:
    from gimbal.vllm_plugin.serve.plan import demo_model

    manifest, rng = load_manifest(demo_model()), np.random.default_rng(0)
    deadline_s = time.monotonic() + MOVE_TIMEOUT_S
    name = "gimbal_placement_moved_experts_total"
    while not all(host.total(name) for host in (hybrid.head, hybrid.node)):
        assert time.monotonic() < deadline_s, "no experts moved"
        for host in (hybrid.head, hybrid.node):
            load(host, manifest, rng)
