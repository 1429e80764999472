"""The client against the echo server: counts, rejection, broken streams, open loop, stopping."""

import asyncio
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Pipe

import pytest

from gimbal.bench.client import Client, ClientRequest
from gimbal.bench.client_process import ReplayJob, _receive, encode_requests, run_replay
from gimbal.bench.echo import EchoOptions, echo_server
from gimbal.bench.endpoint import Endpoint, counter_differences
from gimbal.workloads import TraceRequest
from gimbal.workloads.prompts import uniform_vocabulary
from gimbal.workloads.trace import make_trace


def requests(count: int, tokens: int, gap_s: float = 0.0) -> list[ClientRequest]:
    body = json.dumps({"prompt": [1, 2], "max_tokens": tokens}).encode()
    return [ClientRequest(f"r{i}", i * gap_s, body, tokens) for i in range(count)]


def test_every_token_is_counted_and_timed() -> None:
    with echo_server(EchoOptions(tick_s=0.02)) as url:
        replay = asyncio.run(Client(url).replay(requests(40, 7)))
    assert [r.status for r in replay.results] == ["ok"] * 40
    assert {r.engine for r in replay.results} == {0, 1}
    for result in replay.results:
        assert len(result.token_times_s) == result.output_tokens == 7
        assert result.sent_s <= result.token_times_s[0]
        assert result.token_times_s == sorted(result.token_times_s)
    assert replay.usage.events == 280
    assert replay.usage.peak_streams == 40
    assert replay.usage.cpu_us_per_token > 0


def test_refused_is_rejected_not_failed() -> None:
    with echo_server(EchoOptions(tick_s=0.05, max_streams=3)) as url:
        replay = asyncio.run(Client(url).replay(requests(10, 4)))
    statuses = [r.status for r in replay.results]
    assert statuses.count("ok") == 3
    assert statuses.count("rejected") == 7
    assert "503" in str(replay.results[statuses.index("rejected")].error)


def test_broken_stream_keeps_its_tokens_and_fails() -> None:
    with echo_server(EchoOptions(tick_s=0.01, fail_at_token=3)) as url:
        replay = asyncio.run(Client(url).replay(requests(2, 9)))
    for result in replay.results:
        assert result.status == "failed"
        assert result.error
        assert result.output_tokens <= 3


def test_wrong_token_count_and_no_server_fail() -> None:
    with echo_server(EchoOptions(tick_s=0.01)) as url:
        [request] = requests(1, 3)
        wrong = ClientRequest("r", 0.0, request.body, 5)
        [result] = asyncio.run(Client(url).replay([wrong])).results
    assert (result.status, result.error) == ("failed", "3 of 5 tokens")
    [gone] = asyncio.run(Client("http://127.0.0.1:9").replay(requests(1, 3))).results
    assert gone.status == "failed"


def test_proxies_are_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with echo_server(EchoOptions(tick_s=0.01)) as url:
        # It answers as a proxy would that knows no such host: {} to any path but its own.
        monkeypatch.setenv("http_proxy", url)
        [far] = asyncio.run(Client("http://far.invalid").replay(requests(1, 3))).results
        assert far.error == "the stream ended without [DONE]"
        assert Endpoint("http://far.invalid").healthy()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        [near] = asyncio.run(Client(url).replay(requests(1, 3))).results
        assert near.status == "ok"
        assert Endpoint(url).model().name


def test_a_late_server_does_not_slow_arrivals() -> None:
    with echo_server(EchoOptions(tick_s=3.0)) as url:
        replay = asyncio.run(Client(url).replay(requests(20, 1, gap_s=0.02)))
    assert replay.usage.peak_streams == 20
    first_token_s = min(r.token_times_s[0] for r in replay.results)
    assert all(r.sent_s < first_token_s for r in replay.results)


def test_no_grace_aborts_what_is_open_and_keeps_the_rest() -> None:
    with echo_server(EchoOptions(tick_s=0.02)) as url:
        many = [*requests(1, 2), *requests(1, 5000)]
        late = ClientRequest("late", 1.0, many[0].body, 2)
        replay = asyncio.run(Client(url, grace_s=1.5).replay([*many, late]))
    assert [r.status for r in replay.results] == ["ok", "aborted", "ok"]
    assert replay.results[1].output_tokens > 5


def job(url: str, count: int, tokens: int) -> ReplayJob:
    rows = [TraceRequest(i * 0.01, 20, tokens, session="s") for i in range(count)]
    trace = make_trace("t", rows)
    return ReplayJob(url, "echo", trace, uniform_vocabulary(5, 50), (1,), "arm-r0")


def test_bodies_are_what_vllm_takes() -> None:
    first, second = encode_requests(job("http://x", 2, 3))
    body = json.loads(first.body)
    assert first.request_id == "arm-r0-0"
    assert len(body["prompt"]) == 20
    assert set(body["prompt"]) <= set(range(5, 50))
    assert body["max_tokens"] == 3
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["user"] == "s"
    assert json.loads(second.body)["prompt"] != body["prompt"]


def test_child_process_replays_and_reports_counters() -> None:
    with echo_server(EchoOptions(tick_s=0.02)) as url:
        endpoint = Endpoint(url)
        before = endpoint.counters()
        seen: list[tuple[int, int]] = []
        replay = run_replay(job(url, 30, 40), lambda *p: seen.append(p))
        counts = counter_differences(before, endpoint.counters())
    assert {r.status for r in replay.results} == {"ok"}
    assert counts["vllm:request_success_total"] == {0: 15.0, 1: 15.0}
    assert seen
    assert max(p[1] for p in seen) > 0


def test_ctrl_c_hands_over_what_was_measured() -> None:
    def interrupt(ended: int, streams: int) -> None:
        if streams == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with echo_server(EchoOptions(tick_s=0.02)) as url, pytest.raises(KeyboardInterrupt) as caught:
        run_replay(job(url, 3, 5000), interrupt)
    replay = caught.value.replay  # type: ignore[attr-defined]
    assert [r.status for r in replay.results] == ["aborted"] * 3
    assert replay.results[0].output_tokens > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_child_failure_is_told() -> None:
    with pytest.raises(RuntimeError, match="AttributeError"):
        run_replay(ReplayJob("http://x", "m", None, uniform_vocabulary(0, 9), (0,), "p"))  # type: ignore[arg-type]


def test_endpoint_speaks_for_the_server() -> None:
    with echo_server() as url:
        endpoint = Endpoint(url)
        assert endpoint.healthy()
        assert endpoint.model().name == "echo"
        assert endpoint.wait_idle(2)
    assert not Endpoint("http://127.0.0.1:9").healthy()


def test_the_servers_api_key_is_sent_with_every_request(monkeypatch) -> None:
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert not Endpoint(url).healthy()
        [result] = asyncio.run(Client(url).replay(requests(1, 3))).results
        server.shutdown()
    assert result.status == "failed"
    assert seen == [("/health", "Bearer secret"), ("/v1/completions", "Bearer secret")]


@pytest.mark.parametrize("sent", [b"", b"\x00\x00\x01\x00half"])
def test_a_client_process_that_dies_is_said(sent: bytes) -> None:
    ours, theirs = Pipe()
    os.write(theirs.fileno(), sent)
    theirs.close()
    with pytest.raises(RuntimeError, match="the client process died"):
        _receive(ours, None)
