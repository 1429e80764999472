"""The queue level inside vLLM's own scheduler (no model, no engine)."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from gimbal.core.snapshot import ROW_WIDTH, Field
from tests.vllm_plugin import real_scheduler as real

pytestmark = pytest.mark.slow  # importing vLLM takes most of ten seconds


@pytest.fixture
def build(schedulers):
    def make(gimbal=None, levels=("queue",), **options):
        values = None if gimbal is None else {"levels": list(levels), **gimbal}
        scheduler = schedulers(values, **options)
        if gimbal is not None:
            # Steps without a model take microseconds; aging has to run at a server's pace.
            scheduler.gimbal_queue.facts.prefill_tokens_per_s = lambda: 1000.0
        return scheduler

    return make


def run(scheduler, requests, steps=400):
    """Adds requests (step, request) as their step comes; returns each step's token counts."""
    schedule = []
    due = sorted(requests, key=lambda pair: pair[0])
    for step in range(steps):
        while due and due[0][0] <= step:
            scheduler.add_request(due.pop(0)[1])
        output = scheduler.schedule()
        schedule.append(dict(output.num_scheduled_tokens))
        real.finish_step(scheduler, output)
        if not due and not scheduler.has_requests():
            break
    return schedule


def first_steps(schedule):
    """Request ids in the order in which they were first scheduled."""
    seen = []
    for counts in schedule:
        seen += [name for name in counts if name not in seen]
    return seen


def mixed(count=60, seed=1, sizes=(20, 80, 300, 1500), output=6):
    rng = random.Random(seed)
    return [
        (rng.randrange(40), real.request(f"r{i}", rng.choice(sizes), output, arrival=float(i)))
        for i in range(count)
    ]


def test_a_short_newcomer_takes_budget_from_a_running_long_prefill(build):
    scheduler = build({})
    requests = [(0, real.request("long", 3000)), (2, real.request("short", 200))]
    counts = run(scheduler, requests)
    assert counts[0] == {"long": 512}
    assert counts[2] == {"long": 312, "short": 200}
    assert scheduler.gimbal_queue.memory.yields == 1
    plain = run(build({"queue": {"in_batch": False}}), requests_again(requests))
    assert plain[2] == {"long": 512}


@pytest.mark.parametrize("bounded", [False, True])
def test_who_was_admitted_past_a_long_prefill_goes_on_decoding(build, bounded):
    """vLLM serves its running list in order: the long prefill stands before the newcomer there."""
    scheduler = build({"queue": {"step_budget": bounded}})
    requests = [(0, real.request("long", 4000, 4)), (2, real.request("short", 200, 20))]
    counts = run(scheduler, requests)
    first = next(i for i, step in enumerate(counts) if "short" in step)
    done = next(i for i, step in enumerate(counts) if step["long"] == 1)
    assert done - first > 4
    assert [step["short"] for step in counts[first + 1 : done]] == [1] * (done - first - 1)
    assert max(sum(step.values()) for step in counts) == 512
    assert scheduler.gimbal_queue.memory.yields == 1  # leaving a decode its token is no yielding


def decodes_take(monkeypatch, tokens):
    from gimbal.vllm_plugin.queue.step_view import SchedulerView

    monkeypatch.setattr(SchedulerView, "decode_tokens", tokens)


def test_a_long_prefill_moves_on_however_many_decode(build, monkeypatch):
    scheduler = build({}, budget=64)
    scheduler.add_request(real.request("decoding", 8, 50))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.add_request(real.request("long", 400, 4))
    real.finish_step(scheduler, scheduler.schedule())
    decodes_take(monkeypatch, 64)
    assert scheduler.schedule().num_scheduled_tokens == {"decoding": 1, "long": 16}


def test_a_prefill_that_keeps_its_chunks_leaves_nothing_to_share(build, monkeypatch):
    """Multimodal prompts are in flight without being candidates."""
    scheduler = build({}, budget=64)
    scheduler.add_request(real.request("decoding", 8, 50))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler._inflight_prefills.add(scheduler.requests["decoding"])
    decodes_take(monkeypatch, 64)
    assert scheduler.gimbal_queue.begin_step(False) == (64, {})


def test_only_tokens_that_vllm_will_schedule_are_kept_for_decodes(build):
    scheduler = build({})
    for name in ("a", "b", "c"):
        scheduler.add_request(real.request(name, 8, 50))
    real.finish_step(scheduler, scheduler.schedule())
    view = scheduler.gimbal_queue.view
    assert view.decode_tokens == 3
    scheduler.requests["a"].spec_token_ids = [1, 2]
    scheduler.requests["b"].next_decode_eligible_step = scheduler.current_step + 5
    assert view.decode_tokens == 3 + 1


