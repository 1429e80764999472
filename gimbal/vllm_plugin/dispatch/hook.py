"""Dispatch inside vLLM: chooses the engine in ``DPLBAsyncMPClient.get_core_engine_for_request``.

Gimbal only names a rank; vLLM's own method then does its bookkeeping for that rank exactly as it
does for a request pinned by ``X-data-parallel-rank``, so aborts, streaming sessions and elastic
resizing keep working as vLLM means them to. Requests that are pinned or belong to late interaction
are vLLM's to place; Gimbal enters them in its accounts. Later chunks of an open streaming session
go where the session is, which is in the accounts already.

When Gimbal cannot decide, the request goes where the fewest prompt tokens are in flight; when that
fails too, where vLLM would have sent it.
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
from gimbal.core.contracts import DispatchRequest, argmin_rotating
from gimbal.core.dispatch.dispatcher import Decision, Dispatcher
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin import bridge
from gimbal.vllm_plugin.dispatch import engine_header, kv_events, user_session
from gimbal.vllm_plugin.dispatch.metrics import dispatch_metrics
from gimbal.vllm_plugin.engine import remote
from gimbal.vllm_plugin.engine.identity import server_board_path, why_dispatch_cannot_act

logger = logging.getLogger("vllm.gimbal")

VLLM = "vllm"
"""Name of the policy that is vLLM's own method, called and not imitated."""
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
        decision: the latest decision of a policy.
        receiver: brings the rows of engines on other hosts; None where there are none.
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
        self.decisions: Counter[tuple[int, str, str]] = Counter()
        self._client = weakref.ref(client)
        self.first = client.engine_ranks_managed[0]
        engines = len(client.core_engines)
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
        self.kv_events: kv_events.KvEvents | None = None
        self._control = board.control_version()
        self._control_generation = board.generation
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
        if self._loop is None:
            self._start_refresh()
        if request.request_id in client.reqs_in_flight:
            return original(client, request)  # the next chunk of an open streaming session
        try:
            self._follow(client)
            described = describe(request)
        except Exception as error:
            self.guard.fell_back("account", error)
            return original(client, request)
        reason = self._vllm_decides(request)
        if reason is not None:
            return self._vllm(client, request, described, original, reason)
        index, reason = self._choose(described, request)
        if index is None:
            return self._vllm(client, request, described, original, "fallback")
        self._count(index, self.policy, reason)
        if self._loop is not None:
            self._loop.call_soon(self.settle)  # once the request is on its way
        return _pinned(client, request, index, original)

    def settle(self) -> None:
        """Brings the prefix index up to date."""
        self.dispatcher.settle()
        if self.kv_events is not None:
            self.kv_events.take()

    def finished(self, request_ids: Any) -> None:
        """Requests that ended, by themselves or by an abort."""
        for request_id in request_ids:
            self.dispatcher.finished(request_id)

    def _vllm_decides(self, request: Any) -> str | None:
        """Why vLLM places this request, or None when Gimbal does."""
        if request.data_parallel_rank is not None:
            return "pinned"
        pooling = request.pooling_params
        if pooling is not None and pooling.late_interaction_params is not None:
            return "late_interaction"
        if not self.enabled or self.policy == VLLM or self.guard.disabled:
            return "policy"
        return None

    def _choose(self, described: Described, request: Any) -> tuple[int | None, str]:
        """Index among the managed engines, and the reason; None when not even the accounts work."""
        started = time.perf_counter()
        entry, tokens = described
        try:
            now = now_us()
            rows = self.reader.read(now / 1e6)
            decision = self.dispatcher.dispatch(entry, tokens, rows, now)
        except Exception as error:
            self.guard.fell_back("error", error)
            return self._least_inflight(described)
        self.decision = decision
        self.metrics.timed(time.perf_counter() - started, decision.signal_age_us)
        if decision.reason == "stale":
            self.guard.fell_back("stale")
        else:
            self.guard.succeeded()
        return decision.engine, decision.reason

    def _least_inflight(self, described: Described) -> tuple[int | None, str]:
        """The engine with the fewest prompt tokens of this front end in flight."""
        entry, tokens = described
        try:
            ledger = self.dispatcher.ledger
            ledger.unsent(entry.request_id)  # half entered by the decision that failed
            index = argmin_rotating(ledger.inflight[1].tolist(), int(ledger.inflight[0].sum()))
            self.dispatcher.assigned(entry, index, tokens)
        except Exception as error:
            self.guard.fell_back("inflight_error", error)
            return None, "fallback"
        return index, "inflight"

    def _vllm(
        self, client: Any, request: Any, described: Described, original: Original, reason: str
    ) -> bytes:
        engine = original(client, request)
        index = client.core_engines.index(engine)
        try:
            self.dispatcher.assigned(described[0], index, described[1])
        except Exception as error:
            self.guard.fell_back("account", error)
        self._count(index, VLLM, reason)
        return engine

    def _follow(self, client: Any) -> None:
        """Takes up a changed number of engines, and a new control message."""
        engines = len(client.core_engines)
        if engines != self.dispatcher.engines:
            self.reader.resize(engines)
            self.dispatcher.resize(engines)
        self.follow_control()

    def follow_control(self) -> None:
        """Takes up a new control message."""
        version = self.board.control_version()
        if version != self._control or self.board.generation != self._control_generation:
            self._control, self._control_generation = version, self.board.generation
            self._apply(self.board.read_control())

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
        for level in ("dispatch", "queue", "placement", "feedback"):
            self.metrics.level_state(level, int(level in levels))
        if control.get("resets", 0) != self._resets:
            self._resets = control.get("resets", 0)
            for engine in range(self.dispatcher.engines):
                self.dispatcher.cache_cleared(engine)

    def _count(self, index: int, policy: str, reason: str) -> None:
        engine = self.first + index
        self.decisions[engine, policy, reason] += 1
        self.metrics.decided(engine, policy, reason)
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
        with contextlib.suppress(RuntimeError):  # no loop: metrics are refreshed later, or never
            self._loop = asyncio.get_running_loop()
            _refresh(weakref.ref(self))

    def refresh(self) -> None:
        """Brings the gauges up to date, and settles what the last decision left for later."""
        rows = self.reader.read()
        ledger = self.dispatcher.ledger
        client = self._client()
        if client is not None:
            ledger.unfinished(client.reqs_in_flight)
        ledger.observe(rows, now_us())
        self.settle()
        self.dispatcher.fit_prefix_index(rows)
        self.metrics.refresh(self.first, rows, ledger.unacked[1], ledger.inflight[1], self.decision)
        self.metrics.board_state(self.board.recoveries, self.reader.torn)
        if self.guard.disabled:
            self.metrics.level_state("dispatch", -1)


