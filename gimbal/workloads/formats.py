"""The table of trace formats: what tells one, and which of its fields make a request.

A format is known by the keys of a file's first record (`fields.records`), never by the file's
name. A new format is an entry of `FORMATS`; where a record is not one request, with a function of
`unpack`. ``docs/traces.md`` is made from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from gimbal.workloads import jsonl, unpack
from gimbal.workloads.trace import Trace

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds of each unit of time."""
DATE = "date"
"""Instead of a unit: a date and time, with an offset from UTC or in UTC."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        name: what messages and the page call it.
        source: whose it is.
        keys: what the first record has; ``a|b`` is either. The first format that fits is taken.
        prompt, output: fields of the lengths in tokens; dots lead into objects of objects.
        arrival: field of the time a request is sent; None for a set of lengths.
        unit: of `arrival`, a key of `UNITS` or `DATE`.
        session: field that names the conversation, if any does.
        blocks: field of the hash ids of the prompt's leading blocks.
        block_tokens: tokens of one such block.
        unpack: makes requests of records, where they are not the same.
        read: reads the whole file instead of all this.
    """

    name: str
    source: str
    keys: tuple[str, ...]
    prompt: str = ""
    output: str = ""
    arrival: str | None = None
    unit: str = "s"
    session: str | None = None
    blocks: str | None = None
    block_tokens: int = 0
    unpack: Callable[[unpack.Rows, unpack.Counter], unpack.Requests] | None = None
    read: Callable[[Path], Trace] | None = None

    def fits(self, keys: Collection[str]) -> bool:
        """Whether a first record with `keys` is of this format."""
        return fits(self.keys, keys)


def fits(wanted: tuple[str, ...], keys: Collection[str]) -> bool:
    """Whether `keys` hold every word of `wanted`, or one of its alternatives."""
    return all(any(name in keys for name in word.split("|")) for word in wanted)