def test_an_interval_of_the_scheduler_itself_holds_back_too(build):
    """vLLM 0.33 applies the interval to an engine that is not in lock step with others."""
    scheduler = build({})
    view = scheduler.gimbal_queue.view
    assert not view.held_back
    scheduler.local_prefill_interval, scheduler.num_executed_steps = 4, 10
    scheduler.last_prefill_step = 8
    assert view.held_back
    scheduler.last_prefill_step = 7
    assert not view.held_back


def requests_again(requests):
    return [(step, real.request(r.request_id, r.num_prompt_tokens)) for step, r in requests]


@pytest.mark.parametrize(("adaptive", "chunk"), [(False, 128), (True, 512 // 3)])
def test_shares_go_by_the_longest_chunk_that_vllm_schedules(build, adaptive, chunk):
    scheduler = build(
        {}, long_prefill_token_threshold=128, long_prefill_token_threshold_adaptive=adaptive
    )
    prompts = [(0, real.request("a", 3000)), (0, real.request("b", 2000))]
    counts = run(scheduler, [*prompts, (2, real.request("c", 1000))])
    # Nobody claims what its chunk could not take: the step has room for all three.
    assert counts[2] == {"a": chunk, "b": chunk, "c": chunk}


def test_waiting_order_is_that_of_the_ordering(build):
    sizes = {"a": 900, "b": 40, "c": 400}
    for ordering, expected in (("fcfs", "abc"), ("sjf", "bca"), ("gimbal", "bca")):
        scheduler = build({"queue": {"ordering": ordering}}, seats=1)
        counts = run(scheduler, [(0, real.request(n, size)) for n, size in sizes.items()])
        assert "".join(first_steps(counts)) == expected


def test_fcfs_schedules_exactly_as_vllm(build):
    """Our queue under FCFS against vLLM's, with preemptions, token by token."""
    ours = run(build({"queue": {"ordering": "fcfs"}}, blocks=180), mixed())
    vllm = run(build(None, blocks=180), mixed())
    assert ours == vllm


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("ordering", ["gimbal", "hrrn"])
def test_nothing_is_lost_under_preemption_aborts_and_switching(build, policy, ordering):
    queue = {"ordering": ordering, "room_tokens": 0}  # with room hardly anybody is preempted
    scheduler = build({"queue": queue}, blocks=160, seats=16, policy=policy)
    rng = random.Random(7)
    added, ended, preempted, step = 0, set(), 0, 0
    while added < 150 or scheduler.has_requests():
        step += 1
        assert step < 5000
        for _ in range(min(rng.randrange(3), 150 - added)):
            size = rng.choice((10, 60, 200, 900, 2000))
            scheduler.add_request(
                real.request(f"r{added}", size, rng.randrange(1, 40), rng.randrange(3), added)
            )
            added += 1
        if rng.random() < 0.1 and scheduler.requests:
            name = rng.choice(sorted(scheduler.requests))
            scheduler.finish_requests(name, real_status("FINISHED_ABORTED"))
            ended.add(name)
        if rng.random() < 0.1:
            name = rng.choice(["fcfs", "sjf", "hrrn", "gimbal"])
            scheduler.gimbal_queue._use(name, scheduler.gimbal_queue.config)
        before = set(scheduler.requests)
        output = scheduler.schedule()
        preempted += len(output.preempted_req_ids or ())
        real.finish_step(scheduler, output)
        gone = before - set(scheduler.requests)
        assert not gone & ended
        ended |= gone
        waiting = [r.request_id for r in scheduler.waiting]
        assert len(waiting) == len(set(waiting)) == len(scheduler.waiting)
        assert set(waiting) | {r.request_id for r in scheduler.running} == set(scheduler.requests)
    assert ended == {f"r{i}" for i in range(150)}
    assert preempted > 0
    assert scheduler.gimbal_queue.guard.counts == {}
    assert len(scheduler.waiting.heap) == 0


@pytest.mark.parametrize("watermark", [0.0, 0.05])
def test_admission_leaves_running_requests_room_to_grow(build, watermark):
    """vLLM's own watermark is raised for each step, and is as configured after it."""

    def preemptions(room_tokens):
        queue = {"room_tokens": room_tokens}
        scheduler = build({"queue": queue}, blocks=101, seats=32, watermark=watermark)
        manager = scheduler.kv_cache_manager
        before, preempted, step = manager.watermark_blocks, 0, 0
        assert before == int(watermark * 101)
        for index in range(40):
            scheduler.add_request(real.request(f"r{index}", 60, 100, arrival=index))
        while scheduler.has_requests():
            step += 1
            assert step < 5000
            output = scheduler.schedule()
            assert manager.watermark_blocks == before
            preempted += len(output.preempted_req_ids or ())
            real.finish_step(scheduler, output)
        assert scheduler.gimbal_queue.guard.counts == {}
        return preempted

    assert preemptions(0) > preemptions(32) > preemptions(100) == 0


def real_status(name):
    from vllm.v1.request import RequestStatus

    return RequestStatus[name]


@pytest.mark.parametrize("broken", ["key", "peek", "take", "restore", "remove"])
@pytest.mark.parametrize("often", [1, 7])
def test_a_broken_queue_hands_over_to_vllm_without_losing_a_request(
    build, monkeypatch, broken, often
):
    from gimbal.core.queue.heap import WaitingHeap

    scheduler = build({"queue": {"room_tokens": 0}}, blocks=130, seats=16)
    level = scheduler.gimbal_queue
    target = type(level.queue.heap.ordering) if broken == "key" else WaitingHeap
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1 and len(calls) % often == 0:
            raise RuntimeError("broken on purpose")
        return original(*args, **kwargs)

    original = getattr(target, broken)
    monkeypatch.setattr(target, broken, fail)
    requests = mixed(80, seed=3, output=40)
    names = {r.request_id for _, r in requests}
    finished, due, step = set(), sorted(requests, key=lambda p: p[0]), 0
    while due or scheduler.has_requests():
        step += 1
        assert step < 3000
        while due and due[0][0] <= step:
            scheduler.add_request(due.pop(0)[1])
        if step == 20 and (waiting := [r.request_id for r in scheduler.waiting]):
            for name in waiting[:6]:
                scheduler.finish_requests(name, real_status("FINISHED_ABORTED"))
                finished.add(name)
        before = set(scheduler.requests)
        real.finish_step(scheduler, scheduler.schedule())
        finished |= before - set(scheduler.requests)
        if not level.over:
            assert set(level.queue._all) == {r.request_id for r in scheduler.waiting}
    assert finished == names
    assert set(level.guard.counts) <= {"ordering"}
    if often == 1:
        assert level.guard.counts["ordering"] > 0
        # Without keys nothing can wait here; the others are not asked at every step.
        assert level.over or broken != "key"


def test_a_request_that_left_while_vllm_ordered_does_not_come_back(build, monkeypatch):
    """Taking back what waits fails at its very end, one request is served, then it succeeds."""
    from gimbal.vllm_plugin.queue import waiting_queue

    scheduler = build({})
    queue = scheduler.gimbal_queue.queue
    for name in ("served", "waits"):
        scheduler.add_request(real.request(name, 40))
    queue._fall_back(RuntimeError("once"))
    with monkeypatch.context() as patch:
        patch.setattr(waiting_queue, "BlockedHeadGate", lambda *_: 1 / 0)
        queue.begin_step()
    assert queue.fallback is not None
    served = queue.pop_request()
    queue.begin_step()
    assert queue.fallback is None
    queue.resized(served)  # as after a load of KV blocks that has failed
    assert queue.peek_request().request_id == queue.pop_request().request_id == "waits"


def test_what_waits_when_the_level_goes_off_is_in_vllms_order(build):
    """Preempted ones first, the last one before the others; then in the order they came."""

    def waiting(gimbal):
        scheduler = build(gimbal, blocks=100, seats=8)
        for i, tokens in enumerate((300, 310, 320, 330, 340)):
            scheduler.add_request(real.request(f"old{i}", tokens, 60))
        for _ in range(6):
            real.finish_step(scheduler, scheduler.schedule())
        # Arrival times go the other way: vLLM orders by when its queue saw a request.
        for i, tokens in enumerate((900, 20, 400)):
            scheduler.add_request(real.request(f"new{i}", tokens, arrival=-float(i)))
        for _ in range(2):
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
        return scheduler

    plain = waiting(None)
    ours = waiting({})
    queue = ours.waiting
    assert [r.request_id for r in queue] != [r.request_id for r in plain.waiting]
    ours.gimbal_queue.guard.disabled = True
    ours.schedule()
    plain.schedule()
    assert ours.gimbal_queue.over
    assert ours.gimbal_signals.row[Field.QUEUE_OFF] == 1
    assert type(ours.waiting) is type(plain.waiting)
    assert [r.request_id for r in ours.waiting] == [r.request_id for r in plain.waiting]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_level_that_is_off_schedules_exactly_as_vllm(build, policy):
    """Switched off by the operator, and by itself: every step's tokens, preemptions included."""

    def off(scheduler):
        scheduler.gimbal_state.control.write_control({"levels": []})

    def broken(scheduler):
        scheduler.gimbal_queue.guard.disabled = True

    vllm = run(build(None, blocks=180, policy=policy), mixed())
    for switch in (off, broken):
        scheduler = build({}, blocks=180, policy=policy)
        switch(scheduler)
        assert run(scheduler, mixed()) == vllm


def test_a_level_that_comes_back_orders_what_waits_by_its_age(build):
    scheduler = build({}, seats=1)
    level, board, now = scheduler.gimbal_queue, scheduler.gimbal_state.control, [0.0]
    level.queue.clock = lambda: now[0]
    scheduler.add_request(real.request("running", 20, 40))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.add_request(real.request("old", 900, 2))
    board.write_control({"levels": []})
    real.finish_step(scheduler, scheduler.schedule())
    assert level.queue.fallback is not None
    now[0] = 50.0
    scheduler.add_request(real.request("long", 1000, 2))
    scheduler.add_request(real.request("short", 30, 2))
    assert [r.request_id for r in scheduler.waiting] == ["old", "long", "short"]
    board.write_control({})
    real.finish_step(scheduler, scheduler.schedule())
    assert level.queue.fallback is None
    assert [r.request_id for r in scheduler.waiting] == ["old", "short", "long"]
    assert level.queue.heap.oldest().queued_s == 0.0


def test_a_failing_plan_leaves_the_step_to_vllm(build):
    scheduler = build({})
    scheduler.gimbal_queue.begin_step = lambda throttled: 1 / 0
    assert run(scheduler, [(0, real.request("a", 700))])[0] == {"a": 512}
    assert scheduler.gimbal_queue.guard.counts["plan"] > 0


def test_small_requests_pass_a_head_without_blocks_then_it_is_reserved_for(build):
    def first(pass_steps):
        # 100 blocks: "run" holds most of them for 60 steps; "big" needs 90; small ones need 2.
        scheduler = build({"queue": {"pass_steps": pass_steps, "pass_s": 1e9}}, blocks=100)
        requests = [(0, real.request("run", 400, 60)), (1, real.request("big", 1400, 2))]
        requests += [(2 + 2 * i, real.request(f"s{i}", 20, 2)) for i in range(25)]
        # The short ones come first by key anyway; FCFS keys make "big" the head.
        scheduler.gimbal_queue.queue.heap.ordering.key = lambda request, state: 0.0
        for entry in requests:
            entry[1].arrival_time = float(entry[0])
        return first_steps(run(scheduler, requests)), scheduler

    passed, scheduler = first(10)
    assert 3 <= passed.index("big") - 1 <= 10
    assert scheduler.gimbal_queue.queue.passes >= 3
    assert first(0)[0].index("big") == 1


def test_priorities_come_first(build):
    scheduler = build({}, policy="priority", seats=1)
    requests = [
        (0, real.request("low", 20, priority=5)),
        (0, real.request("high", 900, priority=1)),
        (0, real.request("mid", 20, priority=2)),
    ]
    assert first_steps(run(scheduler, requests)) == ["high", "mid", "low"]


@pytest.mark.parametrize(
    ("policy", "expected"), [("priority", ["b", "c", "a", "d"]), ("fcfs", ["a", "b", "c", "d"])]
)
def test_under_fcfs_equals_go_by_the_time_that_vllm_goes_by(build, policy, expected):
    scheduler = build({"queue": {"ordering": "fcfs"}}, policy=policy)
    for name, arrival in (("a", 9.0), ("b", 7.0), ("c", 8.0), ("d", 9.5)):
        scheduler.add_request(real.request(name, 40, arrival=arrival))
    assert first_steps(run(scheduler, [])) == expected


def test_the_budget_bounds_prefill_beside_decodes(build):
    scheduler = build({"queue": {"slo_tpot_ms": 50.0, "slo_ttft_ms": 1e6}})
    learned = {Field.STEP_BASE_US: 25_000.0, Field.PREFILL_US_PER_TOKEN: 500.0}
    scheduler.gimbal_queue.facts.field = lambda field: learned.get(field, 0.0)
    requests = [(0, real.request("decodes", 50, 30)), (2, real.request("long", 190))]
    counts = run(scheduler, requests)
    # (50 - 25) ms / 0.5 ms beside a decode; everything without one.
    assert counts[0] == {"decodes": 50}
    assert counts[2] == {"decodes": 1, "long": 50}
    assert scheduler.max_num_scheduled_tokens == 512


def test_the_budget_leaves_whole_prompts_alone(build):
    """Without chunked prefill vLLM stops at a prompt that is longer than the step's budget."""
    scheduler = build({}, budget=8192, enable_chunked_prefill=False)
    learned = {Field.STEP_BASE_US: 25_000.0, Field.PREFILL_US_PER_TOKEN: 500.0}
    scheduler.gimbal_queue.facts.field = lambda field: learned.get(field, 0.0)
    requests = [(0, real.request("decodes", 50, 30)), (2, real.request("long", 600))]
    assert run(scheduler, requests)[2] == {"decodes": 1, "long": 600}


def test_a_request_that_left_the_queue_is_not_held_by_its_place(build):
    scheduler = build({})
    queue, request = scheduler.waiting, real.request("a", 50)
    queue.add_request(request)
    assert queue.pop_request() is request
    assert request._gimbal_place.item is None
    queue.prepend_request(request)
    assert queue.peek_request() is request
    queue.remove_request(request)
    assert request._gimbal_place.item is None


def test_the_budget_goes_by_the_fullest_engine_of_the_group(build):
    scheduler = build({})
    learned = {Field.STEP_BASE_US: 25_000.0, Field.PREFILL_US_PER_TOKEN: 500.0}
    scheduler.gimbal_queue.facts.field = lambda field: learned.get(field, 0.0)
    rows = np.zeros((2, ROW_WIDTH))
    rows[1, Field.WAITING_PREFILL_TOKENS] = rows[1, Field.RUNNING_PREFILL_TOKENS] = 350.0
    scheduler.gimbal_state.group = SimpleNamespace(read=rows.copy)
    scheduler.gimbal_state.prefill_share = 1.0
    requests = [(0, real.request("decodes", 50, 30)), (2, real.request("long", 600))]
    # The other engine has 700 tokens: half of them, where its own 600 would give 300.
    assert run(scheduler, requests)[2] == {"decodes": 1, "long": 350}


def test_a_backlog_is_split_where_the_group_prefills_often(build):
    """In two steps where other engines prefill beside them anyway, and else at once."""
    scheduler = build({})
    state = scheduler.gimbal_state
    learned = {Field.STEP_BASE_US: 25_000.0, Field.PREFILL_US_PER_TOKEN: 500.0}
    scheduler.gimbal_queue.facts.field = lambda field: learned.get(field, 0.0)
    requests = [(0, real.request("decodes", 50, 90)), (8, real.request("long", 400))]
    assert run(scheduler, requests)[8] == {"decodes": 1, "long": 400}
    assert 0.0 < state.prefill_share < 0.1
    rows = np.zeros((2, ROW_WIDTH))
    rows[1, Field.STEP_PREFILL_TOKENS], rows[1, Field.RUNNING_PREFILL_TOKENS] = 10.0, 400.0
    state.group = SimpleNamespace(read=rows.copy)
    requests = [(0, real.request("decodes2", 50, 90)), (50, real.request("long2", 400))]
    assert run(scheduler, requests)[50] == {"decodes2": 1, "long2": 200}


def test_an_engine_that_decodes_nothing_spares_its_neighbours_a_full_step(build):
    scheduler = build({})
    rows = np.zeros((2, ROW_WIDTH))
    rows[:, Field.STEP_BASE_US] = 25_000.0, 5_000.0
    scheduler.gimbal_queue.facts.field = lambda field: {
        Field.STEP_BASE_US: 5_000.0,
        Field.PREFILL_US_PER_TOKEN: 500.0,
    }.get(field, 0.0)
    scheduler.gimbal_state.group = SimpleNamespace(read=rows.copy)
    scheduler.gimbal_state.prefill_share = 1.0
    assert run(scheduler, [(0, real.request("alone", 700))])[0] == {"alone": 512}
    rows[1, Field.DECODING_REQUESTS], rows[1, Field.RUNNING_PREFILL_TOKENS] = 3.0, 600.0
    # Half of the largest backlog; what decodes bear of the group's longest base would be 75.
    assert run(scheduler, [(0, real.request("beside", 700))])[0] == {"beside": 300}


def test_who_does_not_hear_all_of_its_group_spares_those_it_does_not_hear(build):
    view = build({}).gimbal_queue.view
    state, rows = view.state, np.zeros((2, ROW_WIDTH))
    assert view.group_decode_tokens == 0.0  # alone
    state.unseen = True
    assert view.group_decode_tokens == 1.0
    state.group = SimpleNamespace(read=lambda: rows)
    rows[0, Field.SEQUENCE] = 5.0
    assert view.group_decode_tokens == 1.0
    rows[1, Field.SEQUENCE] = 1.0
    view.begin(throttled=False)
    assert view.group_decode_tokens == 0.0


def test_a_deep_prompt_takes_fewer_tokens_of_a_step(build):
    scheduler = build({"queue": {"slo_tpot_ms": 50.0, "slo_ttft_ms": 1e6}}, blocks=4000)
    state, facts = scheduler.gimbal_state, scheduler.gimbal_queue.facts
    field = facts.field
    learned = {Field.STEP_BASE_US: 25_000.0, Field.PREFILL_US_PER_TOKEN: 50.0}
    facts.field = lambda name: learned.get(name, field(name))
    for step in range(400):  # 100 us a token, 100 more with every 500 tokens of context
        tokens, pairs = 500, 500 * 500.0 * (7 * step % 64)
        state.depth.observe(tokens, pairs, 100.0 * tokens + 0.2 * pairs)
    state.depth.observe = lambda *step: None  # steps without a model take microseconds
    requests = [(0, real.request("decodes", 50, 200)), (2, real.request("deep", 3000))]
    chunks = [step["deep"] for step in run(scheduler, requests) if step.get("deep", 0) > 1]
    assert chunks[0] == pytest.approx(250, abs=10)  # 25 ms beside a decode
    assert chunks[-2] < 60
    assert chunks[:-1] == sorted(chunks[:-1], reverse=True)


def test_the_budget_knows_how_long_a_prompt_has_waited(build):
    scheduler = build({"queue": {"slo_ttft_ms": 1000.0}}, seats=2)
    now, view = [10.0], scheduler.gimbal_queue.view
    scheduler.gimbal_queue.queue.clock = lambda: now[0]
    assert view.oldest_wait_us == 0.0
    scheduler.add_request(real.request("long", 900, 3))
    now[0] = 10.5
    real.finish_step(scheduler, scheduler.schedule())
    assert view.oldest_wait_us == 500_000.0, "it runs, and has no token yet"
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.add_request(real.request("next", 10, 3))
    now[0] = 10.75
    assert view.oldest_wait_us == 250_000.0


GRAPHS_ALONE = {"step_budget": False}


def with_graphs(scheduler, pays=True, tokens=128):
    """As if vLLM had graphs for steps of `tokens`, and small steps had been seen to pay or not."""
    scheduler.gimbal_state.graph_costs = SimpleNamespace(
        graph_tokens=tokens,
        exploring=False,
        flat_tokens=0,
        small_steps_pay=lambda backlog: pays,
        decided=lambda: None,
        observe=lambda *a: None,
    )
    return scheduler


@pytest.mark.parametrize(
    ("pays", "most_steps", "prompt", "expected"),
    [
        (True, 2.0, 240, [128, 114]),  # beside a decode 127 tokens of prefill fit into a graph
        (True, 2.0, 260, [261]),  # more than twice 127
        (True, 3.0, 260, [128, 128, 7]),
        (True, 2.0, 120, [121]),
        (True, 0.0, 240, [241]),
        (False, 2.0, 240, [241]),
    ],
)
def test_a_backlog_of_two_graphs_is_prefilled_in_graphs(build, pays, most_steps, prompt, expected):
    scheduler = with_graphs(build({"queue": GRAPHS_ALONE | {"graph_steps": most_steps}}), pays)
    counts = run(scheduler, [(0, real.request("decodes", 50, 30)), (2, real.request("p", prompt))])
    assert [sum(step.values()) for step in counts[2 : 2 + len(expected)]] == expected
    assert scheduler.gimbal_queue.memory.graph_steps == len(expected) - 1 or prompt == 120
    assert scheduler.max_num_scheduled_tokens == 512


def test_graphs_go_by_the_fullest_engine_of_the_group(build):
    def tokens_in_step_2(backlog, decodes):
        scheduler = with_graphs(build({"queue": GRAPHS_ALONE}))
        rows = np.zeros((2, ROW_WIDTH))
        rows[1, Field.WAITING_PREFILL_TOKENS], rows[1, Field.DECODING_REQUESTS] = backlog, decodes
        scheduler.gimbal_state.group = SimpleNamespace(read=rows.copy)
        requests = [(0, real.request("decodes", 50, 30)), (2, real.request("p", 200))]
        return sum(run(scheduler, requests)[2].values())

    assert tokens_in_step_2(0, 0) == 128
    assert tokens_in_step_2(254, 1) == 128
    assert tokens_in_step_2(255, 1) == 201  # its step will be a large one whatever this one does
    assert tokens_in_step_2(0, 100) == 201


def test_an_engine_that_decodes_nothing_spares_its_neighbours_a_large_step(build):
    scheduler = with_graphs(build({}))
    rows = np.zeros((2, ROW_WIDTH))
    rows[1, Field.STEP_TOKENS], rows[1, Field.STEP_PREFILL_TOKENS] = 40.0, 10.0
    scheduler.gimbal_state.group = SimpleNamespace(read=rows.copy)
    assert run(scheduler, [(0, real.request("p", 190))])[0] == {"p": 128}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("scheduler_config", "prefill_schedule_interval", 2),
        ("scheduler_config", "enable_chunked_prefill", False),
        ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("parallel_config", "use_ubatching", True),
        ("model_config", "supports_multimodal_inputs", True),
    ],
)
def test_steps_are_cut_only_where_nothing_waits_for_a_whole_one(build, section, field, value):
    from gimbal.vllm_plugin.queue.step_view import _may_cut_steps

    real_config = build({}).vllm_config
    names = ("scheduler_config", "parallel_config", "model_config")
    assert _may_cut_steps(real_config)
    config = SimpleNamespace(**{name: getattr(real_config, name) for name in names})
    part = getattr(config, section)
    fields = {name: getattr(part, name) for name in dir(part) if not name.startswith("_")}
    setattr(config, section, SimpleNamespace(**{**fields, field: value}))
    assert not _may_cut_steps(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_config", object()),
        ("is_encoder_decoder", True),
        ("need_mamba_block_aligned_split", True),
    ],
)
def test_chunks_stay_vllms_where_their_end_or_start_is_not_its_queues_to_say(
    build, monkeypatch, name, value
):
    from gimbal.vllm_plugin.queue.step_view import SchedulerView

    scheduler = build({})
    level = scheduler.gimbal_queue
    assert level.view.can_share
    with monkeypatch.context() as changed:
        changed.setattr(scheduler, name, value)
        view = SchedulerView(scheduler, level.queue, level.facts, level.state, level.memory)
    assert not view.can_share
    scheduler._inflight_prefills.add(object())
    assert view.running == ()


