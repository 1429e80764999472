"""Level `queue` in one engine: the waiting queue, the step's prefill budget, the run-time switch.

`GimbalQueueMixin` sits in front of the scheduler class. Per step it sets, through levers vLLM
has, what core decided: ``max_num_scheduled_tokens`` (CUDA graphs, decode protection); for a
running prefill that yields to shorter newcomers and to decodes its chunk
(``_reserve_prefill_lookahead``, which vLLM asks about every chunk it is about to schedule); and
``prefill_capacity_bound``, which lifts vLLM's prefill interval. vLLM's ``schedule()`` itself is
untouched.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from math import isinf
from typing import Any

from gimbal.board.slots import BoardReader
from gimbal.core.config import GimbalConfig
from gimbal.core.contracts import QueueOrdering
from gimbal.core.errors import InputError
from gimbal.core.guard import LevelGuard
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.admission import BlockedHeadGate
from gimbal.core.queue.gimbal import GimbalOrdering
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.queue.facts import EngineFacts
from gimbal.vllm_plugin.queue.step_plan import StepPlanner
from gimbal.vllm_plugin.queue.waiting_queue import GimbalRequestQueue

logger = logging.getLogger("vllm.gimbal")

PUBLISH_STEPS = 8
"""Steps between two updates of the level's counters in the snapshot."""
OFF = "fcfs"
"""The ordering while the level is switched off at run time: vLLM's."""


class QueueLevel:
    """The level's state in one engine; see the module.

    Args:
        scheduler: vLLM's scheduler, its ``waiting`` still vLLM's own and empty.
        config: the server's configuration.

    Attributes:
        queue: what replaces ``scheduler.waiting``.
        ordering: name of the ordering in force.
        config: section `queue` in force; `configured` is what the server was started with.
        guard: counts failures; when it is disabled the level leaves every step to vLLM.
    """

    def __init__(self, scheduler: Any, config: GimbalConfig) -> None:
        self.scheduler = scheduler
        self.config = self.configured = config.queue
        self.levels = config.levels
        self.guard = LevelGuard("queue")
        self.board = _board(scheduler)
        self.facts = EngineFacts(scheduler)
        self.ordering = self.config.ordering
        self.active = True
        self._control: tuple[int, int] | None = None
        self._steps = 0
        self.queue = GimbalRequestQueue(
            self._build(self.ordering),
            scheduler.policy,
            self.facts,
            self.guard,
            priority_tokens=self.config.priority_tokens,
        )
        parallel = scheduler.vllm_config.parallel_config
        engines = parallel.data_parallel_size
        reader = None
        if self.board is not None and engines > 1:
            reader = BoardReader(self.board, engines)
        self.planner = StepPlanner(scheduler, self.config, self.queue, self.facts, reader)
        self._use(self.ordering)
        if self.planner.graph_tokens and self.own_ordering and self.config.graph_steps > 0.0:
            logger.info(
                "Gimbal: prefill keeps to steps of %d tokens, which replay CUDA graphs, where "
                "measured steps say that it pays",
                self.planner.graph_tokens,
            )

    def _build(self, name: str) -> QueueOrdering:
        # The server's own options are those of its own ordering, a control message's of any.
        own, configured = self.config.options, self.configured
        applies = name == configured.ordering or own is not configured.options
        return ORDERINGS.build(name, own if applies else {})

    def _use(self, name: str) -> None:
        """Puts the ordering `name` in force, with what belongs to it; InputError if unknown."""
        ordering, config, queue = self._build(name), self.config, self.queue
        self.planner.config = config
        self.own_ordering = ours = isinstance(ordering, GimbalOrdering)
        queue.bound_s = ordering.bound_s if isinstance(ordering, GimbalOrdering) else None
        queue.use_ordering(ordering, (config.max_wait_s or None) if ours else None)
        # Blocks are counted for one kind of layer only: hybrid models keep vLLM's rule.
        plain = len(self.scheduler.kv_cache_config.kv_cache_groups) == 1
        passing = ours and plain and config.pass_steps > 0 and queue.fallback is None
        queue.gate = BlockedHeadGate(config.pass_steps, config.pass_s) if passing else None
        self.ordering = name

    def _follow(self) -> None:
        """Takes up a new control message of the board: ``levels``, ``ordering``, ``queue``."""
        board = self.board
        if board is None:
            return
        version = (board.control_version(), board.generation)
        if version == self._control:
            return
        self._control = version
        control = board.read_control()
        self.active = "queue" in control.get("levels", self.levels)
        changes = control.get("queue", {}) if self.active else {}
        config = replace(self.configured, **changes)
        name = control.get("ordering", config.ordering) if self.active else OFF
        if name == self.ordering and config == self.config:
            return
        before, self.config = self.config, config
        try:
            self._use(name)
        except (InputError, ValueError) as error:
            self.config = before
            logger.warning("Gimbal: the queue's ordering stays %s: %s", self.ordering, error)
        else:
            logger.info("Gimbal: queue ordering %s %s", name, changes or "")

    def begin_step(self, throttled: bool) -> tuple[int, dict[str, int]]:
        """Before vLLM schedules: the step's token budget, and caps of running prefills.

        Args:
            throttled: vLLM holds prefills back in this step (``prefill_schedule_interval``).
        """
        self._follow()
        self.queue.begin_step()
        if self._steps % PUBLISH_STEPS == 0:
            self.publish()
        self._steps += 1
        budget = int(self.scheduler.max_num_scheduled_tokens)
        if self.queue.fallback is not None or not self.own_ordering:
            return budget, {}
        if (throttled or self.planner.held_back()) and self.planner.deferred():
            return budget, {}
        if self.config.graph_steps > 0.0:
            budget = self.planner.graph_budget(budget)
        if self.config.protect_decodes:
            budget = self.planner.protected_budget(budget)
        return budget, self.planner.caps(budget) if self.config.in_batch else {}

    def publish(self) -> None:
        """Puts the level's counters into the engine's next snapshot."""
        signals = self.scheduler.gimbal_signals
        if signals is None:
            return
        queue, row = self.queue, signals.row
        oldest = queue.heap.oldest() if queue.fallback is None else None
        row[Field.QUEUE_OVERTAKES : Field.QUEUE_FALLBACKS + 1] = (
            queue.heap.overtakes,
            queue.heap.promotions,
            queue.passes,
            self.planner.yields,
            0.0 if oldest is None else (queue.clock() - oldest.queued_s) * 1e6,
            # 0 for no promise: an infinity would be no JSON in the status.
            0.0 if oldest is None or isinf(oldest.bound_s) else oldest.bound_s * 1e6,
            sum(self.guard.counts.values()),
        )
        row[Field.QUEUE_GRAPH_STEPS] = self.planner.graph_steps


