"""One simulated engine's prefix cache: what is found again, shared and evicted, as in vLLM.

A trace names what a prompt holds place by place; two prompts with the same name at a place have
everything up to its end in common. What is computed can be found from the step on that computes
it, by requests that start meanwhile as well. Blocks in use are counted once, whoever shares them;
two requests that compute the same at the same time keep their own blocks. Blocks that nobody uses
stay findable until their room is needed: least recently used first, and of one prompt the end
before the beginning.

Source: vLLM 0.32, `v1/core/kv_cache_manager.py` and `v1/core/block_pool.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from gimbal.sim.requests import SimRequest


class PrefixCache:
    """What one engine can find again.

    Args:
        block_tokens: tokens of a KV block; whole ones are cached.
        place_tokens: tokens that one name of ``prefix_blocks`` stands for.

    Attributes:
        idle_blocks: KV blocks that can be found and that no running request uses.
    """

    def __init__(self, block_tokens: int, place_tokens: int) -> None:
        self.idle_blocks = 0
        self._block_tokens = block_tokens
        # Places shorter than a block are taken together, by the name of the last.
        self._together = -(-block_tokens // place_tokens)
        self._place_tokens = place_tokens * self._together
        self._tokens: dict[int, int] = {}  # name -> tokens held of it
        self._users: dict[int, int] = {}  # name -> running requests that use it
        self._idle: OrderedDict[int, None] = OrderedDict()  # names without users, oldest first

    def found_tokens(self, request: SimRequest) -> int:
        """Leading tokens that need no computing, in whole blocks; the last token always does."""
        tokens, whole = 0, self._place_tokens
        for name in self._names(request.prefix_blocks):
            held = self._tokens.get(name, 0)
            tokens += held
            if held < whole:
                break
        tokens = min(tokens, request.prompt_tokens, request.target - 1)
        return tokens // self._block_tokens * self._block_tokens

    def shared_blocks(self, request: SimRequest) -> int:
        """Of the KV blocks that `request` finds, those that others use already."""
        return sum(self._blocks(name) for name in self._found(request) if name in self._users)

    def take(self, request: SimRequest) -> int:
        """`request` starts, `request.computed` tokens found; returns KV blocks this occupies."""
        occupied = 0
        for name in (names := self._found(request)):
            if name in self._users:
                self._users[name] += 1
                continue
            self._users[name] = 1
            del self._idle[name]
            occupied += self._blocks(name)
        self.idle_blocks -= occupied
        request.held = list(names)
        request.shared_blocks = sum(map(self._blocks, names))
        request.named_places = request.computed // self._place_tokens
        return occupied

    def computed(self, request: SimRequest) -> None:
        """Names what `request` has computed of its prompt: its own blocks become shared ones."""
        names, place_tokens = self._names(request.prefix_blocks), self._place_tokens
        done = min(request.computed, request.prompt_tokens)
        place = request.named_places
        while place < len(names) and place * place_tokens < done:
            held = min(place_tokens, done - place * place_tokens)
            if held < place_tokens and done < request.prompt_tokens:
                return
            self._name(request, names[place], held)
            place += 1
            request.named_places = place

    def _name(self, request: SimRequest, name: int, held: int) -> None:
        blocks, before = held // self._block_tokens, 0
        if name in self._tokens:
            before = self._blocks(name)
            if blocks <= before or (name in self._users and name not in request.held[-1:]):
                return
        if not blocks:
            return
        if name not in self._users:
            if before:
                del self._idle[name]
                self.idle_blocks -= before
                before = 0
            self._users[name] = 1
            request.held.append(name)
        self._tokens[name] = held
        request.shared_blocks += blocks - before

    def release(self, request: SimRequest) -> int:
        """`request` is over or preempted; returns the KV blocks that nobody uses any more."""
        freed = 0
        for name in reversed(request.held):
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self._idle[name] = None
                freed += self._blocks(name)
        self.idle_blocks += freed
        request.held, request.shared_blocks, request.named_places = [], 0, 0
        return freed

    def answered(self, request: SimRequest) -> None:
        """Keeps the answer of a request that is over, where a later prompt names it."""
        names, place_tokens = self._names(request.answered_blocks), self._place_tokens
        tokens = request.prompt_tokens + request.output_tokens - 1  # the last is never computed
        first = request.prompt_tokens // place_tokens
        for place in reversed(range(first, len(names))):  # as vLLM frees: the last goes first
            name, held = names[place], min(place_tokens, tokens - place * place_tokens)
            before = self._tokens.get(name, 0)
            if name in self._users or held // self._block_tokens <= before // self._block_tokens:
                continue
            self._tokens[name] = held
            self._idle[name] = None
            self._idle.move_to_end(name)
            self.idle_blocks += held // self._block_tokens - before // self._block_tokens

    def shrink(self, room_blocks: int) -> None:
        """Evicts until what is idle takes at most `room_blocks`."""
        while self.idle_blocks > room_blocks:
            name, _ = self._idle.popitem(last=False)
            self.idle_blocks -= self._blocks(name)
            del self._tokens[name]

    def _found(self, request: SimRequest) -> Sequence[int]:
        """Names under `request.computed` of which it uses every block.

        Of the last one it may use a part, where the end of a prompt is computed again; the request
        is then taken to have a copy.
        """
        names = self._names(request.prefix_blocks)
        places, rest = divmod(request.computed, self._place_tokens)
        if rest and self._blocks(names[places]) == rest // self._block_tokens:
            places += 1
        return names[:places]

    def _names(self, names: tuple[int, ...]) -> tuple[int, ...]:
        return names if self._together == 1 else names[self._together - 1 :: self._together]

    def _blocks(self, name: int) -> int:
        return self._tokens[name] // self._block_tokens
