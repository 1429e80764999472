"""Dispatch inside vLLM: chooses the engine in ``DPLBAsyncMPClient.get_core_engine_for_request``.

Gimbal only names a rank; vLLM's own method then does its bookkeeping for that rank exactly as it
does for a request pinned by ``X-data-parallel-rank``, so aborts, streaming sessions and elastic
resizing keep working as vLLM means them to. Requests that are pinned or belong to late interaction
are vLLM's to place; Gimbal enters them in its accounts. Later chunks of an open streaming session
go where the session is, which is in the accounts already.

When Gimbal cannot decide, the request goes where the fewest prompt tokens are in flight; when that
fails too, where vLLM would have sent it. vLLM's method is called once for every request, whatever
fails before or after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from gimbal.board.clock import now_us
from gimbal.board.file import Board
from gimbal.board.slots import BoardReader
from gimbal.core.compiled import compile_in_background
from gimbal.core.config import GimbalConfig
from gimbal.core.contracts import argmin_rotating
from gimbal.core.dispatch.dispatcher import Decision, Dispatcher
from gimbal.core.errors import InputError
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin import bridge
from gimbal.vllm_plugin.dispatch import engine_header, kv_events, recording, user_session
from gimbal.vllm_plugin.dispatch.metrics import VLLM, dispatch_metrics
from gimbal.vllm_plugin.dispatch.recent import Recent
from gimbal.vllm_plugin.dispatch.request import Described, Plan, describe, left_to_vllm
from gimbal.vllm_plugin.engine import remote
from gimbal.vllm_plugin.engine.identity import server_board_path, why_dispatch_cannot_act
from gimbal.vllm_plugin.metrics import model_name
from gimbal.vllm_plugin.versions import reuse_lookahead_tokens

logger = logging.getLogger("vllm.gimbal")

REFRESH_S = 0.5
_ATTRIBUTE = "_gimbal_front_end"

Original = Callable[[Any, Any], bytes]


class FrontEnd:
    """Dispatch of one API server.

    Args:
        client: vLLM's ``DPLBAsyncMPClient``.
        config: the server's Gimbal configuration.
        board: the server's signal board.
        lock_step: its engines step together (`Dispatcher`).

    Attributes:
        policy: name of the policy in use; an operator may change it while the server runs.
        enabled: whether the level is on (an operator may switch it off and on).
        decision: the latest decision of a policy; `recent` are the last ones.
        receiver: brings the rows of engines on other hosts; None where there are none.
        first_rows: says which of those are never heard of; None likewise.
        kv_events: keeps the prefix index in step with the engines' caches; None without events.
    """

    def __init__(
        self, client: Any, config: GimbalConfig, board: Board, lock_step: bool = True
    ) -> None:
        self.config = config
        self.board = board
        self.enabled = "dispatch" in config.levels
        self.policy = config.dispatch.policy
        self.metrics = dispatch_metrics()
        self.guard = LevelGuard("dispatch", on_fallback=self.metrics.fell_back)
        self.decision: Decision | None = None
        self.recent = Recent()
        self.decisions: Counter[tuple[int, str, str]] = Counter()
        self._client = weakref.ref(client)
        self.first = client.engine_ranks_managed[0]
        engines = len(client.core_engines)
        ranks = range(self.first, self.first + engines)
        self._loads = getattr(client.vllm_config, "kv_transfer_config", None) is not None
        self.metrics.serve(model_name(client.vllm_config), ranks, client.client_index == 0)
        self.reader = BoardReader(board, engines, self.first)
        self.dispatcher = Dispatcher(
            engines,
            config.dispatch,
            front_end=client.client_index,
            client_count=client.client_count,
            feedback_weight=self._feedback_weight(config.levels),
            lock_step=lock_step,
        )
        compile_in_background()
        self.receiver: remote.RowReceiver | None = None
        self.first_rows: remote.FirstRows | None = None
        self.kv_events: kv_events.KvEvents | None = None
        self._control = self.reader.look(), board.generation
        self._resets = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._apply(board.read_control())

    def _configured_options(self, policy: str) -> Mapping[str, Any]:
        """Options of the server's configuration, which are those of its own policy."""
        configured = self.config.dispatch
        return configured.options if policy == configured.policy else {}

    def _feedback_weight(self, levels: Sequence[str]) -> float:
        return self.config.feedback.weight if "feedback" in levels else 0.0

    def route(self, client: Any, request: Any, original: Original) -> bytes:
        """The engine of `request`; vLLM's bookkeeping is done when it returns."""
        if request.request_id in client.reqs_in_flight:
            return original(client, request)  # the next chunk of an open streaming session
        if self.guard.disabled:
            engine = original(client, request)
            self.guard.run("count", self._count, client.core_engines.index(engine), VLLM, "policy")
            return engine
        run = self.guard.run
        plan = run("account", self._plan, client, request)
        if plan is None or plan.engine is None:
            engine = original(client, request)
            index = client.core_engines.index(engine)
            run("not_entered", self._enter, request, plan, index)
            run("count", self._count, index, VLLM, "fallback" if plan is None else plan.reason)
            return engine
        engine = _pinned(client, request, plan.engine, original)
        run("count", self._placed, client, plan, plan.engine)
        return engine

    def _settle_soon(self) -> None:
        self.guard.run("settle", self.settle)

    def settle(self) -> None:
        """Brings the prefix index up to date."""
        self.dispatcher.settle()
        if self.kv_events is not None:
            self.kv_events.take()

    def finished(self, request_ids: Any) -> None:
        """Requests that ended, by themselves or by an abort; `refresh` finds those missed here."""
        for request_id in request_ids:
            self.guard.run("finished", self.dispatcher.finished, request_id)

    def _plan(self, client: Any, request: Any) -> Plan:
        if self._loop is None:
            self._start_refresh()
        self._follow(client)
        described = describe(request, self._loads)
        reason = left_to_vllm(request)
        if reason is None and (not self.enabled or self.policy == VLLM):
            reason = "policy"
        if reason is not None:
            return Plan(described, None, reason)
        started = time.perf_counter()
        decision = self.guard.run("error", self._decide, described)
        if decision is not None:
            seconds = time.perf_counter() - started
            return Plan(described, decision.engine, decision.reason, seconds)
        index = self.guard.run("inflight_error", self._least_inflight, described)
        return Plan(described, index, "fallback" if index is None else "inflight")

    def _enter(self, request: Any, plan: Plan | None, engine: int) -> None:
        """vLLM has placed `request`, which a plan that failed may have left in the accounts."""
        self.dispatcher.unsent(request.request_id)
        if plan is not None:
            entry, tokens = plan.described
            self.dispatcher.assigned(entry, engine, tokens)

    def _decide(self, described: Described) -> Decision:
        """By the policy; the request is in the accounts."""
        entry, tokens = described
        rows = self.reader.rows()
        self.decision = self.dispatcher.dispatch(entry, tokens, rows, entry.arrival_us)
        return self.decision

    def _placed(self, client: Any, plan: Plan, index: int) -> None:
        """What is counted once vLLM has entered a request where this front end wanted it."""
        if self._loop is not None:
            self._loop.call_soon(self._settle_soon)  # once the request is on its way
        if index < len(client.lb_engines):
            # Until the next snapshot of vLLM's own, as its own policy would.
            client.lb_engines[index][0] += client.client_count
        self._count(index, self.policy, plan.reason)
        if self.decision is not None and plan.seconds is not None:
            self.recent.note(self.policy, plan.described[0].prompt_tokens, self.decision)
            self.metrics.timed(plan.seconds, self.decision.signal_age_us)
        if plan.reason == "stale":
            self.guard.fell_back("stale")

    def _least_inflight(self, described: Described) -> int:
        """The engine with the fewest prompt tokens of this front end in flight."""
        entry, tokens = described
        ledger = self.dispatcher.ledger
        ledger.unsent(entry.request_id)  # half entered by the decision that failed
        index = argmin_rotating(ledger.inflight[1].tolist(), int(ledger.inflight[0].sum()))
        self.dispatcher.assigned(entry, index, tokens)
        return index

    def _follow(self, client: Any) -> None:
        """Takes up a changed number of engines, a new control message, and looks at the board."""
        engines = len(client.core_engines)
        if engines != self.reader.engines:
            self.dispatcher.resize(engines)
            self.reader.resize(engines)  # the last step, so that one that failed is done again
        self.follow_control()

    def follow_control(self) -> None:
        """Takes up a new control message."""
        version = self.reader.look(), self.board.generation
        if version == self._control:
            return
        try:
            self._apply(self.board.read_control())
        except InputError:
            self._control = version  # said once; what was in force stays
            raise
        self._control = version

    def _apply(self, control: dict[str, Any]) -> None:
        """Follows the operator: policy, levels, and forgetting the prefix caches."""
        levels = control.get("levels", self.config.levels)
        policy = control.get("policy", self.config.dispatch.policy)
        weight = self._feedback_weight(levels)
        options = control.get("policy_options", self._configured_options(policy))
        self.dispatcher.feedback_weight = weight
        if policy != VLLM:
            self.dispatcher.use_policy_named(policy, options)
        if policy != self.policy or ("dispatch" in levels) != self.enabled:
            logger.info("Gimbal: dispatch policy %s, levels %s", policy, ",".join(levels))
        self.policy = policy
        self.enabled = "dispatch" in levels
        self.metrics.levels_in_force(levels)
        self.metrics.policy_in_force(policy)
        if control.get("resets", 0) != self._resets:
            self._resets = control.get("resets", 0)
            for engine in range(self.dispatcher.engines):
                self.dispatcher.cache_cleared(engine)

    def _count(self, index: int, policy: str, reason: str) -> None:
        engine = self.first + index
        key = engine, policy, reason
        self.decisions[key] += 1
        self.metrics.decided(key)
        engine_header.note(engine)

    def status(self) -> dict[str, Any]:
        """For ``GET /gimbal/status``: what this front end does and did."""
        return {
            "enabled": self.enabled and not self.guard.disabled,
            "switched_itself_off": self.guard.disabled,
            "policy": self.policy,
            "decisions": [
                {"engine": engine, "policy": policy, "reason": reason, "count": count}
                for (engine, policy, reason), count in sorted(self.decisions.items())
            ],
            "fallbacks": dict(self.guard.counts),
            "kv_events": None if self.kv_events is None else self.kv_events.counts(),
        }

    def _start_refresh(self) -> None:
        with contextlib.suppress(RuntimeError):  # no loop yet: with the first request, or never
            self._loop = asyncio.get_running_loop()
            _refresh(weakref.ref(self))

    def refresh(self) -> None:
        """Brings the metrics up to date, and settles what the last decision left for later."""
        rows = self.reader.read()
        ledger = self.dispatcher.ledger
        client = self._client()
        if client is not None:
            ledger.unfinished(client.reqs_in_flight)
        loads = self.dispatcher.loads(rows, now_us())
        if self.first_rows is not None:
            self.first_rows.look(rows, ledger.unacked[0], time.monotonic())
        self.settle()
        self.dispatcher.fit_prefix_index(rows)
        self.metrics.refresh(self.first, loads, self.decision)
        self.metrics.board_state(self.board.recoveries, self.reader.torn)
        if self.guard.disabled:
            self.metrics.switched_itself_off("dispatch")