def _board(scheduler: Any) -> Any:
    """The board the engine's signals publish on; None without signals or on another host."""
    signals = scheduler.gimbal_signals
    return getattr(signals.sink, "board", None) if signals is not None else None


class GimbalQueueMixin:
    """Overrides of vLLM's ``Scheduler`` for the queue level, in front of `GimbalSchedulerMixin`."""

    gimbal_config: GimbalConfig
    gimbal_queue: QueueLevel | None = None
    max_num_scheduled_tokens: int
    waiting: Any
    _reserve_prefill_lookahead: Any

    def _gimbal_install_queue(self) -> None:
        if "queue" not in self.gimbal_config.levels:
            return
        try:
            self.gimbal_queue = QueueLevel(self, self.gimbal_config)
        except InputError:
            raise  # a configuration that names no ordering must be seen at start
        except Exception as error:
            LevelGuard("queue").fell_back("install", error)
        else:
            self.waiting = self.gimbal_queue.queue

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        level = self.gimbal_queue
        if level is None or level.guard.disabled:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        whole = self.max_num_scheduled_tokens
        try:
            throttled = bool(args[0] if args else kwargs.get("throttle_prefills", False))
            budget, caps = level.begin_step(throttled)
            level.guard.succeeded()
        except Exception as error:
            level.guard.fell_back("plan", error)
            budget, caps = whole, {}
        if budget == whole and not caps:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.max_num_scheduled_tokens = budget
        if caps:
            self._reserve_prefill_lookahead = _capped(self._reserve_prefill_lookahead, caps)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.max_num_scheduled_tokens = whole
            if caps:
                del self._reserve_prefill_lookahead
        level.planner.scheduled(output.total_num_scheduled_tokens, budget, bool(caps))
        return output


def _capped(original: Any, caps: dict[str, int]) -> Any:
    """vLLM's ``_reserve_prefill_lookahead``, asked about a chunk no larger than its cap."""

    def reserve(request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        cap = caps.get(request.request_id)
        if cap is not None and cap < num_new_tokens:
            num_new_tokens = cap
        return int(original(request, num_computed_tokens, num_new_tokens))

    return reserve
