"""One step's prefill, decided: how many tokens the step may have, and who may prefill how many.

vLLM serves its running list in order and then admits from the waiting queue while tokens last.
Three decisions are made around that, all here, for an engine on a server and for a simulated one
alike:

graphs      whether the step is cut to what a CUDA graph covers (``graph_steps``, `graph_steps`);
budget      how much prefill may ride along with decodes (``step_budget``, `budget`);
sharing     how many tokens each running prefill may have, so that shorter newcomers and decodes get
            theirs (``in_batch``, `budget`).

An engine is shown as a `StepView`. Its attributes are read once each and only where the answer
depends on them, so whoever builds a view may look a thing up when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gimbal.core.queue.budget import (
    PrefillCandidate,
    PrefillSharing,
    StepCost,
    bounded_prefill_tokens,
    share_prefill_budget,
)
from gimbal.core.queue.graph_steps import fits_graph_steps

if TYPE_CHECKING:
    from gimbal.core.config import QueueConfig

UNKNOWN_COST = StepCost(0.0, 0.0)
LEAST_TOKENS = 16
"""What the first running prefill gets of a step that decodes fill."""


class GraphPrices(Protocol):
    """What a view knows of steps with and without CUDA graphs; see `graph_steps.GraphStepCosts`."""

    @property
    def graph_tokens(self) -> int: ...
    @property
    def exploring(self) -> bool: ...
    @property
    def flat_tokens(self) -> int: ...
    def small_steps_pay(self, backlog_tokens: float) -> bool:
        """Whether prefilling `backlog_tokens` in small steps delays those who decode less."""
        ...


class StepView(Protocol):
    """One engine just before a step is put together.

    Attributes:
        budget_tokens: the most that the step may have (``max_num_batched_tokens``).
        chunked: prompts may be prefilled in chunks.
        held_back: ``--prefill-schedule-interval`` holds prefill beside decodes back in this step,
            and nobody was left waiting by the last step with prefill, which lifts that.
        decoding: running requests past their prompt.
        decode_tokens: what they take of this step.
        running: running prefills in the order in which they are served; their ``tokens`` are what
            they lack.
        may_yield: newcomers may claim what a running prefill could use (`StepMemory.may_yield`).
        newcomers: waiting requests, in order, for whom there is a seat and KV space in this step.
        longest_chunk_tokens: the most of one prompt in one step; 0 is no limit.
        backlog_tokens: prefill that waits or runs on this engine, as of now.
        group_backlog_tokens: the same as published, on the engine of the lock-step group that has
            most, so that all engines decide by the same figure.
        group_decode_tokens: as published, on the engine that has most.
        group_prefill_share: of the group's latest steps that prefill (`budget.smoothed_share`).
        cost: learned cost of a step of the group, and of a token of the prompt that is next here.
        block_tokens: tokens of a KV block, the least prefill of a step without graphs.
        oldest_wait_us: how long the oldest prompt that waits or runs has been here.
        graphs: what steps with and without CUDA graphs take; None where a step is never cut.
    """

    @property
    def budget_tokens(self) -> int: ...
    @property
    def chunked(self) -> bool: ...
    @property
    def held_back(self) -> bool: ...
    @property
    def decoding(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def running(self) -> Sequence[PrefillCandidate]: ...
    @property
    def may_yield(self) -> bool: ...
    @property
    def newcomers(self) -> Sequence[PrefillCandidate]: ...
    @property
    def longest_chunk_tokens(self) -> int: ...
    @property
    def backlog_tokens(self) -> int: ...
    @property
    def group_backlog_tokens(self) -> float: ...
    @property
    def group_decode_tokens(self) -> float: ...
    @property
    def group_prefill_share(self) -> float: ...
    @property
    def cost(self) -> StepCost: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def oldest_wait_us(self) -> float: ...
    @property
    def graphs(self) -> GraphPrices | None: ...


@dataclass(frozen=True, slots=True)
class RecordedView:
    """A `StepView` as data: for records, tables and tests."""

    budget_tokens: int
    chunked: bool = True
    held_back: bool = False
    decoding: int = 0
    decode_tokens: int = 0
    running: tuple[PrefillCandidate, ...] = ()
    may_yield: bool = True
    newcomers: tuple[PrefillCandidate, ...] = ()
    longest_chunk_tokens: int = 0
    backlog_tokens: int = 0
    group_backlog_tokens: float = 0.0
    group_decode_tokens: float = 0.0
    group_prefill_share: float = 1.0
    cost: StepCost = UNKNOWN_COST
    block_tokens: int = 16
    oldest_wait_us: float = 0.0
    graphs: GraphPrices | None = None


def record(view: StepView) -> RecordedView:
    """`view` with every attribute looked up."""
    values = {name: getattr(view, name) for name in RecordedView.__dataclass_fields__}
    values["running"] = tuple(values["running"])
    values["newcomers"] = tuple(values["newcomers"])
    return RecordedView(**values)


class StepDecision(NamedTuple):
    """What one step may do; immutable.

    Attributes:
        budget_tokens: all tokens of the step, at most the view's.
        admit: False: no prefill in this step.
        caps: most prefill tokens of each of the view's running prefills; None: no limits.
        claimed: a newcomer claims what a running prefill could use.
        asked_graphs: measured steps were asked, and said that small ones pay.
        cut: the budget is what a CUDA graph covers.
    """

    budget_tokens: int
    admit: bool = True
    caps: tuple[int, ...] | None = None
    claimed: bool = False
    asked_graphs: bool = False
    cut: bool = False


def leaves_to_vllm(config: QueueConfig) -> bool:
    """Whether `decide` never differs from vLLM's own rule: nothing is switched on."""
    sizes = config.graph_steps > 0.0 or config.step_budget
    return not (config.in_batch or config.room_tokens or sizes)


