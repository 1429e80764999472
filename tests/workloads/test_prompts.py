"""Prompts share exactly what the trace says, and nothing else, within and between runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.workloads import Trace, TraceRequest
from gimbal.workloads.prompts import (
    PromptWriter,
    Vocabulary,
    read_vocabulary,
    token_pool,
    uniform_vocabulary,
)
from gimbal.workloads.trace import make_trace
from gimbal.workloads.transform import assign_domains

VOCABULARY = uniform_vocabulary(10, 500)
BLOCK = 16


def shared_trace() -> Trace:
    rows = [
        TraceRequest(0, 100, 4, prefix_blocks=(1, 2, 3)),
        TraceRequest(1, 100, 4, prefix_blocks=(1, 2, 9)),
        TraceRequest(2, 100, 4, prefix_blocks=(7,)),
        TraceRequest(3, 40, 4, prefix_blocks=(1, 2, 3)),
        TraceRequest(4, 100, 4),
        TraceRequest(5, 100, 4),
    ]
    return make_trace("shared", rows, prefix_block_tokens=BLOCK)


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def test_lengths_and_sharing_follow_the_trace() -> None:
    trace = shared_trace()
    writer = PromptWriter(trace, VOCABULARY, (0, 0, 0))
    prompts = [writer.prompt(i) for i in range(len(trace))]
    assert [len(p) for p in prompts] == [100, 100, 100, 40, 100, 100]
    assert 2 * BLOCK <= common_prefix(prompts[0], prompts[1]) < 2 * BLOCK + 4
    assert common_prefix(prompts[0], prompts[3]) == 40
    for a, b in [(0, 2), (0, 4), (4, 5), (2, 5)]:
        assert common_prefix(prompts[a], prompts[b]) < 4


def test_another_salt_shares_no_cacheable_block() -> None:
    trace = shared_trace()
    blocks: list[set[tuple[int, ...]]] = []
    for salt in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        writer = PromptWriter(trace, VOCABULARY, salt)
        prompts = [writer.prompt(i) for i in range(len(trace))]
        blocks.append({tuple(p[:8]) for p in prompts})
    for i, first in enumerate(blocks):
        for second in blocks[i + 1 :]:
            assert not first & second


def test_writing_is_deterministic_and_independent_of_order() -> None:
    trace = shared_trace()
    forward = PromptWriter(trace, VOCABULARY, (5,))
    backward = PromptWriter(trace, VOCABULARY, (5,))
    wanted = [forward.prompt(i) for i in range(6)]
    assert [backward.prompt(i) for i in reversed(range(6))][::-1] == wanted


def test_unique_prompts_never_share_a_block_even_with_a_small_skewed_vocabulary() -> None:
    pool = token_pool(np.arange(64), 1.0 / np.arange(1, 65))
    trace = make_trace("u", [TraceRequest(i, 64, 1) for i in range(3000)])
    writer = PromptWriter(trace, Vocabulary({"any": pool}), (0,))
    first_blocks = {tuple(writer.prompt(i)[:BLOCK]) for i in range(3000)}
    assert len(first_blocks) == 3000


def test_domains_decide_the_tokens_and_sharers_agree() -> None:
    vocabulary = Vocabulary(
        {"code": token_pool(np.arange(0, 100)), "law": token_pool(np.arange(100, 200))}
    )
    trace = assign_domains(shared_trace(), vocabulary.names, np.random.default_rng(0))
    assert trace.requests[0].domain == trace.requests[1].domain == trace.requests[3].domain
    writer = PromptWriter(trace, vocabulary, (0,))
    for index, request in enumerate(trace.requests):
        tokens = set(writer.prompt(index))
        low = 0 if request.domain == "code" else 100
        assert tokens <= set(range(low, low + 100))


def test_pool_draws_with_its_weights() -> None:
    pool = token_pool(np.array([3, 8]), np.array([1.0, 3.0]))
    drawn = pool.draw(20000, np.random.default_rng(0))
    assert set(drawn.tolist()) == {3, 8}
    assert (drawn == 8).mean() == pytest.approx(0.75, abs=0.02)


def test_reads_vocabularies_from_model_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a model directory"):
        read_vocabulary(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8, "vocab_size": 30}))
    assert len(read_vocabulary(tmp_path).domains["any"].ids) == 30
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 20}))
    special = {"added_tokens": [{"id": 0}, {"id": 19}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(special))
    assert read_vocabulary(tmp_path).domains["any"].ids.tolist() == list(range(1, 19))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 10}}))
    assert read_vocabulary(tmp_path).domains["any"].ids.tolist() == list(range(1, 10))
    demo = {"domains": {"a": {"token_ids": [4, 5], "weights": [0.5, 0.5]}}}
    (tmp_path / "gimbal_demo.json").write_text(json.dumps(demo))
    assert read_vocabulary(tmp_path).names == ("a",)
    demo["domains"]["a"]["weights"] = [1.0]
    (tmp_path / "gimbal_demo.json").write_text(json.dumps(demo))
    with pytest.raises(InputError, match=r"domains\.a"):
        read_vocabulary(tmp_path)