def _pinned(client: Any, request: Any, index: int, original: Original) -> bytes:
    """Has vLLM enter `request` for engine `index`."""
    request.data_parallel_rank = index
    try:
        return original(client, request)
    finally:
        request.data_parallel_rank = None


def _refresh(reference: weakref.ref[FrontEnd]) -> None:
    """Repeats `FrontEnd.refresh` on its event loop for as long as the front end lives."""
    front_end = reference()
    if front_end is None or front_end._loop is None or front_end._loop.is_closed():
        return
    front_end.guard.run("refresh", front_end.refresh)
    front_end._loop.call_later(REFRESH_S, _refresh, reference)


def attach(client: Any) -> FrontEnd | None:
    """Gives `client` its front end when the level is configured and can act; says why not."""
    config = bridge.level_config(client.vllm_config, "dispatch")
    if config is None:
        return None
    reason = why_dispatch_cannot_act(client.vllm_config, client.client_count)
    if reason is not None:
        logger.warning("Gimbal: the dispatch level cannot act: %s", reason)
        return None
    board = Board(server_board_path(client.vllm_config))
    # Engines of a dense model run on their own.
    front_end = FrontEnd(client, config, board, client.vllm_config.model_config.is_moe)
    front_end.dispatcher.prefixes.lookahead_tokens = reuse_lookahead_tokens(client.vllm_config)
    if any(name in sys.modules for name in user_session.HTTP_SERVERS):
        user_session.install()
    sources = kv_events.endpoints(client.vllm_config, front_end.first, front_end.dispatcher.engines)
    if sources:
        topic = client.vllm_config.kv_events_config.topic
        front_end.kv_events = kv_events.KvEvents(front_end.dispatcher, sources, topic)
        logger.info("Gimbal: the prefix index follows KV events of %s", list(sources.values()))
    if client.client_index == 0 and remote.spans_hosts(client.vllm_config):
        port = remote.board_port(client.vllm_config, config.board_port)
        parallel = client.vllm_config.parallel_config
        address = f"tcp://{parallel.data_parallel_master_ip}:{port}"
        front_end.receiver = remote.RowReceiver(front_end.board, address)
        front_end.first_rows = remote.FirstRows(
            front_end.receiver.address, parallel.data_parallel_size_local
        )
        logger.info("Gimbal: engines of other hosts publish to %s", front_end.receiver.address)
    logger.info(
        "Gimbal: front end %d of %d dispatches to %d engines by policy %s",
        client.client_index,
        client.client_count,
        front_end.dispatcher.engines,
        front_end.policy,
    )
    front_end._start_refresh()
    return front_end