def decide(view: StepView, config: QueueConfig) -> StepDecision:
    """The decisions of one step.

    Args:
        config: section `queue`, less what the ordering cannot do (`traits.usable`).
    """
    budget = view.budget_tokens
    decoding = view.decoding
    if decoding > 0 and view.held_back:
        return StepDecision(budget, False)
    graphs = view.graphs if config.graph_steps > 0.0 else None
    if graphs is not None and not 0 < graphs.graph_tokens < budget:
        graphs = None
    running = view.running if config.in_batch else ()
    # A step without decodes of its own stalls those of the engines that step with it.
    bounded = config.step_budget and (decoding > 0 or view.group_decode_tokens > 0.0)
    decodes = 0
    if graphs is not None or running:
        decodes = view.decode_tokens  # a server counts it over all that run
    asked = cut = False
    if graphs is not None:
        graph_tokens, asked = _graph_tokens(view, graphs, budget, decodes, config.graph_steps)
        cut = graph_tokens < budget
        budget = graph_tokens
    if bounded and not cut:
        budget = _bounded(view, budget, decodes, config)
    if not running:
        return StepDecision(budget, True, None, False, asked, cut)
    caps, claimed = _caps(view, running, budget, decodes)
    return StepDecision(budget, True, caps, claimed, asked, cut)


def _graph_tokens(
    view: StepView, graphs: GraphPrices, budget_tokens: int, decodes: int, most_steps: float
) -> tuple[int, bool]:
    """Tokens of a step where a CUDA graph had better cover it, and whether small steps pay."""
    graph, backlog = graphs.graph_tokens, view.backlog_tokens
    if backlog + decodes <= graph:
        return budget_tokens, False
    most_backlog = max(backlog, view.group_backlog_tokens)
    most_decodes = max(decodes, view.group_decode_tokens)
    fits = fits_graph_steps(most_backlog, most_decodes, graph, most_steps)
    if not (most_decodes > 0 and fits and graphs.small_steps_pay(most_backlog)):
        return budget_tokens, False
    return (budget_tokens if graphs.exploring else graph), True


