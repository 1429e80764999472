"""The same run gives the same figures here and in the installed ``vllm bench serve``."""

import numpy as np
import pytest

from gimbal.records.schema import RequestRecord
from gimbal.report.metrics import Slo, duration_s, summarize


def make_run(seed: int) -> list[RequestRecord]:
    rng = np.random.default_rng(seed)
    run = []
    for index in range(200):
        sent = index * 0.1 + float(rng.random()) * 0.01
        tokens = int(rng.integers(1, 40))
        times = sent + np.cumsum(rng.exponential(0.05, tokens))
        failed = rng.random() < 0.1
        run.append(
            RequestRecord(
                f"r{index}", "a", 0, sent, sent, int(rng.integers(1, 900)), tokens, tokens,
                float(times[0]), float(times[-1]), tuple(times.tolist()),
                status="failed" if failed else "ok", index=index,
            )
        )  # fmt: skip
    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_same_definitions(seed: int) -> None:
    serve = pytest.importorskip("vllm.benchmarks.serve")
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    run = make_run(seed)
    outputs = [
        RequestFuncOutput(
            success=r.status == "ok",
            latency=r.last_token_s - r.sent_s,
            output_tokens=r.output_tokens,
            ttft=r.first_token_s - r.sent_s,
            itl=np.diff(r.token_times_s).tolist(),
            prompt_len=r.prompt_tokens,
            start_time=r.sent_s,
        )
        for r in run
    ]
    theirs, _ = serve.calculate_metrics(
        [], outputs, duration_s(run), None, [50, 90, 99], {"ttft": 80.0, "tpot": 55.0}
    )
    ours = summarize([run], Slo(ttft_ms=80.0, tpot_ms=55.0))
    assert ours["completed"] == theirs.completed
    assert ours["throughput_rps"] == pytest.approx(theirs.request_throughput)
    assert ours["output_tokens_per_s"] == pytest.approx(theirs.output_throughput)
    assert 0 < ours["goodput_rps"] < ours["throughput_rps"]
    assert ours["goodput_rps"] == pytest.approx(theirs.request_goodput)
    for name, key in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
        figures = ours[f"{name}_ms"]
        assert figures["mean"] == pytest.approx(getattr(theirs, f"mean_{key}_ms"))
        for percent, value in getattr(theirs, f"percentiles_{key}_ms"):
            assert figures[f"p{percent}"] == pytest.approx(value)
