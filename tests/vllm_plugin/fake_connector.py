"""A KV connector of vLLM's that loads what a test says, and moves nothing."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)


class FakeConnector(KVConnectorBase_V1):
    """Scheduler side only.

    Attributes:
        stored: request id -> tokens of its prompt that can be loaded, or None while unknown.
        between_steps: loads take place between steps, and end when the worker says so.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.stored: dict[str, int | None] = {}
        self.between_steps = True

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        params = request.kv_transfer_params or {}
        whole = request.num_prompt_tokens if params.get("do_remote_prefill") else 0
        stored = self.stored.get(request.request_id, whole)
        if stored is None:
            return None, False
        tokens = max(stored - num_computed_tokens, 0)
        return tokens, tokens > 0 and self.between_steps

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """As NIXL does: each request loads once."""
        if num_external_tokens:
            self.stored.pop(request.request_id, None)
            if request.kv_transfer_params:
                request.kv_transfer_params["do_remote_prefill"] = False

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kw: Any
    ) -> None: ...
    def wait_for_save(self) -> None: ...


class NixlConnector(FakeConnector):
    """By a name that is known to follow chunks."""


def loaded(*request_ids: str, invalid_blocks: tuple[int, ...] = ()) -> Any:
    """Puts on a step's result that the loads of `request_ids` are over; see `finish_step`."""
    from vllm.v1.outputs import KVConnectorOutput

    def attach(result: Any) -> None:
        result.kv_connector_output = KVConnectorOutput(
            finished_recving=set(request_ids), invalid_block_ids=set(invalid_blocks)
        )

    return attach


def prefilled_elsewhere(request: Any) -> Any:
    """`request` as a router of prefill and decode engines sends it to the latter."""
    request.kv_transfer_params = {"do_remote_prefill": True, "do_remote_decode": False}
    return request
