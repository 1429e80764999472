"""Level `queue` in one engine: the waiting queue, the step's prefill budget, the run-time switch.

`GimbalQueueMixin` sits in front of the scheduler class. Per step it sets, through levers vLLM
has, what core decided: ``max_num_scheduled_tokens`` (CUDA graphs, what decodes bear); for a
running prefill that yields to shorter newcomers and to decodes its chunk
(``_reserve_prefill_lookahead``, which vLLM asks about every chunk it is about to schedule); and the
KV blocks that admission leaves free (``KVCacheManager.watermark_blocks``). vLLM's ``schedule()``
itself is untouched. Once the level has switched itself off, ``scheduler.waiting`` is vLLM's own
queue again.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from math import isinf
from typing import Any

from gimbal.core.config import GimbalConfig, QueueConfig
from gimbal.core.contracts import QueueOrdering, traits_of
from gimbal.core.errors import InputError
from gimbal.core.guard import LevelGuard
from gimbal.core.queue import ORDERINGS
from gimbal.core.queue.admission import BlockedHeadGate, room_blocks
from gimbal.core.queue.step import StepDecision, StepMemory, decide, leaves_to_vllm
from gimbal.core.queue.traits import lacking, usable
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.engine.state import EngineState
from gimbal.vllm_plugin.queue.facts import EngineFacts
from gimbal.vllm_plugin.queue.step_view import SchedulerView
from gimbal.vllm_plugin.queue.waiting_queue import GimbalRequestQueue

logger = logging.getLogger("vllm.gimbal")

PUBLISH_STEPS = 8
"""Steps between two updates of the level's counters in the snapshot."""
OFF = "vllm"
"""What stands for an ordering while the level is switched off: vLLM's own queue."""


