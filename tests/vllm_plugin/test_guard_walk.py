"""A fault in each of Gimbal's functions below each entry of vLLM: nothing is lost, nobody waits.

One run without faults finds the functions. Then each raises always, and those of a module in 5 % of
their calls, before they do anything or after they have done all, while 500 requests are served.
`test_entries` sees to it that every function of vLLM that is replaced or overridden has an entry.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "placement"))

import faults

from gimbal.core.errors import InputError
from gimbal.core.snapshot import Field
from tests.vllm_plugin import real_scheduler as real
from tests.vllm_plugin.fake_connector import loaded, prefilled_elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a minute of work, on a machine that may have other work
    # A fault in what the collector calls ends nothing either.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUEUE = ("_add", "_choose", "_pop", "_prepend", "_remove", "_take_back", "leave_to_vllm")
ENGINE = {"budget": 512, "seats": 48, "blocks": 80, "connector": "NixlConnector"}
GIMBAL = {"levels": ["dispatch", "queue", "feedback"]}


def prompts(prefix: str, count: int = faults.REQUESTS, seed: int = 1) -> list[Any]:
    """Requests of mixed sizes; one in 25 decodes for long, so that some are preempted, and the KV
    cache of one in 20 comes from elsewhere.
    """
    rng = random.Random(seed)
    made = [
        real.request(
            f"{prefix}{i}",
            rng.choice((8, 16, 40, 100)) if i % 40 else 500,
            12 if i % 50 == 3 else rng.randrange(1, 3),
            arrival=float(i),
            hashed=False,
        )
        for i in range(count)
    ]
    for request in made[7::20] if prefix == "r" else []:
        prefilled_elsewhere(request)
    return made


def under_way(scheduler: Any) -> list[str]:
    """Requests that load."""
    return [
        request.request_id
        for request in scheduler.kv_holding_waiting
        if request.status.name == "WAITING_FOR_REMOTE_KVS"
        and request.request_id not in scheduler.finished_recving_kv_req_ids
    ]


def serve(scheduler: Any, requests: list[Any], each_step: Any = None) -> tuple[Counter[str], list]:
    """Tokens that clients got by request, and every step's tokens; 16 requests come per step."""
    got: Counter[str] = Counter()
    steps = []
    waiting = iter(requests)
    left = len(requests)
    while left or scheduler.has_requests():
        for _, request in zip(range(16), waiting, strict=False):
            scheduler.add_request(request)
            left -= 1
        if each_step is not None:
            each_step(len(steps))
        loads = under_way(scheduler)
        failed = loads[: len(steps) % 2]
        blocks = [scheduler.kv_cache_manager.get_block_ids(name)[0][0] for name in failed]
        come = loaded(*loads, invalid_blocks=tuple(blocks))
        output = scheduler.schedule()
        steps.append(dict(output.num_scheduled_tokens))
        got.update(real.finish_step(scheduler, output, partial(news, come)))
        assert len(steps) < 2000, f"{len(scheduler.requests)} requests are left"
    return got, steps


def news(come: Any, result: Any) -> None:
    from gimbal.vllm_plugin.engine import news

    come(result)
    setattr(result, news.PRESSURE_US, 3.0)
    setattr(result, news.FALLBACKS, 1)
    setattr(result, news.PLACEMENT, {Field.PLACEMENT_COMMITS: 1.0})


def refuse(scheduler: Any, refused: list[Any]) -> None:
    """An engine answers two requests by itself: one that it cannot read, one while it is paused."""
    from vllm.v1.engine import EngineCoreRequestType

    from gimbal.vllm_plugin.engine.refusals import _handled, _read

    def unreadable(_: Any, request: Any) -> None:
        refused.append(request)
        raise ValueError("unreadable")

    engine = SimpleNamespace(scheduler=scheduler, input_queue=SimpleQueue())
    request = SimpleNamespace(prompt_token_ids=[1], prompt_embeds=None, client_index=0)
    with pytest.raises(ValueError, match="unreadable"):
        _read(unreadable)(engine, request)
    paused = _handled(lambda _, _kind, message: refused.append(message))
    paused(engine, EngineCoreRequestType.ADD, (real.request("late", 8), 0))


