"""Prefill and decode apart: nothing is lost, KV blocks are conserved, times add up."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gimbal.core.errors import InputError
from gimbal.core.queue import ORDERINGS
from gimbal.core.snapshot import Field
from gimbal.report.arms import get_arm
from gimbal.sim.capacity import BURST_REQUESTS, crude_rate
from gimbal.sim.cells import Cell, run_cell
from gimbal.sim.cluster import KvTransfer, described, load_cluster, profile_of
from gimbal.sim.policies import policies_of
from gimbal.sim.probes import Bed
from gimbal.sim.requests import SimRequest
from gimbal.sim.roles import DecodeEngine, PrefillEngine
from gimbal.sim.routing import make_population
from gimbal.sim.run import Simulation
from gimbal.sim.signals import Signals
from gimbal.sim.transfer import KvLinks
from gimbal.workloads.trace import TraceRequest, make_trace

CLUSTER, PROFILE = load_cluster("h100x8-pd-4p4d")
POPULATION = make_population(PROFILE)
AT_ONCE = KvTransfer(math.inf, 0.0)


def sized(prefill, decode, kv_tokens=0, transfer=AT_ONCE, **settings):
    """So many engines of either kind; all have the profile of four."""
    values = {"kv_tokens": kv_tokens, "slots_per_rank": 32 * 4, **settings}
    return dataclasses.replace(
        CLUSTER,
        dp=decode,
        prefill=dataclasses.replace(CLUSTER.prefill, dp=prefill, **values),
        kv_transfer=transfer,
        **values,
    )


def drained(simulation, now_us=1e15):
    """KV blocks in use of every engine once all transfers have been heard of."""
    for group in simulation.groups:
        group.deliver(now_us)
    return [engine.used_blocks for group in simulation.groups for engine in group.engines]


rows = st.lists(
    st.tuples(
        st.floats(0.0, 2.0),
        st.integers(1, 900),
        st.integers(1, 60),
        st.lists(st.integers(0, 5), max_size=4, unique=True),
    ),
    min_size=1,
    max_size=25,
)


@given(
    rows,
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1000, 1600, 100_000]),
    st.sampled_from([AT_ONCE, KvTransfer(0.5, 3000.0)]),
    st.sampled_from(["vllm", "gimbal-dp", "dynamo", "ideal-pool"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_request_and_no_block_is_lost(rows, prefill, decode, kv_tokens, transfer, arm, late):
    requests = [
        TraceRequest(at, max(prompt, 64 * len(prefix)), output, prefix_blocks=tuple(sorted(prefix)))
        for at, prompt, output, prefix in sorted(rows)
    ]
    trace = make_trace("t", requests, prefix_block_tokens=64)
    cluster = sized(prefill, decode, kv_tokens, transfer, async_scheduling=late, enable_eplb=False)
    simulation = Simulation(trace, cluster, PROFILE, POPULATION, get_arm(arm))
    result = simulation.run()
    assert [r.status for r in result.records] == ["ok"] * len(requests)
    assert [r.output_tokens for r in result.records] == [r.output_tokens for r in requests]
    assert drained(simulation) == [0] * len([e for g in simulation.groups for e in g.engines])
    sent, first = (
        np.array([getattr(r, f"{k}_s") for r in result.records]) for k in ("sent", "first_token")
    )
    assert (result.prefill_s > 0).all()
    assert (result.kv_wait_s >= transfer.latency_us / 1e6).all()
    assert (sent + result.prefill_s + result.kv_wait_s < first).all()
    for group in simulation.groups:
        assert group.dispatcher.ledger.inflight.sum() == 0
    loads = simulation.answering.engines[0].loads
    assert (loads.awaiting, loads.awaited_tokens, loads.held_tokens) == (0, 0, 0)


def test_with_one_engine_each_and_no_network_prefill_is_that_of_the_engine_alone():
    """A client's first token is one step of the decode engine later: it comes from there."""
    rng = np.random.default_rng(4)
    arrivals = np.cumsum(rng.exponential(0.05, 200))
    prompts = rng.integers(1, 3000, 200)
    rows = [TraceRequest(float(a), int(p), 30) for a, p in zip(arrivals, prompts, strict=True)]
    apart = sized(1, 1, enable_eplb=False)
    both = Simulation(make_trace("t", rows), apart, PROFILE, POPULATION, get_arm("vllm")).run()
    ones = make_trace("t", [dataclasses.replace(row, output_tokens=1) for row in rows])
    profile = profile_of(apart.prefill)
    alone = Simulation(ones, apart.prefill, profile, POPULATION, get_arm("vllm")).run()
    ttft_s = [r.first_token_s - r.sent_s for r in alone.records]
    assert both.prefill_s == pytest.approx(ttft_s, rel=1e-12)
    rest_s = np.array([r.first_token_s - r.sent_s for r in both.records]) - both.prefill_s
    # On its way to the decode engine, until a step asks for its KV, and the step of its last token.
    assert (rest_s > PROFILE.api_us / 1e6).all()
    assert (rest_s < 5 * both.step_us.max() / 1e6 + 2 * PROFILE.api_us / 1e6).all()