class QueueLevel:
    """The level's state in one engine; see the module.

    Args:
        scheduler: vLLM's scheduler, its ``waiting`` still vLLM's own and empty.
        config: the server's configuration.
        state: the engine's, see `EngineState`.

    Attributes:
        queue: what replaces ``scheduler.waiting``.
        ordering: name of the ordering in force.
        config: section `queue` in force; `configured` is what the server was started with.
        usable: `config` less what the ordering in force cannot do.
        memory: counts steps that yielded or were cut.
        guard: counts failures; when it is disabled the level leaves the engine to vLLM.
        over: it has done so.
    """

    def __init__(self, scheduler: Any, config: GimbalConfig, state: EngineState) -> None:
        self.scheduler = scheduler
        self.state = state
        self.config = self.configured = config.queue
        self.levels = config.levels
        self.guard = LevelGuard("queue")
        self.facts = EngineFacts(scheduler, state)
        self.ordering = self.config.ordering
        self.active = True
        self.over = False
        self._control: tuple[int, int] | None = None
        self._decision: StepDecision | None = None
        self.queue = GimbalRequestQueue(
            self._build(self.ordering, self.config),
            scheduler.policy,
            self.facts,
            self.guard,
            priority_tokens=self.config.priority_tokens,
        )
        self.memory = StepMemory()
        self.view = SchedulerView(scheduler, self.queue, self.facts, state, self.memory)
        self._use(self.ordering, self.config)
        self._say_what_it_does()

    def _say_what_it_does(self) -> None:
        missing = lacking(self.config, traits_of(self.queue.heap.ordering))
        if missing and self.ordering != OFF:
            logger.info(
                "Gimbal: queue ordering %s goes without %s: it does not declare the capability",
                self.ordering,
                ", ".join(missing),
            )
        if self.view.connector:
            logger.info(
                "Gimbal: prefill keeps vLLM's chunks: KV connector %s is not known to take others",
                self.view.connector,
            )
        graphs = self.view.graphs
        if graphs is not None and self.usable.graph_steps > 0.0:
            logger.info(
                "Gimbal: prefill keeps to steps of %d tokens, which replay CUDA graphs, where "
                "measured steps say that it pays",
                graphs.graph_tokens,
            )

    def _build(self, name: str, config: QueueConfig) -> QueueOrdering:
        """The server's own options are those of its own ordering, a control message's of any."""
        own, configured = config.options, self.configured
        applies = name == configured.ordering or own is not configured.options
        return ORDERINGS.build(name, own if applies else {})

    def _use(self, name: str, config: QueueConfig) -> None:
        """Puts ordering `name` and `config` in force; raises InputError and changes nothing."""
        queue = self.queue
        if name == OFF:
            queue.leave_to_vllm()
        else:
            ordering = self._build(name, config)
            allowed = usable(config, traits_of(ordering))
            queue.use_ordering(ordering, allowed.max_wait_s or None)
            queue.bound_s = getattr(ordering, "bound_s", None)
            # Blocks are counted for one kind of layer only: hybrid models keep vLLM's rule.
            plain = len(self.scheduler.kv_cache_config.kv_cache_groups) == 1
            if not plain:
                allowed = replace(allowed, pass_steps=0, room_tokens=0)
            passing = allowed.pass_steps > 0
            queue.room_blocks = -(-allowed.room_tokens // self.view.block_tokens)
            queue.gate = BlockedHeadGate(config.pass_steps, config.pass_s) if passing else None
            self.usable, self._leaves_to_vllm = allowed, leaves_to_vllm(allowed)
        self.ordering, self.config = name, config

    def _follow(self) -> None:
        """Takes up a new control message: ``levels``, ``ordering``, ``queue``."""
        source = self.state.control
        if source is None:
            return
        version = (source.control_version(), source.generation)
        if version == self._control:
            return
        control = source.read_control()
        self.active = "queue" in control.get("levels", self.levels)
        changes = control.get("queue", {}) if self.active else {}
        config = replace(self.configured, **changes)
        name = control.get("ordering", config.ordering) if self.active else OFF
        if name != self.ordering or config != self.config:
            try:
                self._use(name, config)
            except (InputError, ValueError) as error:
                logger.warning("Gimbal: the queue's ordering stays %s: %s", self.ordering, error)
            else:
                logger.info("Gimbal: queue ordering %s %s", name, changes or "")
        self._control = version  # not before: what failed is tried again

    def begin_step(self, throttled: bool) -> tuple[int, dict[str, int]]:
        """Before vLLM schedules: the step's token budget, and caps of running prefills.

        Args:
            throttled: vLLM holds prefills back in this step (``prefill_schedule_interval``).
        """
        self._follow()
        for request in self.state.waiting.take_resized():
            self.queue.resized(request)
        self.queue.begin_step()
        view, config = self.view, self.usable
        if view.step % PUBLISH_STEPS == 0:
            self.publish()
        view.begin(throttled)
        self._decision = None
        if view.nothing_to_prefill or self._leaves_to_vllm or self.queue.fallback is not None:
            return view.budget_tokens, {}
        self.facts.keep_free(room_blocks(view, config.room_tokens))
        decision = self._decision = decide(view, config)
        if decision.asked_graphs and view.graphs is not None:
            view.graphs.decided()
        budget = decision.budget_tokens
        if not 0 < budget <= view.budget_tokens:
            raise ValueError(f"a step of {budget} tokens, vLLM allows {view.budget_tokens}")
        if decision.caps is None:
            return budget, {}
        caps = zip(view.prefills, decision.caps, strict=True)
        # Caps of a whole chunk do no harm, and hold where vLLM's longest chunk is longer.
        return budget, {r.request_id: tokens for r, tokens in caps if tokens < budget}

    def end_step(self, tokens: int) -> None:
        """After vLLM has scheduled a step with `tokens`."""
        if self._decision is not None:
            waits = len(self.queue) > 0
            self.memory.ended(self.view.step, self._decision, tokens, waits)

    def leave(self) -> None:
        """Gives the engine back to vLLM for good: what waits is in vLLM's own queue again."""
        self.scheduler.waiting = self.queue.leave_to_vllm()
        self.over = True
        self.publish()

    def publish(self) -> None:
        """Puts the level's counters into the engine's next snapshot."""
        queue, row = self.queue, self.state.row
        oldest = queue.heap.oldest() if queue.fallback is None else None
        row[Field.QUEUE_OVERTAKES : Field.QUEUE_FALLBACKS + 1] = (
            queue.heap.overtakes,
            queue.heap.promotions,
            queue.passes,
            self.memory.yields,
            0.0 if oldest is None else (queue.clock() - oldest.queued_s) * 1e6,
            # 0 for no promise: an infinity would be no JSON in the status.
            0.0 if oldest is None or isinf(oldest.bound_s) else oldest.bound_s * 1e6,
            sum(self.guard.counts.values()),
        )
        row[Field.QUEUE_GRAPH_STEPS] = self.memory.graph_steps
        row[Field.QUEUE_OFF] = self.over or self.guard.disabled


class GimbalQueueMixin:
    """Overrides of vLLM's ``Scheduler`` for the queue level, in front of `GimbalSchedulerMixin`."""

    gimbal_config: GimbalConfig
    gimbal_state: EngineState
    gimbal_queue: QueueLevel | None = None
    max_num_scheduled_tokens: int
    kv_cache_manager: Any
    waiting: Any
    _reserve_prefill_lookahead: Any

    def _gimbal_install_queue(self) -> None:
        if "queue" not in self.gimbal_config.levels:
            return
        try:
            self.gimbal_queue = QueueLevel(self, self.gimbal_config, self.gimbal_state)
        except InputError:
            raise  # a configuration that names no ordering must be seen at start
        except Exception as error:
            LevelGuard("queue").fell_back("install", error)
            self.gimbal_state.row[[Field.QUEUE_FALLBACKS, Field.QUEUE_OFF]] = 1
        else:
            self.waiting = self.gimbal_queue.queue

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        level = self.gimbal_queue
        if level is None or level.over:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        guard, whole = level.guard, self.max_num_scheduled_tokens
        if guard.disabled:
            guard.run("leave", level.leave)
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        manager = self.kv_cache_manager
        watermark = manager.watermark_blocks
        throttled = bool(args[0] if args else kwargs.get("throttle_prefills", False))
        plan = guard.run("plan", level.begin_step, throttled)
        if plan is None:
            manager.watermark_blocks = watermark  # a failed plan may have raised it
        budget, caps = plan or (whole, {})
        self.max_num_scheduled_tokens = budget
        if caps:
            self._reserve_prefill_lookahead = _capped(self._reserve_prefill_lookahead, caps)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.max_num_scheduled_tokens = whole
            manager.watermark_blocks = watermark
            if caps:
                del self._reserve_prefill_lookahead
        guard.run("step", level.end_step, output.total_num_scheduled_tokens)
        return output


def _capped(original: Any, caps: dict[str, int]) -> Any:
    """vLLM's ``_reserve_prefill_lookahead``, asked about a chunk no larger than its cap."""

    def reserve(request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        cap = caps.get(request.request_id)
        if cap is not None and cap < num_new_tokens:
            num_new_tokens = cap
        return int(original(request, num_computed_tokens, num_new_tokens))

    return reserve