Described = tuple[DispatchRequest, Sequence[int] | None]


def describe(request: Any) -> Described:
    """What dispatch may know of vLLM's ``EngineCoreRequest``."""
    from vllm.utils import length_from_prompt_token_ids_or_embeds

    tokens = request.prompt_token_ids
    length = length_from_prompt_token_ids_or_embeds(tokens, request.prompt_embeds)
    entry = DispatchRequest(
        request.request_id, length, now_us(), session_of(request), request.priority
    )
    # Prompts that differ outside their tokens must not be taken for one another.
    plain = not (request.mm_features or request.lora_request or request.cache_salt)
    return entry, tokens if plain else None


def session_of(request: Any) -> str | None:
    """``session_id``, ``X-Session-ID``, ``vllm_xargs.session_id`` or, over HTTP, ``user``."""
    if request.session_id:
        return str(request.session_id)
    sampling = request.sampling_params
    extra = sampling.extra_args if sampling is not None else None
    session = extra.get("session_id") if extra else None
    return session if isinstance(session, str) and session else None


def _pinned(client: Any, request: Any, index: int, original: Original) -> bytes:
    """Has vLLM enter `request` for engine `index`, and count it as its own policy would."""
    request.data_parallel_rank = index
    try:
        engine = original(client, request)
    finally:
        request.data_parallel_rank = None
    if index < len(client.lb_engines):
        client.lb_engines[index][0] += client.client_count
    return engine


def _refresh(reference: weakref.ref[FrontEnd]) -> None:
    """Repeats `FrontEnd.refresh` on its event loop for as long as the front end lives."""
    front_end = reference()
    if front_end is None or front_end._loop is None or front_end._loop.is_closed():
        return
    try:
        front_end.refresh()
    except Exception as error:
        front_end.guard.fell_back("refresh", error)
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
    if any(name in sys.modules for name in user_session.HTTP_SERVERS):
        user_session.install()
    sources = kv_events.endpoints(client.vllm_config, front_end.first, front_end.dispatcher.engines)
    if sources:
        topic = client.vllm_config.kv_events_config.topic
        front_end.kv_events = kv_events.KvEvents(front_end.dispatcher, sources, topic)
        logger.info("Gimbal: the prefix index follows KV events of %s", list(sources.values()))
    if client.client_index == 0 and remote.spans_hosts(client.vllm_config):
        port = remote.board_port(client.vllm_config, config.board_port)
        host = client.vllm_config.parallel_config.data_parallel_master_ip
        front_end.receiver = remote.RowReceiver(front_end.board, f"tcp://{host}:{port}")
        logger.info("Gimbal: engines of other hosts publish to %s", front_end.receiver.address)
    logger.info(
        "Gimbal: front end %d of %d dispatches to %d engines by policy %s",
        client.client_index,
        client.client_count,
        front_end.dispatcher.engines,
        front_end.policy,
    )
    return front_end


def front_end_of(client: Any) -> FrontEnd | None:
    """The front end attached to vLLM's engine client, if any."""
    found: FrontEnd | None = getattr(client, _ATTRIBUTE, None)
    return found


def install() -> None:
    """Patches vLLM's load-balancing client."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    init = DPLBAsyncMPClient.__init__
    choose = DPLBAsyncMPClient.get_core_engine_for_request
    outputs = DPLBAsyncMPClient.process_engine_outputs

    @wraps(init)
    def client_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        try:
            setattr(self, _ATTRIBUTE, attach(self))
        except Exception:
            logger.exception("Gimbal: dispatch could not start; vLLM dispatches by itself")
            setattr(self, _ATTRIBUTE, None)

    @wraps(choose)
    def get_core_engine_for_request(self: Any, request: Any) -> bytes:
        front_end = front_end_of(self)
        if front_end is None:
            engine: bytes = choose(self, request)
            return engine
        return front_end.route(self, request, choose)

    @wraps(outputs)
    async def process_engine_outputs(self: Any, engine_outputs: Any) -> None:
        front_end = front_end_of(self)
        if front_end is not None and engine_outputs.finished_requests:
            front_end.finished(engine_outputs.finished_requests)
        await outputs(self, engine_outputs)

    DPLBAsyncMPClient.__init__ = client_init
    DPLBAsyncMPClient.get_core_engine_for_request = get_core_engine_for_request
    DPLBAsyncMPClient.process_engine_outputs = staticmethod(process_engine_outputs)