def scenario(scheduler: Any, requests: list[Any]) -> Counter[str]:
    """500 requests, some others that are aborted or refused, and an operator at work."""
    from vllm.v1.request import RequestStatus

    aborted = prompts("aborted", 12, seed=2)
    board = getattr(getattr(scheduler, "gimbal_state", None), "control", None)
    messages = [{"ordering": "hrrn"}, {"queue": {"max_wait_s": 0.001}}, {"levels": []}, {}]
    refused: list[Any] = []
    ready = scheduler._handle_blocked_waiting_request
    not_ready: list[int] = []

    def is_ready(request: Any) -> bool:
        holds = scheduler._holds_kv_blocks(request)  # in vLLM's other queue
        return not (not_ready and not holds and not_ready.pop()) and ready(request)

    scheduler._handle_blocked_waiting_request = is_ready

    def each_step(step: int) -> None:
        if step == 2:
            for request in aborted:
                scheduler.add_request(request)
        if step == 3:
            names = [request.request_id for request in aborted]
            scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
        if step in (6, 12) and scheduler.running:
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
        if step == 8:
            not_ready[:] = [1, 1]  # vLLM skips two requests, as those that wait for a grammar
            assert {r.request_id for r in scheduler.waiting} <= set(scheduler.requests)
            refuse(scheduler, refused)
        if board is not None and step % 5 == 4 and messages:
            with faults.by_the_test():
                board.write_control(messages.pop(0))

    got, _ = serve(scheduler, requests, each_step)
    assert len(refused) == 2
    return Counter({name: tokens for name, tokens in got.items() if "aborted" not in name})


@pytest.fixture
def board(monkeypatch: Any) -> Any:
    """Takes away the board of the last server, as all have one name here; keeps the log short."""
    from gimbal.board.file import board_path
    from gimbal.vllm_plugin.engine.identity import RUN_ID

    monkeypatch.setattr(logging.getLogger("vllm.gimbal"), "disabled", True)
    monkeypatch.setenv(RUN_ID, f"walk-{os.getpid()}")
    path = board_path(os.environ[RUN_ID])
    yield lambda: path.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def lived(board: Any, kind: Any) -> Any:
    """A `Life` of one of the neighbouring modules, on a board of its own, at its end."""
    board()
    life = kind()
    life.run()
    return life


def test_an_engine_serves_through_every_fault(tmp_path: Path, board: Any, capsys: Any) -> None:
    def engine(gimbal: Any = GIMBAL) -> Any:
        board()
        return real.build(tmp_path, gimbal, **ENGINE)

    def whole_life() -> Any:
        try:
            scheduler = engine()
        except InputError:
            return None, expected  # its configuration cannot be read: an engine does not start
        got = scenario(scheduler, prompts("r"))
        scheduler.shutdown()
        return scheduler, got

    plain = engine(None)
    expected = scenario(plain, prompts("r"))
    _, second = serve(plain, prompts("s", 60))
    assert expected == Counter({r.request_id: r.max_tokens for r in prompts("r")})
    functions, met = faults.called(whole_life)
    assert met >= faults.entries(
        "engine.scheduler", "engine.refusals", "queue.level", "queue.waiting_queue"
    )
    queue = "vllm_plugin.queue.waiting_queue:GimbalRequestQueue."
    assert {f"{queue}{name}" for name in QUEUE} <= {one.name for one in functions}
    tally = faults.Tally("engine", functions)
    for walk in faults.walks(functions):
        scheduler: Any = None
        with faults.fault(walk) as raised:
            try:
                scheduler, got = whole_life()
                wrong = scheduler and wrong_with(scheduler, second)
                if got != expected:
                    wrong = f"{sum((expected - got).values())} tokens are missing"
            except Exception as error:
                wrong = f"the engine ends: {type(error).__name__}: {error}"
        level = getattr(scheduler, "gimbal_queue", None)
        guards = getattr(scheduler, "_gimbal_guard", None), level and level.guard
        tally.add(walk, raised, guards, level is None or level.over, wrong)
    conclude(tally, capsys)


