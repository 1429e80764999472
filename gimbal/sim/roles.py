"""Engines of a cluster with prefill and decode apart, as by vLLM's NixlConnector.

A prefill engine answers with one token and keeps the KV blocks of the prompt until a decode engine
has read them. The decode engine allocates blocks for the whole prompt, for which it needs neither a
seat nor tokens of a step, and loads what its own prefix cache does not hold between steps. It then
computes the last token of the prompt anew, which gives the first token that a client sees. Prompts
that have come go before those that wait, in the order in which they got their blocks. One that is
preempted later is computed anew, all of it.

Source: vLLM 0.32, `v1/core/sched/scheduler.py` and `kv_connector/v1/nixl/pull_scheduler.py`.
"""

from __future__ import annotations

from gimbal.sim.engine import Engine
from gimbal.sim.requests import SimRequest, StepBatch


class PrefillEngine(Engine):
    """Keeps what it has finished until it has been read."""

    role = "prefill"

    def _end_prompt(self, request: SimRequest, end_us: float) -> None:
        request.last_token_us = end_us

    def transferred(self, request: SimRequest) -> None:
        """The KV of a prompt has been read: its blocks are free, and findable."""
        self._free(request, request.computed)


class DecodeEngine(Engine):
    """Loads prompts marked `SimRequest.loads`."""

    role = "decode"

    def _lacking(self, request: SimRequest) -> int:
        return self.loads.wait(request) if request.loads else super()._lacking(request)

    def _admit_waiting(self, now_s: float, batch: StepBatch) -> None:
        while self._left > 0 and len(self.running) < self.seats and self.loads.there:
            request = self.loads.take()
            self._run(request)
            # The last token's block, where it has one of its own, is taken again with the token.
            self.used_blocks -= self.blocks_for(request.target) - self.blocks_for(request.computed)
            self._left -= self._prefill(request, self._left, batch)
        super()._admit_waiting(now_s, batch)

    def _start(self, request: SimRequest, batch: StepBatch) -> None:
        if not request.loads:
            super()._start(request, batch)
            return
        self._take_found(request)
        self.used_blocks += self.blocks_for(request.target) - self.blocks_for(request.computed)
        if self._cache is not None:
            self._cache.shrink(self.blocks_total - self.used_blocks)
        self.loads.begin(request)

    def transferred(self, request: SimRequest) -> None:
        """The KV of a prompt has come: it can start."""
        self.loads.come(request)
        if self._cache is not None:
            self._cache.computed(request)