FORMATS = (
    Format("Gimbal", "`gimbal.workloads.jsonl`",
           ("arrival_s|prefix_block_tokens",), "prompt_tokens", "output_tokens", "arrival_s",
           session="session",
           blocks="prefix_blocks", block_tokens=jsonl.BLOCK_TOKENS, read=jsonl.read),
    Format("Azure LLM inference 2023 and 2024", "Azure/AzurePublicDataset, CC-BY-4.0",
           ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), "ContextTokens", "GeneratedTokens",
           "TIMESTAMP", DATE),
    Format("BurstGPT", "HPMLL/BurstGPT, CC-BY-4.0, arXiv 2401.17644",
           ("Timestamp", "Request tokens", "Response tokens"), "Request tokens", "Response tokens",
           "Timestamp", session="Session ID"),
    Format("Qwen-Bailian", "alibaba-edu/qwen-bailian-usagetraces-anon",
           ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length"),
           "input_length", "output_length", "timestamp", session="session", blocks="hash_ids",
           block_tokens=16, unpack=unpack.bailian),
    Format("Mooncake", "kvcache-ai/Mooncake FAST'25 (Apache-2.0), Dynamo, AIPerf, GuideLLM",
           ("timestamp", "input_length", "output_length"), "input_length", "output_length",
           "timestamp", "ms", "session_id", "hash_ids", 512, unpack.mooncake),
    Format("Mooncake (texts)", "AIPerf",
           ("timestamp", "text_input", "output_length"), "input_length", "output_length",
           "timestamp", "ms", "session_id", unpack=unpack.mooncake_texts),
    Format("Mooncake (lengths alone)", "AIPerf",
           ("input_length", "output_length"), "input_length", "output_length", session="session_id",
           blocks="hash_ids", block_tokens=512),
    Format("Mooncake (texts alone)", "AIPerf",
           ("text_input", "output_length"), "input_length", "output_length", session="session_id",
           unpack=unpack.mooncake_texts),
    Format("Vidur", "microsoft/vidur",
           ("arrived_at", "num_prefill_tokens", "num_decode_tokens"), "num_prefill_tokens",
           "num_decode_tokens", "arrived_at"),
    Format("Vidur lengths", "microsoft/vidur, project-etalon/etalon",
           ("num_prefill_tokens", "num_decode_tokens"), "num_prefill_tokens", "num_decode_tokens"),
    Format("BLIS trace v2 (its CSV)", "inference-sim/inference-sim",
           ("arrival_time_us", "input_tokens", "output_tokens"), "prompt", "output_tokens",
           "arrival_time_us", "us", "session_id", "blocks", unpack.PREFIX_TOKENS, unpack.blis),
    Format("BLIS trace v1", "inference-sim/inference-sim",
           ("arrival_time", "prefill_tokens", "decode_tokens"), "prefill_tokens", "decode_tokens",
           "arrival_time", unpack=unpack.blis_ids),
    Format("ServeGen requests", "alibaba/ServeGen, arXiv 2505.09999",
           ("request_id", "timestamp", "data"), "prompt", "data.output_tokens", "timestamp",
           unpack=unpack.servegen),
    Format("ServeGen requests, flat", "alibaba/ServeGen",
           ("timestamp", "input_tokens", "output_tokens"), "input_tokens", "output_tokens",
           "timestamp", session="session_id"),
    Format("AIPerf records (profile_export.jsonl)", "ai-dynamo/aiperf",
           ("metadata", "metrics"), "metrics.input_sequence_length.value",
           "metrics.output_sequence_length.value", "metadata.request_start_ns", "ns",
           "session", unpack=unpack.aiperf_records),
    Format("AIPerf inputs (inputs.json)", "ai-dynamo/aiperf",
           ("session_id", "payloads"), "prompt", "output", session="session",
           unpack=unpack.aiperf_inputs),
    Format("GuideLLM report (benchmarks.json)", "vllm-project/guidellm",
           ("benchmarks",), "prompt_tokens", "output_tokens", "start_time", unpack=unpack.guidellm),
    Format("GuideLLM lengths", "vllm-project/guidellm",
           ("prompt_tokens_count", "output_tokens_count"), "prompt_tokens_count",
           "output_tokens_count"),
    Format("vLLM bench result", "vllm bench serve --save-detailed",
           ("input_lens", "output_lens", "start_times"), "input_lens", "output_lens", "start_times",
           unpack=unpack.serving_bench),
    Format("SGLang bench result",
           "sglang.bench_serving --output-details; vLLM's before it had start_times",
           ("input_lens", "output_lens"), "input_lens", "output_lens", unpack=unpack.serving_bench),
    Format("LLMServingSim workload", "casys-kaist/LLMServingSim",
           ("arrival_time_ns", "input_toks", "output_toks"), "input_toks", "output_toks",
           "arrival_time_ns", "ns"),
    Format("LLMServingSim record", "casys-kaist/LLMServingSim",
           ("arrival_time", "input_toks", "output_toks"), "input_toks", "output_toks",
           "arrival_time"),
    Format("ShareGPT", "conversations of texts",
           ("conversations",), "prompt", "output", unpack=unpack.sharegpt),
    Format("OpenAI batch requests", "OpenAI's batch API",
           ("custom_id", "body"), "prompt", "output", unpack=unpack.openai_batch),
    Format("OpenAI batch results", "OpenAI's batch API",
           ("custom_id", "response"), "response.body.usage.prompt_tokens",
           "response.body.usage.completion_tokens", unpack=unpack.openai_results),
    Format("prompts with lengths of answers", "vllm bench --dataset-name custom, GuideLLM",
           ("prompt", "output_tokens|output_tokens_count|completion_tokens_count"), "prompt",
           "output", unpack=unpack.prompts),
    Format("lengths under other names", "any",
           ("prompt_tokens", "output_tokens"), "prompt_tokens", "output_tokens"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unread:
    """A file that people try, and what to do instead.

    Attributes:
        keys: as of a `Format`.
        instead: ends the message.
    """

    name: str
    keys: tuple[str, ...]
    instead: str


UNREAD = (
    Unread(
        "a bench result of vLLM or SGLang without its requests",
        ("total_input_tokens", "total_output_tokens"),
        "write it with --save-detailed (SGLang: --output-details)",
    ),
    Unread(
        "AIPerf's sums over a run",
        ("request_throughput", "input_sequence_length|output_sequence_length"),
        "profile_export.jsonl beside it has the requests",
    ),
    Unread(
        "prompts without the length of an answer",
        ("text|texts|turns|prompt|messages|text_input",),
        "give each the length of its answer as output_tokens",
    ),
    Unread(
        "a WEKA trace of nested requests",
        ("id", "requests"),
        "its times and hash ids begin anew with every conversation, so that it has no arrivals",
    ),
    Unread(
        "rates or lengths of a ServeGen client",
        ("0",),
        "generate requests from them with servegen and write those",
    ),
)
BINARY = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"ARROW1": "Arrow", b"PK\x03\x04": "zip"}
"""What a file begins with that is no text -> its name."""
