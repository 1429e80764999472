"""A small file of every trace format, written for the tests, with the requests it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Expected = tuple[float, int, int, str | None, tuple[int, ...]]
"""(arrival_s, prompt_tokens, output_tokens, session, prefix_blocks) of a request."""


@dataclass(frozen=True)
class Sample:
    """One file.

    Attributes:
        format: name of the entry of `FORMATS` that must be taken.
        text: what the file holds.
        requests: what is read.
        note: part of what the reader says it assumed.
    """

    format: str
    text: str
    requests: list[Expected] = field(default_factory=list)
    note: str = ""


def jsonl(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"body": {"usage": {"prompt_tokens": prompt, "completion_tokens": output}}}


def aiperf(start_ns: int, prompt: int, output: int, **metadata: Any) -> dict[str, Any]:
    metrics = {"input_sequence_length": prompt, "output_sequence_length": output}
    return {
        "metadata": {"request_start_ns": start_ns, "benchmark_phase": "profiling", **metadata},
        "metrics": {name: {"value": n, "unit": "tokens"} for name, n in metrics.items()},
        "error": None,
    }


def chat(limit: str, tokens: int, content: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], limit: tokens}


def turn(start: float, prompt: int, output: int) -> dict[str, Any]:
    return {"request_start_time": start, "prompt_tokens": prompt, "output_tokens": output}


TEXT = "0123456789abcdef"  # 4 tokens as estimated
SAMPLES = [
    Sample(
        "Gimbal",
        '{"prefix_block_tokens": 8}\n'
        + jsonl(
            {"arrival_s": 1, "prompt_tokens": 20, "output_tokens": 2},
            {"arrival_s": 3.5, "prompt_tokens": 20, "output_tokens": 2, "session": "a",
             "domain": "code", "prefix_blocks": [4, 5]},
        ),
        [(0.0, 20, 2, None, ()), (2.5, 20, 2, "a", (4, 5))],
    ),
    Sample(
        "Gimbal",
        "arrival_s,prompt_tokens,output_tokens\n1,20,2\n1.5,30,3\n",
        [(0.0, 20, 2, None, ()), (0.5, 30, 3, None, ())],
    ),
    Sample(
        "Azure LLM inference 2023 and 2024",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,396,109\n",
        [(0.0, 374, 44, None, ()), (0.5, 396, 109, None, ())],
    ),
    Sample(
        "Azure LLM inference 2023 and 2024",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00+00:00,308,130\n2024-05-10 01:00:00.250000+01:00,1891,242\n"
        "2024-05-10T00:00:03Z,9,0\n",
        [(0.0, 308, 130, None, ()), (0.25, 1891, 242, None, ())],
        "1 requests without prompt or answer left out",
    ),
    Sample(
        "BurstGPT",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n9.5,GPT-4,10,0,10,API log\n"
        "7,GPT-4,30,4,34,API log\n",
        [(0.0, 472, 18, None, ()), (2.0, 30, 4, None, ())],
        "1 requests without prompt or answer left out",
    ),
    Sample(
        "BurstGPT",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n5,7,0.3,ChatGPT,472,18,490,Conversation log\n",
        [(0.0, 472, 18, "7", ())],
    ),
    Sample(
        "Qwen-Bailian",
        jsonl(
            {"chat_id": 5, "parent_chat_id": -1, "timestamp": 61.25, "input_length": 40,
             "output_length": 9, "type": "text", "turn": 1, "hash_ids": [70, 71, 72]},
            {"chat_id": 6, "parent_chat_id": 5, "timestamp": 62.5, "input_length": 20,
             "output_length": 8, "type": "text", "turn": 2, "hash_ids": [70, 71]},
            {"chat_id": 7, "parent_chat_id": 6, "timestamp": 63.0, "input_length": 3,
             "output_length": 8, "type": "text", "turn": 3},
        ),
        [(0.0, 40, 9, "5", (70, 71, 72)), (1.25, 20, 8, "5", (70, 71)), (1.75, 3, 8, "5", ())],
        "times in s, prefix blocks of 16 tokens",
    ),
    Sample(
        "Mooncake",
        jsonl(
            {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]},
            {"timestamp": 6000, "input_length": 600, "output_length": 5, "hash_ids": [0, 9]},
        ),
        [(0.0, 600, 5, None, (0, 7)), (3.0, 600, 5, None, (0, 9))],
        "times in ms, prefix blocks of 512 tokens",
    ),
    Sample(
        "Mooncake",
        jsonl(
            {"session_id": "s", "timestamp": 500, "input_length": 90, "output_length": 5},
            {"session_id": "s", "delay": 250, "input_length": 120, "output_length": 5},
        ),
        [(0.0, 90, 5, "s", ()), (0.25, 120, 5, "s", ())],
    ),
    Sample(
        "Mooncake",
        "timestamp,input_length,output_length\n100,20,2\n200,30,3\n",
        [(0.0, 20, 2, None, ()), (0.1, 30, 3, None, ())],
    ),
    Sample(
        "Mooncake (texts)",
        jsonl({"timestamp": 0, "text_input": TEXT, "output_length": 7}),
        [(0.0, 4, 7, None, ())],
        "lengths of texts estimated at 4 bytes per token",
    ),
    Sample(
        "Mooncake (lengths alone)",
        json.dumps({"data": [{"input_length": 3, "output_length": 4}]}, indent=1),
        [(0.0, 3, 4, None, ())],
        "no times, so arrivals are generated",
    ),
    Sample(
        "Mooncake (texts alone)",
        jsonl({"text_input": TEXT, "output_length": 7}, {"text_input": "ä", "output_length": 1}),
        [(0.0, 4, 7, None, ()), (0.0, 1, 1, None, ())],
    ),
    Sample(
        "Vidur",
        ",arrived_at,num_prefill_tokens,num_decode_tokens\n0,0.0,374,44\n1,4.3,396,109\n",
        [(0.0, 374, 44, None, ()), (4.3, 396, 109, None, ())],
    ),
    Sample(
        "Vidur",
        "\narrived_at\tnum_prefill_tokens\tnum_decode_tokens\n0.0\t374\t44\n\n4.3\t396\t109\n",
        [(0.0, 374, 44, None, ()), (4.3, 396, 109, None, ())],
    ),
    Sample(
        "Vidur lengths",
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n8,9,17,0.9\n",
        [(0.0, 8, 9, None, ())],
    ),
    Sample(
        "BLIS trace v2 (its CSV)",
        "request_id,session_id,prefix_group,prefix_length,streaming,input_tokens,output_tokens,"
        "server_input_tokens,arrival_time_us,send_time_us,status\n"
        "0,s0,sys,40,true,10,5,52,1000000,0,ok\n1,,sys,40,true,20,6,0,1500000,0,ok\n"
        "2,,,0,true,30,0,0,1600000,0,error\n3,,other,16,true,30,7,0,2000000,0,ok\n"
        "4,,,0,true,30,8,33,3000000,0,ok\n",
        [
            (0.0, 50, 5, "s0", (0, 1)),
            (0.5, 60, 6, None, (0, 1)),
            (1.0, 46, 7, None, (2 << 32,)),
            (2.0, 33, 8, None, ()),
        ],
        "times in us, prefix blocks of 16 tokens",
    ),
    Sample(
        "BLIS trace v1",
        "arrival_time,request_id,model,prefill_tokens,decode_tokens\n"
        '0.0,req_0,llama,"[1,2,3,4,5]","[101,102,103]"\n0.05,req_1,llama,30,20\n',
        [(0.0, 5, 3, None, ()), (0.05, 30, 20, None, ())],
    ),
    Sample(
        "ServeGen requests",
        json.dumps(
            [
                {"request_id": 0, "timestamp": 600.5,
                 "data": {"input_tokens": 224, "output_tokens": 30}},
                {"request_id": 1, "timestamp": 601.0,
                 "data": {"text_tokens": 20, "image_tokens": [100, 80], "output_tokens": 31}},
            ]
        ),
        [(0.0, 224, 30, None, ()), (0.5, 200, 31, None, ())],
    ),
    Sample(
        "ServeGen requests, flat",
        "request_id,timestamp,input_tokens,output_tokens\n0,600.5,224,30\n1,601,20,31\n",
        [(0.0, 224, 30, None, ()), (0.5, 20, 31, None, ())],
        "times in s",
    ),
    Sample(
        "AIPerf records (profile_export.jsonl)",
        jsonl(
            aiperf(10**18, 9, 9, benchmark_phase="warmup"),
            aiperf(10**18 + 10**9, 100, 20, x_correlation_id="c1"),
            aiperf(10**18 + 3 * 10**9, 300, 40, conversation_id="d"),
            aiperf(10**18 + 4 * 10**9, 300, 40, was_cancelled=True),
            {"metadata": {"request_start_ns": 1}, "metrics": {}, "error": {"code": 500}},
        ),
        [(0.0, 100, 20, "c1", ()), (2.0, 300, 40, "d", ())],
        "3 requests without prompt or answer left out",
    ),
    Sample(
        "AIPerf inputs (inputs.json)",
        json.dumps(
            {"data": [{"session_id": "s", "payloads": [chat("max_completion_tokens", 9, TEXT)]}]},
            indent=2,
        ),
        [(0.0, 4, 9, "s", ())],
    ),
    Sample(
        "GuideLLM report (benchmarks.json)",
        json.dumps(
            {
                "metadata": {"version": 2},
                "benchmarks": [
                    {"requests": {"successful": [turn(1e9, 20, 3), turn(1e9 + 0.5, 30, 4)],
                                  "incomplete": [turn(1e9 + 1, 5, 0)], "errored": []}},
                    {"requests": {"successful": [
                        {"start_time": 1e9 + 2, "prompt_tokens": 6, "output_tokens": 7}]}},
                ],
            }
        ),
        [(0.0, 20, 3, None, ()), (0.5, 30, 4, None, ()), (2.0, 6, 7, None, ())],
        "1 requests without prompt or answer left out",
    ),
    Sample(
        "GuideLLM lengths",
        "prompt_tokens_count,output_tokens_count\n8,9\n",
        [(0.0, 8, 9, None, ())],
    ),
    Sample(
        "vLLM bench result",
        json.dumps(
            {"date": "20260101-000000", "duration": 3.0, "total_input_tokens": 50,
             "total_output_tokens": 7, "input_lens": [20, 30, 9], "output_lens": [3, 4, 0],
             "ttfts": [0.1, 0.2, 0], "start_times": [7.5, 8.0, 8.5], "errors": ["", "", "no"]},
            indent=4,
        ),
        [(0.0, 20, 3, None, ()), (0.5, 30, 4, None, ())],
        "1 requests without prompt or answer left out",
    ),
    Sample(
        "SGLang bench result",
        jsonl(*[{"backend": "sglang", "request_rate": 4.0, "total_input_tokens": 50,
                 "total_output_tokens": 7, "input_lens": [20, 30], "output_lens": [3, 4]}] * 2),
        [(0.0, 20, 3, None, ()), (0.0, 30, 4, None, ())] * 2,
    ),
    Sample(
        "LLMServingSim workload",
        jsonl({"input_toks": 20, "output_toks": 3, "arrival_time_ns": 5 * 10**8},
              {"input_toks": 30, "output_toks": 4, "arrival_time_ns": 10**9}),
        [(0.0, 20, 3, None, ()), (0.5, 30, 4, None, ())],
    ),
    Sample(
        "LLMServingSim record",
        jsonl({"request_id": "b-0", "input_toks": 20, "output_toks": 3, "arrival_time": 1.7e9}),
        [(0.0, 20, 3, None, ())],
    ),
    Sample(
        "ShareGPT",
        json.dumps(
            [
                {"id": "a", "conversations": [{"from": "human", "value": TEXT},
                                              {"from": "gpt", "value": TEXT * 2},
                                              {"from": "human", "value": "more"}]},
                {"id": "b", "conversations": [{"from": "human", "value": TEXT}]},
            ]
        ),
        [(0.0, 4, 8, None, ())],
        "1 requests without prompt or answer left out",
    ),
    Sample(
        "OpenAI batch requests",
        jsonl(
            {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
             "body": chat("max_tokens", 50, TEXT)},
            {"custom_id": "2", "method": "POST", "url": "/v1/chat/completions",
             "body": chat("max_completion_tokens", 60, [{"type": "text", "text": TEXT * 2}])},
            {"custom_id": "3", "method": "POST", "url": "/v1/completions",
             "body": {"prompt": [5, 6, 7], "max_tokens": 70}},
        ),
        [(0.0, 4, 50, None, ()), (0.0, 8, 60, None, ()), (0.0, 3, 70, None, ())],
        "lengths of texts estimated",
    ),
    Sample(
        "OpenAI batch results",
        jsonl(
            {"id": "r1", "custom_id": "1", "response": usage(20, 3), "error": None},
            {"id": "r2", "custom_id": "2", "response": None, "error": {"code": "expired"}},
        ),
        [(0.0, 20, 3, None, ())],
        "1 requests without prompt or answer left out",
    ),
    Sample(
        "prompts with lengths of answers",
        jsonl({"prompt": TEXT, "output_tokens": 5}, {"prompt": TEXT, "output_tokens_count": 6}),
        [(0.0, 4, 5, None, ()), (0.0, 4, 6, None, ())],
    ),
    Sample(
        "lengths under other names",
        "prompt_tokens,output_tokens\n8,9\n",
        [(0.0, 8, 9, None, ())],
    ),
]  # fmt: skip
