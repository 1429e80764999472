"""The queue beside a KV connector: it orders and shares what is computed, not what is loaded."""

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.queue.connectors import connector_with_chunks_of_its_own
from tests.vllm_plugin import real_scheduler as real
from tests.vllm_plugin.fake_connector import loaded, prefilled_elsewhere

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds


@pytest.fixture
def build(schedulers):
    def make(gimbal=None, connector="NixlConnector", **options):
        values = None if gimbal is None else {"levels": ["queue"], "queue": gimbal}
        scheduler = schedulers(values, connector=connector, **options)
        if gimbal is not None:
            # Steps without a model take microseconds; aging has to run at a server's pace.
            scheduler.gimbal_queue.facts.prefill_tokens_per_s = lambda: 1000.0
        return scheduler

    return make


def step(scheduler, attach=lambda _result: None):
    output = scheduler.schedule()
    real.finish_step(scheduler, output, attach)
    return dict(output.num_scheduled_tokens)


def places(scheduler):
    """(request, tokens to compute) as the queue has them, in order."""
    return [
        (e.request.request_id, e.request.uncached_tokens) for e in scheduler.gimbal_queue.queue.heap
    ]


def test_a_prompt_from_elsewhere_is_no_work_in_the_queue(build):
    scheduler = build({}, seats=1)
    scheduler.add_request(real.request("runs", 20, output=50))
    step(scheduler)
    scheduler.add_request(real.request("computed", 100))
    scheduler.add_request(prefilled_elsewhere(real.request("loaded", 4000)))
    assert places(scheduler) == [("loaded", 0), ("computed", 100)]
    assert scheduler.gimbal_queue.queue.heap.waiting_tokens == 100


def test_what_a_store_holds_counts_no_more_once_vllm_has_asked(build):
    scheduler = build({}, blocks=300)
    scheduler.connector.stored = {"a": 1600, "late": 3200}
    scheduler.add_request(real.request("a", 2000))
    step(scheduler)
    scheduler.add_request(real.request("late", 3300))
    assert places(scheduler) == [("late", 3300)]
    for _ in range(2):  # vLLM has no room for it, and asks the connector all the same
        step(scheduler)
    assert places(scheduler) == [("late", 100)]
    assert scheduler.gimbal_queue.queue.heap.waiting_tokens == 100
    assert scheduler.gimbal_queue.view.backlog_tokens == 100 + 400
    assert scheduler.gimbal_queue.guard.counts == {}


def test_who_decodes_is_counted_without_who_loads(build):
    scheduler = build({})
    scheduler.add_request(real.request("decodes", 20, output=50))
    step(scheduler)
    for name in ("a", "b"):
        scheduler.add_request(prefilled_elsewhere(real.request(name, 400)))
    step(scheduler)
    assert len(scheduler._inflight_prefills) == 2
    assert scheduler.gimbal_queue.view.decoding == 1


def test_a_load_that_failed_shares_its_steps_as_the_work_it_is(build):
    scheduler = build({}, budget=512)
    scheduler.add_request(prefilled_elsewhere(real.request("failed", 4000)))
    step(scheduler)
    (blocks,) = scheduler.kv_cache_manager.get_block_ids("failed")
    step(scheduler, loaded("failed", invalid_blocks=(blocks[0],)))
    assert step(scheduler) == {"failed": 512}
    scheduler.add_request(real.request("short", 60))
    assert step(scheduler) == {"failed": 452, "short": 60}


def test_a_prefill_leaves_budget_to_one_whose_kv_has_come(build):
    scheduler = build({}, budget=512)
    scheduler.connector.stored = {"part": 160}
    scheduler.add_request(real.request("part", 200))
    step(scheduler)
    scheduler.add_request(real.request("long", 4000))
    assert step(scheduler, loaded("part")) == {"long": 512}
    assert step(scheduler) == {"long": 472, "part": 40}


def test_nobody_yields_to_one_that_is_to_load(build):
    scheduler = build({}, budget=512)
    scheduler.add_request(real.request("long", 4000))
    step(scheduler)
    scheduler.add_request(prefilled_elsewhere(real.request("loads", 400)))
    assert list(scheduler.gimbal_queue.view.newcomers) == []
    assert step(scheduler) == {"long": 512}
    assert scheduler.gimbal_queue.memory.yields == 0


