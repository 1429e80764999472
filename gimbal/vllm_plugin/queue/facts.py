"""What the queue level asks about its engine, answered from vLLM's scheduler and engine state."""

from __future__ import annotations

from typing import Any

from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.engine.state import EngineState


class EngineFacts:
    """Implements `waiting_queue.QueueFacts`; writes the KV blocks that a step keeps free.

    Args:
        scheduler: vLLM's scheduler.
        state: the engine's, see `EngineState`.
    """

    def __init__(self, scheduler: Any, state: EngineState) -> None:
        self.scheduler = scheduler
        self.state = state
        self._manager = scheduler.kv_cache_manager
        self.pool = self._manager.block_pool
        # Most tokens that must fit at once, read once: this is asked at every admission.
        self._most_tokens = int(
            scheduler.max_model_len
            if scheduler.scheduler_reserve_full_isl
            else min(scheduler.max_model_len, scheduler.max_num_scheduled_tokens)
        )
        self._block_tokens = int(scheduler.block_size)

    def field(self, field: Field) -> float:
        """One column of this engine's own snapshot; 0 without signals."""
        return self.state.row.item(field)

    def uncached_tokens(self, request: Any) -> int:
        """As the signals counted when they looked the prompt up in the prefix cache."""
        entry = self.state.waiting.get(request.request_id)
        if entry is not None:
            return entry.uncached
        # A path into the queue that the signals do not see leaves the whole prompt.
        return max(0, int(request.num_tokens - request.num_computed_tokens))

    def loads(self, request: Any) -> bool:
        """Whether a KV connector is going to load for a request that waits."""
        entry = self.state.waiting.get(request.request_id)
        return entry is not None and entry.awaited > 0

    def prefill_tokens_per_s(self) -> float:
        return self.field(Field.PREFILL_TOKENS_PER_S)

    def running_prefill_tokens(self) -> int:
        return int(self.field(Field.RUNNING_PREFILL_TOKENS))

    def keep_free(self, blocks: int) -> None:
        """Has vLLM admit nobody beside running requests into the last `blocks` free KV blocks.

        Until the step has been scheduled: `level` puts vLLM's own number back.
        """
        self._manager.watermark_blocks = max(self._manager.watermark_blocks, blocks)

    def keep_more_free(self, blocks: int) -> None:
        """A request was admitted: so many blocks more."""
        self._manager.watermark_blocks += blocks

    def kept_blocks(self) -> int:
        """What a waiting request must leave free."""
        return int(self._manager.watermark_blocks) if self.scheduler.running else 0

    def free_blocks(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def blocks_needed(self, item: Any, free: int) -> int:
        """Blocks vLLM wants free before it admits the request `item`, those kept free included."""
        kept = self.kept_blocks()
        return self.own_blocks(item, free - kept) + kept

    def own_blocks(self, item: Any, free: int) -> int:
        """Blocks the request `item` takes (``full_sequence_must_fit``).

        Shared-prefix blocks that are in use need no free one; they are looked up only when the
        request would not fit otherwise.
        """
        tokens = min(item.num_tokens, self._most_tokens)
        needed: int = -(-tokens // self._block_tokens)
        if needed > free and item.num_computed_tokens == 0:
            groups = self._manager.get_computed_blocks(item)[0].blocks
            needed -= sum(block.ref_cnt > 0 for group in groups[:1] for block in group)
        return needed