def test_a_front_end_dispatches_through_every_fault(
    board: Any, monkeypatch: Any, capsys: Any
) -> None:
    from front_end_life import Life, hook

    monkeypatch.setattr(hook, "compile_in_background", lambda: None)

    whole_life = partial(lived, board, Life)
    functions, met = faults.called(whole_life)
    assert met >= faults.entries("dispatch.")
    tally = faults.Tally("front end", functions)
    for walk in faults.walks(functions):
        life: Any = None
        with faults.fault(walk) as raised:
            try:
                life = whole_life()
                wrong = life.wrong()
            except Exception as error:
                wrong = f"a request fails: {type(error).__name__}: {error}"
        front_end = life and life.front_end
        guards = life and life.session_guard, front_end and front_end.guard
        tally.add(walk, raised, guards, front_end is None or front_end.guard.disabled, wrong)
    conclude(tally, capsys)


def test_a_group_places_experts_through_every_fault(monkeypatch: Any, capsys: Any) -> None:
    from group_life import STEPS, Life, in_one_process

    monkeypatch.setattr(logging.getLogger("vllm.gimbal"), "disabled", True)
    lives: list[Life] = []
    in_one_process(monkeypatch, lambda: lives[-1].collectives)

    def whole_life() -> Life:
        lives[:] = [Life()]
        lives[0].run()
        return lives[0]

    whole_life()  # compiles, or reads what is compiled
    functions, met = faults.called(whole_life)
    assert met >= faults.entries("placement.")
    assert lives[0].wrong() is None
    assert all(member.controller.rebalance_log.committed > 1 for member in lives[0].members)
    tally = faults.Tally("group", functions, f"{STEPS} steps")
    for walk in faults.walks(functions, one_thread="rank1"):
        with faults.fault(walk) as raised:
            try:
                wrong = whole_life().wrong()
            except Exception as error:
                wrong = f"a rank ends: {type(error).__name__}: {error}"
        members = lives[0].members
        tally.add(walk, raised, [m.guard for m in members], any(m.off for m in members), wrong)
    conclude(tally, capsys, faults_at_least=500)


def test_a_server_starts_through_every_fault(board: Any, capsys: Any) -> None:
    """The hooks that act as a server starts, and its loggers of finished requests."""
    from start_life import ITERATIONS, Life

    whole_life = partial(lived, board, Life)
    functions, met = faults.called(whole_life)
    assert met >= faults.entries("engine.identity", "queue.metrics") | set(Life.ENTRIES)
    tally = faults.Tally("start", functions, f"{ITERATIONS} steps")
    for walk in faults.walks(functions):
        with faults.fault(walk) as raised:
            try:
                wrong = whole_life().wrong()
            except InputError:
                wrong = None  # its configuration cannot be read: a server does not start
            except Exception as error:
                wrong = f"the server ends: {type(error).__name__}: {error}"
        tally.add(walk, raised, (), False, wrong)
    conclude(tally, capsys, faults_at_least=50)


def conclude(tally: faults.Tally, capsys: Any, faults_at_least: int = 1000) -> None:
    with capsys.disabled():
        print(f"\n{tally}", *tally.wrong, sep="\n  ")
    assert not tally.wrong
    assert tally.faults >= faults_at_least


def wrong_with(scheduler: Any, second: list[dict[str, int]]) -> str | None:
    """What is not vLLM's in an engine whose queue level is off; `second` are vLLM's own steps."""
    if scheduler.requests or len(scheduler.waiting) or scheduler.running:
        return "requests are left"
    level = getattr(scheduler, "gimbal_queue", None)
    if level is not None and not level.over:
        return None
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue

    if type(scheduler.waiting) is not FCFSRequestQueue:
        return f"off, and the queue is a {type(scheduler.waiting).__name__}"
    if serve(scheduler, prompts("s", 60))[1] != second:
        return "off, and it does not schedule as vLLM"
    return None