def test_decodes_are_not_held_up_by_prefill():
    rows = [TraceRequest(0.0, 64, 400), *(TraceRequest(0.5 + i / 10, 8000, 2) for i in range(20))]
    cluster = sized(1, 1, enable_eplb=False)
    apart = Simulation(make_trace("t", rows), cluster, PROFILE, POPULATION, get_arm("vllm")).run()
    together = dataclasses.replace(cluster, prefill=None, kv_transfer=None)
    mixed = Simulation(make_trace("t", rows), together, PROFILE, POPULATION, get_arm("vllm")).run()
    assert apart.step_us.max() < 0.2 * mixed.step_us.max()


def test_a_network_shows_in_the_waiting_for_kv():
    rows = [TraceRequest(0.0, 8000, 4)] * 3
    trace = make_trace("t", rows)
    slow = sized(1, 1, transfer=KvTransfer(10.0, 500.0), enable_eplb=False)
    waits = Simulation(trace, slow, PROFILE, POPULATION, get_arm("vllm")).run().kv_wait_s
    one_s = 8000 * PROFILE.model.kv_bytes_per_token / 10e9
    assert waits.min() >= one_s + 500e-6
    # Not more at a time: of prompts that are done at once the last waits for all.
    links = KvLinks(slow, PROFILE, 1, 1)
    ends = [links.send(0, 0, 8000, 0.0) for _ in range(3)]
    assert ends == pytest.approx([1e6 * one_s * i + 500.0 for i in (1, 2, 3)])
    two = KvLinks(
        dataclasses.replace(slow, dp=2, prefill=dataclasses.replace(slow.prefill, dp=2)),
        PROFILE,
        2,
        2,
    )
    assert two.send(0, 0, 8000, 0.0) == two.send(1, 1, 8000, 0.0)
    pool = KvLinks(sized(2, 2, transfer=KvTransfer(10.0)), PROFILE, 1, 1)
    assert pool.send(0, 0, 8000, 0.0) == pytest.approx(1e6 * one_s / 2)
    card = KvLinks(sized(1, 1, transfer=KvTransfer()), PROFILE, 1, 1)
    bytes_per_us = PROFILE.interconnect.other_node_bytes_per_us
    assert card.send(0, 0, 1000, 0.0) == pytest.approx(
        1000 * PROFILE.model.kv_bytes_per_token / bytes_per_us
    )


def make(kind, blocks=40, **kwargs):
    return kind(0, 16, 8, blocks, 4, ORDERINGS.build("fcfs"), **kwargs)


def test_a_decode_engine_allocates_loads_and_computes_the_last_token():
    engine = make(DecodeEngine, blocks=16)
    signals = Signals([engine], True, 0.0)

    def row():
        signals.changed()
        board = signals.read(0.0)[0]
        names = (
            "WAITING_PREFILL_TOKENS",
            "AWAITED_KV_TOKENS",
            "LOADED_KV_TOKENS",
            "LOADING_REQUESTS",
            "KV_BLOCKS_USED",
            "WAITING_REQUESTS",
        )
        return [board[Field[name]] for name in names]

    first, second = (SimRequest(i, f"r{i}", 0.0, 33, 3, loads=True) for i in range(2))
    for request in (first, second):
        engine.add(request, 0.0)
    assert row() == [0, 66, 0, 2, 0, 2]
    batch = engine.schedule(0.0)
    assert (batch.tokens, engine.loads.begun) == (0, [first]), "no room for the second"
    assert row() == [0, 33, 33, 2, 9, 2]
    assert engine.finish_step(batch, 1.0) == []
    engine.transferred(first)
    batch = engine.schedule(1.0)
    assert (batch.prefill_tokens, batch.prefill_kv_tokens) == (1, 32)
    engine.finish_step(batch, 2.0)
    assert (first.first_token_us, first.generated) == (2.0, 1)
    assert row() == [0, 33, 0, 1, 9, 1]
    ended = []
    for step in range(2, 5):
        ended += engine.finish_step(engine.schedule(float(step)), step + 1.0)
    assert ended == [first]
    assert row() == [0, 0, 33, 1, 9, 1], "the second loads as soon as there is room"


def test_what_a_decode_engine_has_cached_is_not_loaded():
    engine = make(DecodeEngine, blocks=100)
    engine.set_prefix_block_tokens(16)
    requests = [
        SimRequest(i, f"r{i}", 0.0, 40, 1, prefix_blocks=(7, 8), loads=True) for i in range(2)
    ]
    for request, expected in zip(requests, (40, 8), strict=True):
        engine.add(request, 0.0)
        engine.schedule(0.0)
        assert request.awaited == expected
        engine.transferred(request)
        engine.finish_step(engine.schedule(1.0), 2.0)
    assert engine.used_blocks == 0