def test_nothing_is_cut_where_prompts_must_stay_whole(build):
    scheduler = with_graphs(build({}, budget=8192, enable_chunked_prefill=False))
    requests = [(0, real.request("decodes", 50, 30)), (2, real.request("p", 200))]
    assert sum(run(scheduler, requests)[2].values()) == 201


def test_without_decodes_a_step_is_as_large_as_it_can_be(build):
    scheduler = with_graphs(build({}))
    assert run(scheduler, [(0, real.request("p", 200))])[0] == {"p": 200}


def test_the_prefill_interval_is_vllms(build):
    scheduler = build({}, seats=2)
    scheduler.add_request(real.request("decoding", 16, 50))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.add_request(real.request("a", 300, 50))
    scheduler.add_request(real.request("b", 300, 50))
    prefilled = []
    scheduler.prefill_capacity_bound = True  # the last prefill step left somebody waiting
    for throttled in (True, True):
        output = scheduler.schedule(throttled)
        prefilled.append(sum(n for n in output.num_scheduled_tokens.values() if n > 1))
        real.finish_step(scheduler, output)
    assert prefilled == [300, 0]


def test_counters_travel_with_the_snapshot(build):
    scheduler = build({}, seats=1)
    run(scheduler, [(0, real.request("a", 900)), (0, real.request("b", 20))])
    row = scheduler.gimbal_signals.row
    scheduler.gimbal_queue.publish()
    assert row[Field.QUEUE_OVERTAKES] == 1
    assert row[Field.QUEUE_FALLBACKS] == row[Field.QUEUE_OFF] == 0
    scheduler.add_request(real.request("c", 900))
    scheduler.add_request(real.request("d", 900))
    for _ in range(8):
        scheduler.schedule()
    assert row[Field.QUEUE_OLDEST_WAIT_US] > 0


