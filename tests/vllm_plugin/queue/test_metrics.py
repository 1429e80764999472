from types import SimpleNamespace

import pytest

from gimbal.vllm_plugin.queue.metrics import _histogram, _logger_class, size_class


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(0, "0-127"), (127, "0-127"), (128, "128-511"), (2047, "512-2047"), (90_000, "2048+")],
)
def test_size_class(tokens, label):
    assert size_class(tokens) == label


@pytest.mark.slow
def test_finished_requests_are_counted_by_uncached_size():
    stats = pytest.importorskip("vllm.v1.metrics.stats")
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="seven"))
    logger = _logger_class()(config, engine_index=7)
    iteration = stats.IterationStats()
    iteration.finished_requests = [
        stats.FinishedRequestStats("stop", num_prompt_tokens=1000, num_cached_tokens=900),
        stats.FinishedRequestStats("stop", num_prompt_tokens=1000, queued_time=3.0),
        # Ended before it was scheduled: vLLM takes its queueing time from 0.
        stats.FinishedRequestStats("error", num_prompt_tokens=1000, queued_time=-7e4),
    ]
    logger.record(None, iteration)
    logger.record(None, None)
    samples = {
        (s.labels["uncached_tokens"], s.name.rpartition("_")[2]): s.value
        for metric in _histogram().collect()
        for s in metric.samples
        if s.labels["model_name"] == "seven" and "le" not in s.labels
    }
    assert samples["0-127", "count"] == 1
    assert samples["512-2047", "sum"] == 3.0
    assert samples["512-2047", "count"] == 1
    assert samples["2048+", "count"] == 0
