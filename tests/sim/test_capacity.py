"""The capacity that is found is one: what is below it is sustained, what is above piles up."""

import dataclasses

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.report.arms import get_arm
from gimbal.report.window import Backlog, Growth, Window, backlog_of
from gimbal.sim.capacity import MOST_PROBES, Capacity, find_capacity, known_capacity
from gimbal.sim.cluster import load_cluster
from gimbal.sim.probes import Bed, Probe, probe, replayed, stay_s
from gimbal.sim.routing import make_population
from gimbal.workloads import WorkloadOptions
from gimbal.workloads.trace import TraceRequest, make_trace

CLUSTER, PROFILE = load_cluster("h100x4-paper")
BED = Bed(CLUSTER, PROFILE, make_population(PROFILE), get_arm("vllm-no-eplb"))


def poisson(outputs: int, count: int = 500):
    rng = np.random.default_rng(0)
    rows = [TraceRequest(t, 4000, outputs) for t in np.cumsum(rng.exponential(1.0, count))]
    return make_trace("poisson", rows)


def test_prefill_alone_has_the_capacity_of_a_queue_that_is_never_empty():
    trace = poisson(1)
    found = find_capacity(BED, replayed(trace), requests=500)
    at_once = dataclasses.replace(
        trace, requests=tuple(dataclasses.replace(r, arrival_s=0.0) for r in trace.requests)
    )
    run = BED.simulate(at_once).run()
    assert found.rate_rps == pytest.approx(len(trace) / run.duration_s, rel=0.1)


def test_below_it_the_backlog_is_bounded_and_above_it_is_not():
    traffic = replayed(poisson(150))
    found = find_capacity(BED, traffic, requests=500)
    assert all(0 < stay < 60 and rate <= found.rate_rps for rate, stay in found.stays)
    assert found.stay_s(0.01) == found.stays[0][1] < found.stay_s(1e6) == found.stays[-1][1]
    for load, bounded in ((0.8, True), (1.25, False)):
        rate = load * found.rate_rps
        run = BED.simulate(traffic(rate, round(rate * 120))).run(until_s=120.0)
        assert backlog_of([run.records], Window(60.0, 120.0)).bounded == bounded


def test_a_probe_lasts_as_long_as_requests_stay():
    traffic = replayed(poisson(600))
    alone_s = BED.simulate(traffic(1.0, 1)).run().duration_s
    stay = stay_s(BED, traffic, 4.0)
    assert alone_s < stay < 3 * alone_s
    assert not probe(BED, traffic, 4.0, alone_s).settled


def test_what_was_found_is_kept_and_what_cannot_be_read_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    searched = []

    def search(bed, traffic, say):
        searched.append(bed.arm.name)
        return Capacity(float(len(searched)), ((1.0, 1.5),))

    monkeypatch.setattr("gimbal.sim.capacity.find_capacity", search)
    trace = poisson(1, 3)

    def asked(bed=BED, trace=trace, **options):
        return known_capacity(bed, replayed(trace), trace, WorkloadOptions(**options)).rate_rps

    assert [asked(), asked()] == [1.0, 1.0]
    (kept,) = tmp_path.rglob("*.json")
    bad = '{"rate_rps": 1, "stays": [[1, -1]]}', '{"rate_rps": 1, "stays": 3}'
    for text in ("", "{}", '{"rate_rps": "x"}', '{"rate_rps": 1, "stays": []}', *bad):
        kept.write_text(text)
        assert asked() == len(searched)
    longer = dataclasses.replace(CLUSTER, max_num_seqs=8)
    others = [
        asked(dataclasses.replace(BED, cluster=longer)),
        asked(dataclasses.replace(BED, arm=get_arm("gimbal-dp"))),
        asked(dataclasses.replace(BED, seed=1)),
        asked(trace=poisson(2, 3)),
        asked(max_output=5),
    ]
    assert len(set(others)) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # nowhere to keep it
    assert asked() == len(searched)


def test_a_cluster_that_sustains_nothing_is_no_endless_search(monkeypatch):
    rates = []

    def never(bed, traffic, rate_rps, span_s, **limits):
        rates.append(rate_rps)
        grows, still = Growth(0.5, 0.0, 0.1), Growth(0.0, 0.0, 0.0)
        return Probe(rate_rps, span_s, Backlog(grows, still, 1.0), 1.0)

    monkeypatch.setattr("gimbal.sim.capacity.settled_probe", never)
    with pytest.raises(InputError, match=r"no rate above .* has a bounded backlog"):
        find_capacity(BED, replayed(poisson(1, 20)), requests=20)
    assert rates == [rates[0] / 2**i for i in range(MOST_PROBES)]