def test_a_loaded_prompt_that_is_preempted_is_computed_here():
    engine = make(DecodeEngine, blocks=6)
    requests = [SimRequest(i, f"r{i}", 0.0, 11, 8, loads=True) for i in range(2)]
    for request in requests:
        engine.add(request, 0.0)
    engine.schedule(0.0)
    for request in requests:
        engine.transferred(request)
    done, most = [], 0
    for step in range(60):
        batch = engine.schedule(float(step))
        most = max(most, batch.prefill_tokens)
        done += engine.finish_step(batch, float(step))
    assert done == requests
    assert engine.preemptions == 1
    assert most > 11, "its prompt and what it had answered"


def test_a_prefill_engine_keeps_blocks_until_they_are_read():
    engine = make(PrefillEngine, blocks=12)
    first = SimRequest(0, "first", 0.0, 16, 1)
    engine.add(first, 0.0)
    assert engine.finish_step(engine.schedule(0.0), 1.0) == [first]
    assert (engine.used_blocks, engine.busy) == (4, False)
    engine.add(SimRequest(2, "large", 0.0, 36, 1), 1.0)
    assert engine.schedule(1.0).tokens == 0, "no room beside it"
    engine.transferred(first)
    assert engine.used_blocks == 0
    assert engine.schedule(2.0).tokens == 16


def test_dynamo_counts_no_blocks_where_prompts_are_prefilled_and_no_prefill_elsewhere():
    arm = get_arm("dynamo")
    options = {
        role: policies_of(arm, CLUSTER, role).dispatch.options for role in ("", "prefill", "decode")
    }
    assert options == {
        "": {},
        "prefill": {"track_active_blocks": False},
        "decode": {"prefill_load_scale": 0.0},
    }


def test_a_report_has_both_phases():
    rows = [TraceRequest(i / 10, 500, 5) for i in range(20)]
    cell = run_cell(Cell("h100x8-pd-4p4d", make_trace("t", rows), get_arm("vllm"), 0, 1))
    assert cell.prefill_ms["mean"] > 5.0
    assert cell.kv_wait_ms["p50"] > 1.0 + 500 * PROFILE.model.kv_bytes_per_token / 50e6
    assert sum(cell.requests_by_engine.values()) == 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prefill: 4", "cluster c.yaml: prefill: "),
        ("prefill: {dp: 0}", "cluster c.yaml: prefill.dp: "),
        ("prefill: {pd: 4}", "cluster c.yaml: prefill.pd: unexpected keyword argument, got 4"),
        ("prefill: {dp: 3}", "cluster c.yaml: prefill: 128 experts do not divide over 3 ranks"),
        ("prefill: {prefill: {dp: 4}}", "cluster c.yaml: prefill: expected settings of engines"),
        ("prefill: {model: gpt-oss-120b}", "cluster c.yaml: prefill: expected the model of the"),
        ("kv_transfer: {gb_per_s: 50}", "cluster c.yaml: kv_transfer: goes with prefill"),
        ("prefill: {}\nkv_transfer: {gb_per_s: -1}", "cluster c.yaml: kv_transfer.gb_per_s: "),
        ("prefill: {}\nkv_transfer: {latency_us: .inf}", "cluster c.yaml"),
        ("prefill: {}\nkv_transfer: {gbps: 1}", "cluster c.yaml: kv_transfer.gbps: "),
    ],
)
def test_what_a_file_has_wrong_is_said(tmp_path: Path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"model: qwen3-30b-a3b\ngpu: h100\ndp: 4\n{text}\n")
    with pytest.raises(InputError) as error:
        load_cluster("c.yaml")
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_prefill_engines_are_as_the_others_but_for_what_they_say(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: qwen3-30b-a3b\ngpu: h100\ndp: 4\nmax_num_seqs: 64\nprefill: {dp: 1, tp: 2}\n"
    )
    cluster, _ = load_cluster(file)
    assert (cluster.prefill.dp, cluster.prefill.tp, cluster.prefill.max_num_seqs) == (1, 2, 64)
    assert (cluster.name, cluster.prefill.name) == ("c", "c (prefill)")
    lines = list(described(*load_cluster(file)))
    assert "1 prefill and 4 decode engines" in lines[0]
    assert len(lines) == len(set(lines))
    assert sum(line.startswith("KV cache of an engine") for line in lines) == 2


def test_a_search_for_the_capacity_begins_below_what_full_prefill_engines_do():
    def burst(rate_rps, count):
        return make_trace("t", [TraceRequest(0.0, 900, 3)] * count)

    bed = Bed(sized(2, 2, enable_eplb=False), PROFILE, POPULATION, get_arm("vllm"))
    run = bed.simulate(burst(None, BURST_REQUESTS)).run()
    at_once_rps = BURST_REQUESTS / max(r.last_token_s for r in run.records)
    assert 0.5 * at_once_rps < crude_rate(bed, burst) < 0.8 * at_once_rps
