"""The scheduler of an engine: whatever class vLLM would use, with Gimbal's signals attached.

`with_gimbal` derives a class from the one vLLM picks (``AsyncScheduler`` unless the user named
another), so asynchronous scheduling stays as it was. The overrides only report events to
`SchedulerSignals`; every report is guarded, so a fault in the accounting costs the signals and
never a request. The queue level's own overrides are in `queue.level.GimbalQueueMixin`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from gimbal.core.config import GimbalConfig
from gimbal.core.errors import InputError
from gimbal.core.guard import LevelGuard
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin import bridge
from gimbal.vllm_plugin.engine import news
from gimbal.vllm_plugin.engine.identity import too_many_engines
from gimbal.vllm_plugin.engine.publishing import open_signals
from gimbal.vllm_plugin.engine.signals import SchedulerSignals
from gimbal.vllm_plugin.engine.state import EngineState
from gimbal.vllm_plugin.engine.waiting import loads_failed

logger = logging.getLogger("vllm.gimbal")

LEVELS_IN_SCHEDULER = frozenset({"dispatch", "queue", "feedback"})
"""Any of these needs the derived scheduler: for its signals, its queue, or both."""


class GimbalSchedulerMixin:
    """Overrides of vLLM's ``Scheduler``; mixed in front of it by `with_gimbal`.

    Attributes:
        gimbal_config: the server's Gimbal configuration.
        gimbal_signals: the engine's counters and its board slot; None once they failed for good.
        gimbal_state: what the signals write and the queue reads; empty without signals, and None
            where not even that can be had.
    """

    gimbal_config: GimbalConfig
    gimbal_signals: SchedulerSignals | None = None
    gimbal_state: EngineState | None
    connector: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gimbal_guard = LevelGuard("signals")
        signals = self.gimbal_signals = self._gimbal_guard.run("no_board", open_signals, self)
        if signals is not None:
            self.gimbal_state = signals.state
            self._gimbal_guard.run("connector", self._gimbal_hear_connector)
        else:
            self.gimbal_state = self._gimbal_guard.run("no_state", EngineState, self)
        if self.gimbal_state is not None:
            self._gimbal_install_queue()

    def _gimbal_hear_connector(self) -> None:
        """Has the signals hear what the KV connector answers vLLM; they ask nothing themselves."""
        connector = self.connector
        if connector is not None:
            ask = connector.get_num_new_matched_tokens
            connector.get_num_new_matched_tokens = self._gimbal_heard_by_signals(ask)

    def _gimbal_heard_by_signals(self, ask: Any) -> Any:
        @wraps(ask)
        def get_num_new_matched_tokens(request: Any, num_computed_tokens: int) -> Any:
            answer = ask(request, num_computed_tokens)
            self._gimbal_report(SchedulerSignals.asked, request, num_computed_tokens, answer)
            return answer

        return get_num_new_matched_tokens

    def _gimbal_install_queue(self) -> None:
        """Where the queue level replaces ``self.waiting``; without it vLLM's own queue stays."""

    def _gimbal_report(self, event: Callable[..., None], *args: Any) -> None:
        """Tells the signals of `event`, one of their methods; without signals it says nothing."""
        signals = self.gimbal_signals
        if signals is None:
            return
        guard = self._gimbal_guard
        if guard.disabled:
            self._gimbal_without_signals(signals)
            return
        try:
            event(signals, *args)
        except Exception as error:
            guard.fell_back(event.__name__, error)
            # Counters that missed an event are wrong for good: rebuild them from the scheduler.
            signals.needs_recount = True
            signals.row[Field.SIGNAL_FALLBACKS] += 1
        else:
            guard.succeeded(event.__name__)

    def _gimbal_without_signals(self, signals: SchedulerSignals) -> None:
        """Lets go of them for good; the queue sees an engine that knows nothing of itself."""
        self.gimbal_signals = None
        if self.gimbal_state is not None:
            self._gimbal_guard.run("forget", self.gimbal_state.forget)
        self._gimbal_guard.run("close", signals.close)

    def _gimbal_heard(self, signals: SchedulerSignals, answer: Any) -> None:
        """Takes up what the worker put on a step's output: see `news`; absent without news."""
        fallbacks = getattr(answer, news.FALLBACKS, None)
        if fallbacks is not None:
            signals.worker_said(Field.PLACEMENT_FALLBACKS, fallbacks)
        if getattr(answer, news.OFF, False):
            signals.worker_said(Field.PLACEMENT_OFF, 1.0)
        for field, value in getattr(answer, news.PLACEMENT, {}).items():
            signals.worker_said(field, value)
        pressure_us = getattr(answer, news.PRESSURE_US, None)
        if pressure_us is not None and "feedback" in self.gimbal_config.levels:
            signals.worker_said(Field.EXPERT_PRESSURE_US, pressure_us)

    def add_request(self, request: Any) -> None:
        self._gimbal_report(SchedulerSignals.accepted, request)
        super().add_request(request)  # type: ignore[misc]
        self._gimbal_report(SchedulerSignals.updated, request.request_id)

    def _enqueue_waiting_request(self, request: Any) -> None:
        # Before the queue sees it: an ordering needs the uncached tokens found here.
        self._gimbal_report(SchedulerSignals.enqueued, request)
        super()._enqueue_waiting_request(request)  # type: ignore[misc]

    def _update_waiting_for_remote_kv(self, request: Any) -> None:
        super()._update_waiting_for_remote_kv(request)  # type: ignore[misc]
        self._gimbal_report(SchedulerSignals.come, request)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self._gimbal_report(SchedulerSignals.preempting, request)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self._gimbal_report(SchedulerSignals.preempted, request)

    def _handle_stopped_request(self, request: Any) -> bool:
        self._gimbal_report(SchedulerSignals.stopped, request)
        return bool(super()._handle_stopped_request(request))  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._gimbal_report(SchedulerSignals.freed, request)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._gimbal_report(SchedulerSignals.scheduled, output)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._gimbal_report(SchedulerSignals.completing)
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, *args, **kwargs
        )
        if len(args) > 0 and self._gimbal_guard.run("loads", loads_failed, args[0]):
            self._gimbal_report(SchedulerSignals.loads_failed)
        self._gimbal_report(SchedulerSignals.completed, scheduler_output)
        if self.gimbal_signals is not None and args:
            self._gimbal_guard.run("news", self._gimbal_heard, self.gimbal_signals, args[0])
        return outputs

    def has_requests(self) -> bool:
        # vLLM asks this before every step and before it waits for input, so an engine without
        # work still says so, and keeps saying so while it runs dummy batches.
        busy = bool(super().has_requests())  # type: ignore[misc]
        if not busy:
            self._gimbal_report(SchedulerSignals.idle)
        return busy

    def shutdown(self) -> None:
        signals, self.gimbal_signals = self.gimbal_signals, None
        if signals is not None:
            self._gimbal_guard.run("close", signals.close)
        super().shutdown()  # type: ignore[misc]