def test_an_ordering_without_a_bound_publishes_none_as_zero(build):
    scheduler = build({"queue": {"ordering": "sjf"}}, seats=1)
    run(scheduler, [(0, real.request("a", 900))])
    scheduler.add_request(real.request("b", 900))
    scheduler.add_request(real.request("c", 900))
    scheduler.gimbal_queue.publish()
    row = scheduler.gimbal_signals.row
    assert row[Field.QUEUE_OLDEST_WAIT_US] > 0
    assert row[Field.QUEUE_OLDEST_BOUND_US] == 0


def test_control_message_switches_ordering_and_level(build):
    scheduler = build({})
    level, board = scheduler.gimbal_queue, scheduler.gimbal_state.control
    for control, expected in (
        ({"ordering": "sjf"}, "sjf"),
        ({"ordering": "nonsense"}, "sjf"),
        ({"levels": ["dispatch"], "ordering": "sjf"}, "vllm"),
        ({}, "gimbal"),
    ):
        board.write_control(control)
        scheduler.schedule()
        assert level.ordering == expected
    assert level.usable.in_batch


def test_control_message_changes_the_queue_section_and_takes_it_back(build):
    scheduler = build({})
    level, board = scheduler.gimbal_queue, scheduler.gimbal_state.control
    board.write_control({"queue": {"options": {"overtake_factor": 3.0}, "step_budget": False}})
    scheduler.schedule()
    assert level.queue.heap.ordering.overtake_factor == 3.0
    assert not level.config.step_budget
    assert not level.usable.step_budget
    board.write_control(
        {"queue": {"options": {"overtake_factor": 0.5}}}
    )  # refused: the last one stays
    scheduler.schedule()
    assert level.queue.heap.ordering.overtake_factor == 3.0
    board.write_control({})
    scheduler.schedule()
    assert level.queue.heap.ordering.overtake_factor == 10.0
    assert level.config.step_budget