def front_end_of(client: Any) -> FrontEnd | None:
    """The front end attached to vLLM's engine client, if any."""
    found: FrontEnd | None = getattr(client, _ATTRIBUTE, None)
    return found


def install() -> None:
    """Patches vLLM's load-balancing client."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient as Client

    Client.__init__ = _with_front_end(Client.__init__)
    Client.get_core_engine_for_request = _routed(Client.get_core_engine_for_request)
    Client.process_engine_outputs = staticmethod(_told(Client.process_engine_outputs))


def _with_front_end(init: Any) -> Any:
    @wraps(init)
    def client_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        recording.start(self)
        try:
            setattr(self, _ATTRIBUTE, attach(self))
        except Exception:
            logger.exception("Gimbal: dispatch could not start; vLLM dispatches by itself")
            setattr(self, _ATTRIBUTE, None)

    return client_init


def _routed(choose: Original) -> Original:
    @wraps(choose)
    def get_core_engine_for_request(self: Any, request: Any) -> bytes:
        front_end = front_end_of(self)
        if front_end is None:
            return choose(self, request)
        return front_end.route(self, request, choose)

    return get_core_engine_for_request


def _told(outputs: Any) -> Any:
    @wraps(outputs)
    async def process_engine_outputs(self: Any, engine_outputs: Any) -> None:
        recording.received(self, engine_outputs)
        front_end = front_end_of(self)
        if front_end is not None and engine_outputs.finished_requests:
            front_end.finished(engine_outputs.finished_requests)
        await outputs(self, engine_outputs)

    return process_engine_outputs
