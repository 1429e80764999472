"""Prompts whose KV cache a decode engine loads, and how much of it is to come."""

from __future__ import annotations

from dataclasses import replace

from gimbal.sim.requests import SimRequest


class Loads:
    """What one engine loads.

    Attributes:
        awaiting: requests in the waiting queue that will load.
        awaited_tokens: what they will load.
        held: by request index, those with KV blocks, their KV on its way or there; in the order in
            which they got them.
        held_tokens: tokens of their prompts.
        begun: of them those of which nobody has begun to send the KV.
        there: how many of them have their KV.
    """

    def __init__(self) -> None:
        self.awaiting = self.awaited_tokens = self.held_tokens = self.there = 0
        self.held: dict[int, SimRequest] = {}
        self.begun: list[SimRequest] = []

    def wait(self, request: SimRequest) -> int:
        """`request` is queued; returns the tokens of it that are to be computed: none."""
        request.awaited = request.target - request.computed
        self.awaiting += 1
        self.awaited_tokens += request.awaited
        return 0

    def begin(self, request: SimRequest) -> None:
        """`request` has its blocks and leaves the waiting queue."""
        self.awaiting -= 1
        self.awaited_tokens -= request.awaited
        request.awaited = request.target - request.computed  # the cache may hold other than it did
        self.held[request.index] = request
        self.held_tokens += request.target
        self.begun.append(request)

    def come(self, request: SimRequest) -> None:
        """Its KV is there. From now on it counts as work, should it be preempted."""
        assert request.entry is not None
        request.loads, request.computed = False, request.target - 1
        request.entry.request = replace(request.entry.request, uncached_tokens=request.target)
        self.there += 1

    def take(self) -> SimRequest:
        """The first one that has its KV."""
        request = next(held for held in self.held.values() if not held.loads)
        self.there -= 1
        del self.held[request.index]
        self.held_tokens -= request.target
        return request