@pytest.mark.parametrize("field", ["data_parallel_size", "data_parallel_index"])
def test_with_more_engines_than_signals_hold_the_scheduler_is_vllms(build, caplog, field):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from gimbal.vllm_plugin.engine.scheduler import build_scheduler

    plain = build(None)
    config = plain.vllm_config
    config.additional_config = {"gimbal": {"levels": ["queue"]}}
    setattr(config.parallel_config, field, 257 if field == "data_parallel_size" else 256)
    scheduler = build_scheduler(
        AsyncScheduler,
        vllm_config=config,
        kv_cache_config=plain.kv_cache_config,
        structured_output_manager=plain.structured_output_manager,
        block_size=16,
    )
    assert type(scheduler) is AsyncScheduler
    (line,) = [r.message for r in caplog.records if r.name == "vllm.gimbal"]
    assert line.endswith("257 engines: the signal board holds 256")


def test_an_unknown_ordering_is_refused_at_start(build):
    from gimbal.core.errors import InputError

    with pytest.raises(InputError, match="did you mean 'hrrn'"):
        build({"queue": {"ordering": "hrnn"}})


def test_yielding_pauses_when_vllm_admits_nobody_for_it(build):
    scheduler = build({})
    level = scheduler.gimbal_queue
    scheduler.add_request(real.request("long", 4000))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.add_request(real.request("short", 100))
    assert level.begin_step(False) == (512, {"long": 412})
    level.end_step(412)
    held = [level.begin_step(False)[1] for _ in range(8)]
    assert held[:7] == [{}] * 7
    assert held[7] == {"long": 412}


