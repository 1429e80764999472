"""KV connectors that go by what was scheduled, wherever a chunk of prefill ends."""

from __future__ import annotations

from typing import Any

FOLLOW = frozenset(
    {
        "DecodeBenchConnector",
        "HF3FSKVConnector",
        "LMCacheConnectorV1",
        "MoRIIOConnector",
        "MooncakeConnector",
        "MooncakeStoreConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
    }
)
"""Read in vLLM 0.32: they hand over blocks at a request's end, or count the tokens of every step.

ExampleConnector stores a whole prompt with its first chunk: a shorter one would leave it wrong.
"""


def connector_with_chunks_of_its_own(vllm_config: Any) -> str:
    """The KV connector that may need the chunks vLLM makes; empty where none is known to."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return ""
    name = transfer.kv_connector
    if name != "MultiConnector":
        return "" if name in FOLLOW else str(name)
    members = transfer.kv_connector_extra_config.get("connectors", ())
    names = [str(member.get("kv_connector")) for member in members]
    return next((name for name in names if name not in FOLLOW), "")
