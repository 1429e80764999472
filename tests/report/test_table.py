"""The terminal report shows losers, lost requests and a client that cannot be trusted."""

import numpy as np
from rich.console import Console

from gimbal.report.compare import compare, nested
from gimbal.report.metrics import Slo
from gimbal.report.report import _ratios
from gimbal.report.table import print_report, ratios_title, verdict, warnings
from tests.report.test_compare import runs

STATS = {"mean": 250.0, "p50": 1.5, "p90": 2000.0, "p99": None}
ARM = {
    **dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"), STATS),
    "throughput_rps": 4.0,
    "output_tokens_per_s": 40.0,
    "goodput_rps": 3.0,
    "requests": 20,
    "completed": 17,
    "rejected": 2,
    "failed": 1,
    "aborted": 0,
    "balance": {"max_over_mean": 1.25},
    "requests_by_engine": {"max_over_mean": None},
    "prefix_hit_rate": 0.366,
}
CELL = {"ratio": 1.3, "low": 1.1, "high": 1.6, "differs": True}
RATIOS = {
    **{m: dict.fromkeys(STATS, CELL) for m in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")},
    "throughput_rps": {"ratio": 0.9, "low": None, "high": None},
    "output_tokens_per_s": {"ratio": None, "low": None, "high": None},
    "goodput_rps": CELL,
}
CLIENT = {
    "core_share": 0.02,
    "cpu_us_per_token": 31.0,
    "peak_streams": 9,
    "send_lag_p99_ms": 700.0,
    "cpu_wait_share": 0.4,
}


def report(arms: int, client: dict | None) -> dict:
    names = [f"arm{i}" for i in range(arms)]
    return {
        "arms": dict.fromkeys(names, ARM),
        "ratios": {f"{n}/arm0": RATIOS for n in names[1:]},
        "slo": {"ttft_ms": 2000.0},
        "rate_rps": 3.6,
        "load": 0.9,
        **({} if client is None else {"client": client}),
    }


def text(values: dict, width: int) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, color_system=None)
    with console.capture() as capture:
        print_report(values, console)
    return capture.get()


def test_everything_is_shown_on_a_narrow_terminal() -> None:
    shown = text(report(6, CLIENT), 80)
    assert "…" not in shown
    assert shown.count("1.30 [1.10, 1.60]") == 5 * 17
    assert shown.count("Ratios (below 1") == 3
    assert "95 % intervals; coloured: a difference" in shown
    for part in ("250", "1.5", "2,000", "36.6%", "1.25", "arrivals: 3.60 requests/s (load 0.9)"):
        assert part in shown
    assert "ttft_ms <= 2000" in shown


def test_the_phases_before_a_decode_engine_are_shown_where_there_are_any() -> None:
    values = report(2, None)
    assert "to prefill's answer" not in text(values, 120)
    phases = {"prefill_ms": {**STATS, "p50": 77.0}, "kv_wait_ms": {**STATS, "mean": 66.0}}
    values["arms"] = {name: {**arm, **phases} for name, arm in values["arms"].items()}
    shown = text(values, 120)
    assert "to prefill's answer P50" in shown
    assert shown.count(" 77 ") == 2
    assert "from there to KV mean" in shown
    assert shown.count(" 66 ") == 2


def test_warnings() -> None:
    found = "\n".join(warnings(report(1, CLIENT)))
    assert "700 ms late" in found
    assert "no core 40% of the time" in found
    assert "arm0: 3 of 20 requests" in found
    clean = report(1, CLIENT | {"send_lag_p99_ms": 2.0, "cpu_wait_share": 0.001})
    clean["arms"]["arm0"] = ARM | {"rejected": 0, "failed": 0}
    assert warnings(clean) == []


def test_a_simulated_report_has_no_client() -> None:
    assert "client" not in text(report(2, None), 100)


def test_an_arm_against_itself_is_not_coloured_in_table_and_page() -> None:
    rng = np.random.default_rng(0)
    for repeats in (1, 4, 5, 8):
        arms = runs(rng, repeats, 30, 1.0)
        ratios = {"B/A": nested(compare(arms, "A", Slo())["B"])}
        assert 'class="good"' not in _ratios(ratios)
        assert 'class="bad"' not in _ratios(ratios)
        for metric, lower in (("ttft_ms", True), ("e2e_ms", True)):
            cells = ratios["B/A"][metric].values()
            assert {verdict(cell, lower) for cell in cells} == {""}
        few = "fewer than 5 turns" in ratios_title({"ratios": ratios})
        assert few == (repeats < 5)


def test_gains_and_losses_are_coloured_as_they_are() -> None:
    assert verdict(CELL, True) == "red"
    assert verdict(CELL, False) == "green"
    assert verdict(CELL | {"differs": False}, True) == ""
    assert verdict({"ratio": 1.3, "low": 1.1, "high": 1.6}, True) == "", "of an older run"
