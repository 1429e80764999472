"""The HTML page holds the run's figures, stands alone, and is well formed."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gimbal.commands.report import command
from gimbal.core.errors import InputError
from gimbal.records.placements import placement_record
from gimbal.records.schema import RebalanceRecord, RequestRecord, RunInfo
from gimbal.records.store import RunReader, RunWriter
from gimbal.report.compare import compare, nested
from gimbal.report.metrics import Slo, balance, summarize
from gimbal.report.report import write_report

VOID = {"meta", "line", "circle", "image"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        links = [value for key, value in attrs if key in ("src", "href")]
        assert all(value.startswith("data:") for value in links), "the page must stand alone"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make_run(directory: Path) -> dict:
    rng = np.random.default_rng(0)
    runs: dict[str, list[list[RequestRecord]]] = {}
    for arm, factor in (("vllm", 1.0), ("a<b", 0.5)):
        runs[arm] = []
        for turn in range(5):
            times = [i + t * factor for i, t in enumerate(rng.random(30) + 0.1)]
            runs[arm].append(
                [
                    RequestRecord(
                        f"{arm}-{i}",
                        arm,
                        turn,
                        i,
                        i,
                        10,
                        2,
                        2,
                        at,
                        at + 0.5,
                        (at, at + 0.5),
                        index=i,
                    )
                    for i, at in enumerate(times)
                ]
            )
    ratios = compare(runs, "vllm", Slo())
    extra = {"balance": balance({0: 3.0, 1: 1.0})}
    result = {
        "arms": {name: summarize(records, Slo()) | extra for name, records in runs.items()},
        "ratios": {"a<b/vllm": nested(ratios["a<b"])},
    }
    info = RunInfo("bench", (), 0, 5, {"name": "t"}, {}, {}, result=result)
    with RunWriter(directory, info) as writer:
        for records in runs.values():
            for own in records:
                writer.write(own)
    return result


def test_page(tmp_path: Path) -> None:
    result = make_run(tmp_path / "run")
    run = CliRunner().invoke(command, [str(tmp_path / "run")], catch_exceptions=False)
    assert run.exit_code == 0
    text = (tmp_path / "run" / "report.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "a&lt;b" in text
    assert "<b/vllm" not in text
    assert f"{result['arms']['vllm']['ttft_ms']['mean']:,.0f}" in text
    assert text.count("<polyline") == 2 * 4
    assert text.index("<h2>Ratios") < text.index("<h2>Arms")
    assert "Not recorded: this run holds no balance of the engines over time" in text
    assert (tmp_path / "run" / "plots" / "ttft.svg").exists()
    ratio = result["ratios"]["a<b/vllm"]["ttft_ms"]["mean"]
    change = f'<span class="good">{100 - 100 * ratio["ratio"]:.0f} % lower</span>'
    head = text[text.index('<p class="headline">') : text.index("<h2>Ratios")]
    assert f"<b>a&lt;b against vllm</b>: mean TTFT {change}; P99 TTFT" in head
    assert "TPOT the same within noise (+0 %)." in head
    assert f'<span class="good">{ratio["ratio"]:.2f}</span>' in text


def test_a_run_without_result_is_refused(tmp_path: Path) -> None:
    info = RunInfo("bench", (), 0, 1, {}, {}, {})
    RunWriter(tmp_path / "run", info).close()
    with pytest.raises(InputError, match="has no result"):
        write_report(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"] is None


def test_rearrangements_and_placements_are_drawn(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    placed = placement_record(
        3.0, True, np.ones((2, 4)), np.array([[0, 1, 2, 3]] * 2), np.array([[3, 2, 1, 0]] * 2), 2
    )
    gain = RebalanceRecord(3.0, True, "", 5.0, 1.0, 4.0, 1.0, 4, 4, 0.5, 0.9, None, None, "a<b")
    info = RunReader(tmp_path / "run").info()
    with RunWriter(tmp_path / "more", info) as writer:
        writer.write([gain])
        writer.write([dataclasses.replace(placed, arm="a<b")])
    text = write_report(tmp_path / "more").read_text()
    Balanced().feed(text)
    assert text.count("data:image/png;base64") == 5
    assert "a&lt;b: rank of each expert before" in text
    assert "<circle" in text
    kept = dataclasses.replace(placed, arm="a<b", committed=False, ranks_after=placed.ranks_before)
    with RunWriter(tmp_path / "kept", info) as writer:
        writer.write([kept])
    text = write_report(tmp_path / "kept").read_text()
    assert text.count("data:image/png;base64") == 3
    assert "a&lt;b: rank of each expert kept (refused by the gain gate)" in text
