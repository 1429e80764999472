"""Metrics keep to Prometheus' conventions and count what happens, each once."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("prometheus_client")

import gimbal
from gimbal.core.contracts import EngineLoads
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin.dispatch import row_metrics
from gimbal.vllm_plugin.dispatch.metrics import BY_POLICY, BY_VLLM, FALLBACKS, TRACE_FALLBACKS
from tests.vllm_plugin import exposition
from tests.vllm_plugin.exposition import refresh, rows, samples, served

ABBREVIATED = {"avg", "gb", "kb", "mb", "ms", "ns", "num", "pct", "req", "s", "sec", "tok", "us"}
UNITS = {"blocks", "bytes", "ratio", "requests", "seconds", "tokens"}
PER = {"request", "second", "token"}
WITHOUT_UNIT = {
    "gimbal_engine_queue_off",
    "gimbal_engine_placement_off",
    "gimbal_build_info",
    "gimbal_engine_idle",
    "gimbal_engine_kv_blocks_used",
    "gimbal_level_state",
}


@pytest.fixture(scope="module")
def metrics():
    return served("conventions")


def ours():
    """Gimbal's families without the ``_created`` gauges that the client library adds."""
    return [family for family in exposition.families() if not family.name.endswith("_created")]


def test_names_say_the_unit_and_only_counters_are_totals(metrics):
    for family in ours():
        words = family.name.split("_")
        assert re.fullmatch(r"gimbal(_[a-z]+)+", family.name)
        assert not ABBREVIATED & set(words), family.name
        assert not {"total", "count", "sum", "bucket", "gauge", "counter"} & set(words), family.name
        assert family.type in ("counter", "gauge", "histogram")
        if family.type == "counter":
            assert {s.name for s in family.samples} <= {
                f"{family.name}_total",
                f"{family.name}_created",
            }
        elif family.name not in WITHOUT_UNIT:
            per = words[-2] == "per"
            assert words[-3 if per else -1] in UNITS, family.name
            assert not per or words[-1] in PER, family.name


def test_help_says_more_than_the_name(metrics):
    texts = [family.documentation for family in ours()]
    assert len(set(texts)) == len(texts)
    for family in ours():
        said = set(re.findall(r"[a-z]+", family.documentation.lower()))
        assert len(said - set(family.name.split("_"))) >= 3, family.name
        assert not family.documentation.endswith("."), family.name


def test_every_series_names_the_model_as_vllms_do(metrics):
    for family in ours():
        for sample in family.samples:
            named = "model_name" in sample.labels
            assert named is (family.name != "gimbal_build_info"), sample.name
    [build] = next(f for f in ours() if f.name == "gimbal_build_info").samples
    assert (build.labels["version"], build.value) == (gimbal.__version__, 1)


def test_every_counter_is_there_before_its_first_event():
    served("new")
    found = samples("new")
    counters = [family.name for family in ours() if family.type == "counter"]
    assert len(counters) > 15
    for name in counters:
        of_it = [value for key, value in found.items() if key[0] == f"{name}_total"]
        assert of_it, name
        assert not any(of_it), name
    for reason in (*FALLBACKS, *TRACE_FALLBACKS):
        assert found["gimbal_fallback_total", "", reason] == 0
    for reason in (*BY_POLICY, *BY_VLLM):
        assert found["gimbal_dispatch_decisions_total", "1", reason] == 0
    for name in ("gimbal_dispatch_decision_seconds", "gimbal_queue_time_seconds"):
        assert found[f"{name}_count", "", ""] == 0


