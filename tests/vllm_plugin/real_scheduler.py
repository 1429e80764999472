"""A real vLLM scheduler without a model or an engine: configuration and KV bookkeeping only."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
}


def build(
    folder: Path,
    gimbal: dict[str, Any] | None = None,
    *,
    blocks: int = 2000,
    budget: int = 512,
    seats: int = 64,
    active_seats: int | None = None,
    policy: str = "fcfs",
    prefix_caching: bool = False,
    connector: str = "",
    **scheduling: Any,
) -> Any:
    """vLLM's AsyncScheduler, with Gimbal in front when `gimbal` (its configuration) is given.

    Blocks hold 16 tokens. `scheduling` are more fields of vLLM's SchedulerConfig. `connector` is a
    class of `fake_connector`.
    """
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        KVTransferConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from gimbal.vllm_plugin.engine.scheduler import _built_by_gimbal

    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    scheduler_config = SchedulerConfig(
        max_num_seqs=seats,
        max_num_active_seqs=active_seats,
        max_num_batched_tokens=budget,
        max_model_len=8192,
        is_encoder_decoder=False,
        async_scheduling=True,
        policy=policy,
        **scheduling,
    )
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=8192
        ),
        scheduler_config=scheduler_config,
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=prefix_caching),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector=connector,
            kv_role="kv_both",
            kv_connector_module_path="tests.vllm_plugin.fake_connector",
            kv_load_failure_policy="recompute",
        )
        if connector
        else None,
        additional_config={} if gimbal is None else {"gimbal": gimbal},
    )
    vllm_config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32)
    scheduler_class = _built_by_gimbal(lambda _config: AsyncScheduler)
    return scheduler_class(scheduler_config)(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=16,
        hash_block_size=16,
        log_stats=True,
    )


def request(
    name: str,
    tokens: int,
    output: int = 8,
    priority: int = 0,
    arrival: float = 0.0,
    hashed: bool = True,
    prompt: Sequence[int] | None = None,
):
    """A vLLM request with `tokens` prompt tokens of its own; `hashed` for prefix caching."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(16, sha256) if hashed else None
    first = zlib.crc32(name.encode()) % 400  # the same in every process, as hash() is not
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt or ((first + i) % 500 for i in range(tokens))),
        sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
        pooling_params=None,
        arrival_time=arrival,
        priority=priority,
        block_hasher=hasher,
    )


def result_of(ids: list[str], tokens: list[list[int]]) -> Any:
    """The model's result for a step: the tokens sampled for each of its requests."""
    from vllm.v1.outputs import ModelRunnerOutput

    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=tokens,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def finish_step(
    scheduler: Any, output: Any, attach: Callable[[Any], None] = lambda _result: None
) -> dict[str, int]:
    """Plays the model: every request whose prompt is done gets a token; returns what clients get.

    `attach` puts on the model's result what workers send along.
    """
    ids = list(output.num_scheduled_tokens)
    tokens = []
    for request_id in ids:
        done = scheduler.requests[request_id]
        tokens.append([] if done.is_prefill_chunk else [7])
    result = result_of(ids, tokens)
    attach(result)
    answers = scheduler.update_from_output(output, result).values()
    return {one.request_id: len(one.new_token_ids) for all_ in answers for one in all_.outputs}