def _bounded(view: StepView, budget_tokens: int, decodes: int, config: QueueConfig) -> int:
    """Tokens of a step beside `decodes`, 0 while uncounted; at most `budget_tokens`."""
    backlog = view.group_backlog_tokens
    # Without chunked prefill a prompt above the budget would stop everybody behind it.
    if backlog <= view.block_tokens or not view.chunked:
        return budget_tokens
    ttft_us = 1e3 * config.slo_ttft_ms
    prefill = bounded_prefill_tokens(
        view.cost,
        budget_tokens,
        backlog,
        waited_us=view.oldest_wait_us if ttft_us else 0.0,
        ttft_us=ttft_us,
        tpot_us=1e3 * config.slo_tpot_ms,
        min_tokens=view.block_tokens,
        prefill_share=view.group_prefill_share,
    )
    if prefill >= budget_tokens:
        return budget_tokens  # however many decode: they are counted only where it matters
    decodes = decodes or view.decode_tokens
    # What a CUDA graph covers is prefilled at once: less would take as long.
    # Nor does one that no graph covers take longer until its work hides its launches.
    if (graphs := view.graphs) is not None:
        covered = graphs.graph_tokens - decodes
        prefill = max(prefill, graphs.flat_tokens) if prefill > covered else covered
    return min(budget_tokens, decodes + prefill)


def _caps(
    view: StepView, running: Sequence[PrefillCandidate], budget_tokens: int, decodes: int
) -> tuple[tuple[int, ...] | None, bool]:
    """Caps of the running prefills, and whether a newcomer claims what one could use.

    They leave what newcomers with smaller keys claim, and what every decode takes: vLLM serves its
    running list in order, and whoever was admitted past a long prefill stands behind it there, so
    that its decode would wait until that prefill is done.
    """
    newcomers = view.newcomers if view.may_yield else ()
    left = max(0, budget_tokens - decodes)
    if not newcomers and (not decodes or sum([c.tokens for c in running]) <= left):
        return None, False  # nobody behind them in the running list goes without
    longest = min(view.longest_chunk_tokens or budget_tokens, budget_tokens)
    own = [PrefillCandidate(c.key, min(c.tokens, longest)) for c in running]
    shares = share_prefill_budget(own, (), left)
    claimed = False
    if newcomers:
        theirs = [PrefillCandidate(c.key, min(c.tokens, longest)) for c in newcomers]
        alone, shares = shares, share_prefill_budget(own, theirs, left)
        claimed = shares != alone
    if left < LEAST_TOKENS and not any(shares):
        # Where decodes fill the step, the first prefill still moves on.
        first = min(range(len(own)), key=lambda index: own[index].key)
        shares[first] = min(LEAST_TOKENS, own[first].tokens)
    return tuple(shares), claimed


class StepMemory:
    """What the steps of one engine tell the next ones.

    Attributes:
        yields: steps in which a running prefill left budget to newcomers.
        graph_steps: steps whose prefill was cut to what a CUDA graph covers.
    """

    def __init__(self) -> None:
        self.yields = 0
        self.graph_steps = 0
        self._sharing = PrefillSharing()

    def may_yield(self, step: int) -> bool:
        """Whether newcomers may claim anything in scheduling pass number `step`."""
        return self._sharing.may_yield(step)

    def ended(self, step: int, decision: StepDecision, tokens: int, somebody_waits: bool) -> None:
        """Scheduling pass number `step` is over.

        Args:
            tokens: what was scheduled, decodes included.
            somebody_waits: the waiting queue is not empty.
        """
        self.graph_steps += decision.cut and 0 < tokens == decision.budget_tokens
        if decision.claimed:
            self.yields += 1
            # When tokens are left unused, nothing is yielded for a while.
            if somebody_waits and tokens < decision.budget_tokens:
                self._sharing.in_vain(step)
