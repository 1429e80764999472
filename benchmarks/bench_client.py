"""CPU cost of the streaming client by token: 500 concurrent streams from the echo server.

    pytest benchmarks/bench_client.py --benchmark-only

The budget is 60 us of CPU per streamed token; `extra_info` holds the figures. The timed value is
the whole replay, which the echo server's clock fixes at about 6 s.
"""

from __future__ import annotations

import pytest

from gimbal.bench.client_process import check_client
from gimbal.bench.sse import EventScanner

BUDGET_US_PER_TOKEN = 60.0


@pytest.mark.benchmark(group="client")
def test_500_streams(benchmark):
    replay = benchmark.pedantic(check_client, kwargs={"streams": 500, "tokens": 100}, rounds=3)
    usage = replay.usage
    benchmark.extra_info["cpu_us_per_token"] = usage.cpu_us_per_token
    benchmark.extra_info["core_share"] = usage.core_share
    benchmark.extra_info["peak_streams"] = usage.peak_streams
    assert usage.events == 50_000
    assert usage.peak_streams == 500
    assert usage.cpu_us_per_token <= BUDGET_US_PER_TOKEN


@pytest.mark.benchmark(group="client")
def test_scanning_one_event(benchmark):
    event = (
        b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion",'
        b'"created":1700000000,"model":"m","choices":[{"index":0,"text":" token",'
        b'"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}\n\n'
    )
    scanner = EventScanner()
    assert benchmark(scanner.feed, event) == 1