def test_a_prefill_from_before_a_switch_does_not_yield(build):
    scheduler = build({"queue": {"ordering": "fcfs"}})
    scheduler.add_request(real.request("long", 4000))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.gimbal_queue._use("gimbal", scheduler.gimbal_queue.config)
    scheduler.add_request(real.request("short", 100))
    assert scheduler.schedule().num_scheduled_tokens == {"long": 512}


def test_a_paused_scheduler_keeps_its_queue(build):
    from vllm.v1.core.sched.interface import PauseState

    scheduler = build({})
    scheduler.add_request(real.request("running", 1200))
    real.finish_step(scheduler, scheduler.schedule())
    scheduler.add_request(real.request("queued", 30))
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(3):
        output = scheduler.schedule()
        assert "queued" not in output.num_scheduled_tokens
        real.finish_step(scheduler, output)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert "queued" in scheduler.schedule().num_scheduled_tokens


def test_a_request_that_cannot_start_yet_is_passed_and_keeps_its_place(build):
    """As one that waits for its grammar: vLLM skips it every step until it is ready."""
    scheduler = build({}, seats=1)
    for name, tokens in (("a", 20), ("b", 40), ("c", 60)):
        scheduler.add_request(real.request(name, tokens, 2))
    ready = scheduler._handle_blocked_waiting_request
    scheduler._handle_blocked_waiting_request = lambda r: r.request_id != "a" and ready(r)
    counts = run(scheduler, [], steps=5)
    assert first_steps(counts) == ["b", "c"]
    scheduler._handle_blocked_waiting_request = ready
    assert [r.request_id for r in scheduler.waiting] == ["a"]
    assert first_steps(run(scheduler, [])) == ["a"]
    # Passing a request that could not start is nobody's overtaking.
    assert scheduler.gimbal_queue.queue.heap.overtakes == 0