def transfer(name, **extra):
    config = SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)
    return SimpleNamespace(kv_transfer_config=config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SimpleNamespace(kv_transfer_config=None), ""),
        (transfer("NixlConnector"), ""),
        (transfer("ExampleConnector"), "ExampleConnector"),
        (transfer("MultiConnector", connectors=[{"kv_connector": "OffloadingConnector"}]), ""),
        (
            transfer(
                "MultiConnector",
                connectors=[{"kv_connector": "NixlConnector"}, {"kv_connector": "Mine"}],
            ),
            "Mine",
        ),
    ],
)
def test_connectors_that_may_need_vllms_chunks(config, expected):
    assert connector_with_chunks_of_its_own(config) == expected


def test_chunks_stay_vllms_beside_a_connector_nobody_knows_and_the_log_says_so(build, caplog):
    caplog.set_level("INFO", logger="vllm.gimbal")
    assert build({}).gimbal_queue.view.can_share
    assert "keeps vLLM's chunks" not in caplog.text
    assert not build({}, "FakeConnector").gimbal_queue.view.can_share
    assert "KV connector FakeConnector" in caplog.text


def play(scheduler, seed, steps=600):
    """Serves 60 requests, of which some load and some of those fail; returns all steps."""
    rng = random.Random(seed)
    rows = []
    for i in range(60):
        request = real.request(f"r{i}", rng.choice((40, 200, 900)), rng.randrange(1, 9))
        kind = rng.random()
        if kind < 0.4:
            prefilled_elsewhere(request)
        elif kind < 0.6:
            scheduler.connector.stored[request.request_id] = request.num_tokens // 32 * 16
        rows.append((rng.randrange(60), request))
    rows.sort(key=lambda row: row[0])
    schedule, under_way = [], {}
    for number in range(steps):
        while rows and rows[0][0] <= number:
            scheduler.add_request(rows.pop(0)[1])
        if not (rows or scheduler.has_requests()):
            return schedule
        output = scheduler.schedule()
        schedule.append(dict(output.num_scheduled_tokens))
        for request in scheduler.kv_holding_waiting:
            under_way.setdefault(request.request_id, number + 1 + request.num_tokens // 100)
        over = [name for name, due in under_way.items() if due == number]
        held = [scheduler.kv_cache_manager.get_block_ids(name)[0] for name in over]
        bad = [blocks[len(blocks) // 2] for blocks in held if blocks[0] % 4 == 0]
        real.finish_step(scheduler, output, loaded(*over, invalid_blocks=tuple(bad)))
        signals = getattr(scheduler, "gimbal_signals", None)
        if signals is not None and not scheduler.connector.stored:
            said = signals.row.copy()
            signals.needs_recount = True
            signals.publish(0.0)
            counted = signals.row
            for field in (
                Field.WAITING_PREFILL_TOKENS,
                Field.AWAITED_KV_TOKENS,
                Field.LOADED_KV_TOKENS,
                Field.LOADING_REQUESTS,
                Field.RUNNING_PREFILL_TOKENS,
                Field.RUNNING_TOKENS,
            ):
                assert said[field] == counted[field], (number, field.name)
    raise AssertionError(f"{len(scheduler.requests)} requests are left")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("connector", ["NixlConnector", "FakeConnector"])
def test_fcfs_schedules_exactly_as_vllm_beside_a_connector(build, connector, seed):
    options = {"budget": 256, "seats": 8, "blocks": 260}
    plain = play(build(None, connector, **options), seed)
    gimbal = {"ordering": "fcfs", "in_batch": False, "pass_steps": 0}
    scheduler = build(gimbal, connector, **options)
    assert play(scheduler, seed) == plain
    assert scheduler.gimbal_queue.guard.counts == {}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_everything_that_loads_or_fails_to_is_served(build, seed):
    scheduler = build({}, budget=256, seats=8, blocks=130)
    assert play(scheduler, seed)
    assert not scheduler.requests
    assert scheduler.gimbal_queue.guard.counts == {}
    assert scheduler._gimbal_guard.counts == {}


def test_two_loads_with_room_for_one_do_not_block_each_other(build):
    """As vLLM's ``test_async_load_reservation_prevents_wedge_e2e``; here the shorter goes first."""
    scheduler = build({}, blocks=10)
    scheduler.connector.stored = {"large": 64, "small": 64}
    scheduler.add_request(real.request("large", 128, output=1))
    scheduler.add_request(real.request("small", 80, output=1))
    assert step(scheduler) == {}
    assert [r.request_id for r in scheduler.kv_holding_waiting] == ["small"]
    step(scheduler, loaded("small"))
    assert step(scheduler) == {"small": 16}
    step(scheduler)
    step(scheduler, loaded("large"))
    assert step(scheduler) == {"large": 64}
    assert not scheduler.has_unfinished_requests()
