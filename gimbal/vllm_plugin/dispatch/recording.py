"""An API server's requests as a trace, where the configuration names a folder for it."""

from __future__ import annotations

import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

from gimbal.core.config import GimbalConfig
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin import bridge
from gimbal.vllm_plugin.dispatch.metrics import dispatch_metrics
from gimbal.vllm_plugin.dispatch.request import describe
from gimbal.vllm_plugin.engine.identity import TRACE_SALT, close_at_exit
from gimbal.workloads.recorder import TraceRecorder

logger = logging.getLogger("vllm.gimbal")

_ATTRIBUTE = "_gimbal_recording"


class Recording:
    """The requests of one client of the engines; nothing here hurts one.

    Args:
        recorder: where they go.
    """

    def __init__(self, recorder: TraceRecorder) -> None:
        self.recorder = recorder
        self.guard = LevelGuard("trace", on_fallback=dispatch_metrics().fell_back)

    def sent(self, request: Any) -> None:
        """vLLM has sent `request` to an engine."""
        entry, tokens = describe(request)
        self.recorder.arrived(
            entry.request_id, request.arrival_time, entry.prompt_tokens, tokens, entry.session
        )

    def received(self, outputs: Any) -> None:
        """An engine's ``EngineCoreOutputs``."""
        generated = self.recorder.generated
        for output in outputs.outputs:
            generated(output.request_id, len(output.new_token_ids))
        if outputs.finished_requests:
            self.recorder.finished(outputs.finished_requests)


def start(client: Any) -> None:
    """Begins a recording of `client` where its server's configuration asks for one."""
    try:
        config = bridge.gimbal_config(client.vllm_config)
        if config is not None and config.trace_records:
            setattr(client, _ATTRIBUTE, Recording(_recorder(client, config)))
    except Exception:
        logger.exception("Gimbal: requests are not recorded; serving goes on")


def _recorder(client: Any, config: GimbalConfig) -> TraceRecorder:
    began = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path = Path(config.trace_records) / f"trace-{began}-{client.client_index}.jsonl"
    # Without the launcher's secret (Ray) every API server names blocks by its own.
    salt = bytes.fromhex(os.environ.get(TRACE_SALT) or secrets.token_hex(32))
    block_tokens, most_mb = client.vllm_config.cache_config.block_size, config.trace_records_mb
    recorder = TraceRecorder(path, block_tokens, most_mb * 1_000_000, salt)
    close_at_exit(recorder)
    logger.info("Gimbal: requests are recorded in %s, at most %d MB", path, most_mb)
    return recorder


def sent(client: Any, request: Any) -> None:
    """Records `request` where `client` records."""
    found = getattr(client, _ATTRIBUTE, None)
    if found is not None and not found.guard.disabled:
        found.guard.run("sent", found.sent, request)


def received(client: Any, outputs: Any) -> None:
    """Records what an engine answers where `client` records."""
    found = getattr(client, _ATTRIBUTE, None)
    if found is not None and not found.guard.disabled:
        found.guard.run("received", found.received, outputs)