def with_gimbal(base: type, config: GimbalConfig) -> type:
    """`base` with Gimbal in front, named after it; returns `base` when it cannot carry Gimbal."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if not issubclass(base, Scheduler):
        logger.error(
            "Gimbal needs a subclass of vLLM's Scheduler; %s is none: its engine publishes no "
            "signals and keeps its own queue",
            base.__qualname__,
        )
        return base
    if issubclass(base, GimbalSchedulerMixin):
        return base
    members = {"gimbal_config": config, "__module__": base.__module__, "__doc__": base.__doc__}
    mixins: tuple[type, ...] = (GimbalSchedulerMixin,)
    if "queue" in config.levels:
        from gimbal.vllm_plugin.queue.level import GimbalQueueMixin

        mixins = (GimbalQueueMixin, GimbalSchedulerMixin)
    return type(f"Gimbal{base.__name__}", (*mixins, base), members)


def _needs_signals(config: GimbalConfig) -> bool:
    return bool(config.publish_to or LEVELS_IN_SCHEDULER.intersection(config.levels))


def build_scheduler(base: type, *args: Any, **kwargs: Any) -> Any:
    """The scheduler that vLLM asks `base` for; Gimbal's where the configuration wants one."""
    try:
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        config = bridge.gimbal_config(vllm_config)
        if config is not None and _needs_signals(config):
            reason = too_many_engines(vllm_config)
            if reason is None:
                base = with_gimbal(base, config)
            else:
                logger.warning("Gimbal: no signals and no queue in this engine: %s", reason)
    except InputError:
        raise
    except Exception:
        logger.exception("Gimbal: no signals and no queue in this engine; vLLM runs without")
    return base(*args, **kwargs)


def install() -> None:
    """Has ``EngineCore`` build its scheduler through `build_scheduler`.

    Not through ``EngineCore.__init__``: in an engine process that already runs when vLLM loads
    plugins, and the class is asked for without the ``VllmConfig`` that the instance gets.
    """
    from vllm.config.scheduler import SchedulerConfig

    SchedulerConfig.get_scheduler_cls = _built_by_gimbal(SchedulerConfig.get_scheduler_cls)


def _built_by_gimbal(get_scheduler_cls: Any) -> Any:
    @wraps(get_scheduler_cls)
    def scheduler_cls(self: Any) -> Any:
        return partial(build_scheduler, get_scheduler_cls(self))

    return scheduler_cls