def test_every_reason_of_a_fallback_is_foreseen():
    """Literals given to a guard anywhere in the package that dispatches."""
    given = set()
    for path in Path(gimbal.__file__).parent.glob("vllm_plugin/dispatch/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                first = node.args[0]
                if name in ("run", "fell_back") and isinstance(first, ast.Constant):
                    given.add(first.value)
    assert given == {*FALLBACKS, *TRACE_FALLBACKS}


def test_every_column_is_shown_once():
    of_server = [field for _, _, fields in row_metrics.SERVER for field in fields]
    shown = [*row_metrics.ENGINE, *of_server]
    assert sorted(shown) == sorted(set(Field) - {Field.TIMESTAMP_US, Field.EPOCH})


def test_an_engines_totals_are_counted_once_across_restarts():
    metrics, name = served("totals"), ("gimbal_engine_preemptions_total", "1", "")
    refresh(metrics, rows(PREEMPTIONS=3))
    refresh(metrics, rows(PREEMPTIONS=3))
    assert samples("totals")[name] == 3
    refresh(metrics, rows(PREEMPTIONS=5))
    refresh(metrics, np.zeros_like(rows()))  # nothing is known of the engines
    refresh(metrics, rows(PREEMPTIONS=5))
    assert samples("totals")[name] == 5
    refresh(metrics, rows(epoch=2.0, PREEMPTIONS=4))  # new processes
    assert samples("totals")[name] == 9


def test_the_gauges_of_many_engines_are_set_in_several_turns():
    metrics, board = served("turns", 40), rows(40, RUNNING_TOKENS=7, PREEMPTIONS=1)
    name = "gimbal_engine_running_tokens"
    for shown in (32, 40):
        refresh(metrics, board)
        found = samples("turns")
        assert sum(found[name, str(e), ""] == 7 for e in range(40)) == shown
    refresh(metrics, rows(40, RUNNING_TOKENS=14, PREEMPTIONS=2))
    found = samples("turns")
    assert (found[name, "0", ""], found[name, "39", ""]) == (14, 7)
    assert found["gimbal_engine_preemptions_total", "39", ""] == 2, "counted at once"


def test_what_a_scrape_asks_for_is_not_shown_before_it():
    metrics, board, none = served("scraped"), rows(RUNNING_TOKENS=7, PREEMPTIONS=1), np.zeros(2)
    accounts = np.array([3.0, 0.0])
    state = EngineLoads(board, none, accounts, none, 2 * accounts, none, none, none)
    metrics.at_scrape = True
    metrics.refresh(0, state, None)
    found = samples("scraped")
    assert found["gimbal_engine_preemptions_total", "1", ""] == 1
    assert found["gimbal_unacknowledged_tokens", "0", ""] == 3
    assert found["gimbal_inflight_tokens", "0", ""] == 6
    assert found["gimbal_engine_running_tokens", "1", ""] == 0
    metrics.show(0, state, None)
    assert samples("scraped")["gimbal_engine_running_tokens", "1", ""] == 7


def test_an_elastic_servers_new_engines_are_counted_and_shown():
    metrics = served("elastic", 2)
    refresh(metrics, rows(2, PREEMPTIONS=1))
    refresh(metrics, rows(3, PREEMPTIONS=2, RUNNING_TOKENS=5))
    refresh(metrics, rows(1, PREEMPTIONS=2))
    refresh(metrics, rows(3, PREEMPTIONS=2))
    found = samples("elastic")
    counts = [found["gimbal_engine_preemptions_total", str(e), ""] for e in range(3)]
    assert counts == [2, 2, 2]
    assert ("gimbal_engine_running_tokens", "2", "") in found


def test_only_one_api_server_adds_to_the_totals_of_engines():
    metrics = served("second")
    metrics.serve("second", range(2), counts=False)
    refresh(metrics, rows(epoch=7.0, PREEMPTIONS=3, PLACEMENT_COMMITS=2, RUNNING_TOKENS=5))
    found = samples("second")
    assert found["gimbal_engine_preemptions_total", "0", ""] == 0
    assert found["gimbal_placement_commits_total", "", ""] == 0
    assert found["gimbal_engine_running_tokens", "0", ""] == 5


def test_times_are_seconds_and_levels_that_gave_up_say_so():
    metrics = served("units")
    refresh(metrics, rows(STEP_TIME_US=2500.0, PREFILL_US_PER_TOKEN=40.0, KV_BLOCKS_TOTAL=7))
    metrics.switched_itself_off("dispatch")
    metrics.timed(0.002, 3e6)
    found = samples("units")
    assert found["gimbal_engine_step_time_seconds", "0", ""] == 0.0025
    assert found["gimbal_engine_prefill_seconds_per_token", "0", ""] == pytest.approx(4e-5)
    assert found["gimbal_engine_kv_blocks", "0", ""] == 7
    assert found["gimbal_signal_age_seconds_sum", "", ""] == 3
    levels = next(f for f in ours() if f.name == "gimbal_level_state")
    states = {s.labels["level"]: s.value for s in levels.samples if "units" in s.labels.values()}
    assert states == {"dispatch": -1, "queue": 1, "placement": 1, "feedback": 1}


def test_placement_is_the_servers_but_its_stall_an_engines():
    metrics = served("placement")
    board = rows(
        PLACEMENT_PROPOSALS=[3, 2],
        PLACEMENT_COMMITS=[2, 1],
        PLACEMENT_RECEIVED_EXPERTS=[12, 5],
        PLACEMENT_STALL_US=[3e6, 1e6],
        PLACEMENT_PREDICTED_GAIN_US=[30.0, 0.0],
        PLACEMENT_REALIZED_LOSS_US=[10.0, 0.0],
        PLACEMENT_BALANCE=[0.8, 0.5],
    )
    refresh(metrics, board)
    refresh(metrics, board[::-1].copy())  # the other engine is ahead now
    found = {name: value for (name, engine, _), value in samples("placement").items() if not engine}
    assert found["gimbal_placement_proposals_total"] == 3
    assert found["gimbal_placement_commits_total"] == 2
    assert found["gimbal_placement_moved_experts_total"] == 12
    assert found["gimbal_placement_predicted_gain_seconds"] == pytest.approx(30e-6)
    assert found["gimbal_placement_realized_gain_seconds"] == pytest.approx(-10e-6)
    assert found["gimbal_placement_balance_ratio"] == 0.8
    assert samples("placement")["gimbal_engine_placement_stall_seconds_total", "0", ""] == 3


def test_64_engines_have_a_bounded_number_of_series():
    def series(engines):
        model = f"{engines} engines"
        refresh(served(model, engines), rows(engines))
        return len(
            [
                s
                for family in ours()
                for s in family.samples
                if s.labels.get("model_name") == model and not s.name.endswith("_created")
            ]
        )

    few, many = series(2), series(64)
    each = (many - few) / 62
    assert each == len(row_metrics.ENGINE) + len(BY_POLICY) + len(BY_VLLM) + 3
    assert few - 2 * each < 150
    assert many < 3400


def test_promtool_finds_nothing(metrics):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's package prometheus, is not on the PATH")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=exposition.text(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
