"""What an engine's waiting requests lack: prompt tokens to compute, and KV cache to load.

A KV connector loads part of a prompt from elsewhere: a prefill engine (P/D), or a store. That part
is KV cache to come and no prefill. It is known from the request itself where a router has had it
prefilled (``do_remote_prefill``), else from what the connector answers when vLLM asks it. While it
is loaded it lies in blocks that the request holds, which are in use already.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Lack(NamedTuple):
    """One waiting request, in tokens.

    Attributes:
        uncached: to be computed.
        cached: held by the prefix cache when it was queued.
        awaited: to be loaded, without blocks so far.
        loaded: in blocks of its own, on their way or there.
    """

    uncached: int
    cached: int
    awaited: int = 0
    loaded: int = 0


class WaitingRequests:
    """All that wait in one engine, with running totals.

    Args:
        scheduler: vLLM's scheduler; only read.

    Attributes:
        total: the sum over all.
        loads: how many load, or will, as far as is known.
        loading: those among them that hold blocks; they are in no queue of Gimbal's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._entries: dict[str, Lack] = {}
        self._asked: list[Any] = []
        self.clear()

    def clear(self) -> None:
        """Nobody waits."""
        self._entries.clear()
        self._asked.clear()
        self._resized: dict[str, Any] = {}
        self.total = Lack(0, 0)
        self.loads = 0
        self.loading: dict[str, Any] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Any:
        return iter(self._entries)

    def get(self, request_id: str) -> Lack | None:
        """What is known of a waiting request."""
        return self._entries.get(request_id)

    def enter(self, request: Any) -> None:
        """`request` is queued; looks its prompt up in the prefix cache once."""
        held = request.num_computed_tokens
        cached = held or self._cached_tokens(request)
        uncached = max(request.num_tokens - cached, 0)
        awaited = uncached if not held and self._prefilled_elsewhere(request) else 0
        self._note(request, Lack(uncached - awaited, cached, awaited))

    def leave(self, request_id: str) -> None:
        """`request_id` waits no more, if it did."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._add(entry, -1)
            self.loading.pop(request_id, None)
            self._resized.pop(request_id, None)

    def asked(self, request: Any, cached: int, answer: tuple[int | None, bool]) -> None:
        """vLLM asked the connector about a waiting request of which `cached` tokens are here.

        Args:
            answer: the tokens beyond those that can be loaded, None while that is not known; and
                whether they come between steps.
        """
        tokens, between_steps = answer
        if tokens is None or request.request_id not in self._entries:
            return
        if request.skip_reading_prefix_cache:
            tokens = 0
        self._note(request, Lack(max(request.num_tokens - cached - tokens, 0), cached, tokens))
        if tokens and between_steps:
            self._asked.append(request)

    def scheduled(self) -> None:
        """A scheduling pass is over: of those that were asked about, some load now."""
        for request in self._asked:
            if request.request_id in self._entries and is_loading(request):
                self.hold(request)
        self._asked.clear()

    def hold(self, request: Any) -> None:
        """A load of `request` has begun, has come, or has failed: in whole where it has none."""
        loaded = request.num_computed_tokens
        self._note(request, Lack(max(request.num_tokens - loaded, 0), 0, 0, loaded))
        self.loading[request.request_id] = request

    def come(self, request: Any) -> None:
        """The load of `request` is over; without a token of it, its blocks are gone."""
        if request.num_computed_tokens:
            self.hold(request)
        else:
            self.enter(request)

    def failed(self) -> None:
        """Some loads have failed: what they were to bring has to be computed."""
        for request in list(self.loading.values()):
            self.hold(request)

    def recount(self) -> None:
        """Starts again from the scheduler's queues."""
        self.clear()
        scheduler = self._scheduler
        for request in scheduler.waiting:
            self.enter(request)
        for request in scheduler.kv_holding_waiting:
            session = scheduler.connector is None or request.resumable
            if session and not is_loading(request):
                self.enter(request)
            else:
                self.hold(request)

    def loading_uncached(self) -> int:
        """Tokens to be computed of those whose KV is on its way, or there."""
        return sum(self._entries[request_id].uncached for request_id in self.loading)

    def take_resized(self) -> list[Any]:
        """Requests that lack more or fewer tokens than when they were queued, each once."""
        resized = list(self._resized.values())
        self._resized.clear()
        return resized

    def _note(self, request: Any, entry: Lack) -> None:
        request_id = request.request_id
        before = self._entries.get(request_id)
        again = request_id in self._resized
        self.leave(request_id)
        self._entries[request_id] = entry
        self._add(entry, 1)
        changed = before is not None and before.uncached != entry.uncached
        if (again or changed) and not request.resumable:
            self._resized[request_id] = request

    def _add(self, entry: Lack, times: int) -> None:
        total = self.total
        self.total = Lack(
            total.uncached + times * entry.uncached,
            total.cached + times * entry.cached,
            total.awaited + times * entry.awaited,
            total.loaded + times * entry.loaded,
        )
        self.loads += times * bool(entry.awaited or entry.loaded)

    def _cached_tokens(self, request: Any) -> int:
        """Prompt tokens the prefix cache holds now, without touching its statistics."""
        scheduler = self._scheduler
        reported = getattr(request, "kv_cache_report_mode", "incremental")
        if scheduler.enable_kv_cache_events and reported == "full":
            return 0  # this lookup would publish KV events a second time
        return int(scheduler.kv_cache_manager.get_computed_blocks(request)[1])

    def _prefilled_elsewhere(self, request: Any) -> bool:
        return self._scheduler.connector is not None and prefilled_elsewhere(
            request.kv_transfer_params
        )


def prefilled_elsewhere(kv_transfer_params: Any) -> bool:
    """Whether a router has had the prompt prefilled by another engine, as vLLM counts it too."""
    return isinstance(kv_transfer_params, dict) and bool(
        kv_transfer_params.get("do_remote_prefill")
    )


def is_loading(request: Any) -> bool:
    """Whether a KV connector loads for `request` between steps."""
    return bool(request.status.name == "WAITING_FOR_REMOTE_KVS")


def lacks_prompt(request: Any) -> bool:
    """Whether a running request has prompt tokens to compute; a failed load gives some back."""
    return bool(request.is_prefill_chunk or request.num_computed_tokens < request.num_prompt_tokens)


def loads_failed(answer: Any) -> bool:
    """Whether a step's output says that KV could not be loaded."""
    said = getattr(answer, "kv_connector_output", None)
    failures = ("invalid_block_ids", "failed_recving")
    return said is not None and any(getattr(said, name, None) for name in failures)
